import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from raysys import storage
from raysys.batch.config import BatchConfig
from raysys.batch.run import run_batch
from raysys.bundle import Bundle
from raysys.errors import ConfigError, SchemaError
from raysys.events.identity import user_key
from raysys.pipeline import recommend_user
from tests import planted
from tests.prepared import write_prepared

SMALL = BatchConfig(actors=2, users_per_part=50, batch_size=16)


def read_parts(folder):
    names = [name for name in storage.list_dir(str(folder)) if name.startswith("part-")]
    return [row for name in names for row in pq.read_table(f"{folder}/{name}").to_pylist()]


@pytest.fixture(scope="module")
def final(ray_cluster, planted_bundle, tmp_path_factory):
    out = tmp_path_factory.mktemp("batch") / "final"
    return out, run_batch(planted_bundle, str(out), k=10, settings=SMALL)


def test_the_lists_are_those_of_serving(final, planted_bundle):
    out, manifest = final
    bundle = Bundle.open(planted_bundle)
    rows = {row["user_key"]: row for row in read_parts(out)}
    assert len(rows) == planted.NUM_USERS and manifest["parts"] == 4 and manifest["key"] == "user_key"
    for user_id in planted.user_ids()[:100]:
        one, row = recommend_user(bundle, user_id, 10), rows[user_key(user_id)]
        assert [bundle.item_ids[item] for item in one.items] == row["item_id"]
        np.testing.assert_allclose(row["score"], one.scores, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(row["probability"], one.probabilities, rtol=1e-2)


def test_throughput_and_checksums_are_stored(final):
    out, manifest = final
    run = manifest["this_run"]
    assert run["users"] == planted.NUM_USERS and run["users_per_second"] == pytest.approx(run["users"] / run["seconds"], rel=0.01)
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert all(storage.sha256(str(out / name)) == digest for name, digest in manifest["files"].items()) and len(manifest["files"]) == 4


def test_a_stopped_run_goes_on_and_ends_the_same(final, planted_bundle, tmp_path, capsys):
    out, manifest = final
    again = tmp_path / "again"
    storage.copy_tree(str(out), str(again))
    (again / "manifest.json").unlink()
    (again / "part-00002.parquet").unlink()
    kept = (again / "part-00000.parquet").stat().st_mtime_ns
    resumed = run_batch(planted_bundle, str(again), k=10, settings=SMALL)
    assert "3 of 4 parts are there" in capsys.readouterr().out
    assert resumed["this_run"]["parts"] == 1 and resumed["this_run"]["users"] == 50
    assert resumed["files"] == manifest["files"], "the part that was computed again is the same, byte for byte"
    assert (again / "part-00000.parquet").stat().st_mtime_ns == kept
    run_batch(planted_bundle, str(again), k=10, settings=SMALL)
    assert "complete already" in capsys.readouterr().out


def test_another_run_in_the_same_folder_is_refused(final, planted_bundle, tmp_path):
    out, _ = final
    with pytest.raises(ConfigError, match=r"holds another run \(k 10 there, 5 now\); choose another folder"):
        run_batch(planted_bundle, str(out), k=5, settings=SMALL)
    with pytest.raises(ConfigError, match="another run .users_per_part"):
        run_batch(planted_bundle, str(out), k=10, settings=BatchConfig(users_per_part=60))
    (tmp_path / "mine.txt").write_text("not yours")
    with pytest.raises(ConfigError, match="expected an empty or missing folder"):
        run_batch(planted_bundle, str(tmp_path), k=10)


def test_ids_of_a_file_come_back_and_strangers_get_what_is_popular(ray_cluster, planted_bundle, tmp_path, capfd):
    (tmp_path / "users.txt").write_text("user-7\nnobody-at-all\nuser-3\nuser-7\n")
    run_batch(planted_bundle, str(tmp_path / "out"), k=5, users_uri=str(tmp_path / "users.txt"), settings=SMALL)
    rows = read_parts(tmp_path / "out")
    assert [row["user_id"] for row in rows] == ["user-7", "nobody-at-all", "user-3"]
    bundle = Bundle.open(planted_bundle)
    for row in rows:
        assert row["item_id"] == [bundle.item_ids[item] for item in recommend_user(bundle, row["user_id"], 5).items]
    assert {planted.cluster_of(item) for item in rows[0]["item_id"]} == {7 % planted.NUM_CLUSTERS}
    printed = capfd.readouterr()
    assert "nobody-at-all" not in printed.out + printed.err and "user-7" not in printed.out + printed.err
    with pytest.raises(SchemaError, match="expected a file of user ids"):
        run_batch(planted_bundle, str(tmp_path / "x"), users_uri=str(tmp_path / "none.txt"))


def test_users_of_a_prepared_set_by_dot_product(ray_cluster, planted_bundle, tmp_path):
    prepared = write_prepared(str(tmp_path / "prepared"), planted.sequences(), planted.items_table())
    run_batch(planted_bundle, str(tmp_path / "out"), stage="interest", k=6, prepared_uri=prepared, settings=SMALL)
    rows = read_parts(tmp_path / "out")
    assert [row["user_id"] for row in rows] == planted.user_ids()
    bundle, data = Bundle.open(planted_bundle), planted.sequences()
    scores = bundle.models["interest"].scores(data.queries())
    scores[data.rows, data.items] = -np.inf
    scores[:, 5] = -np.inf  # not available
    for row, mine in zip(rows, scores, strict=True):
        found = [int(item.split("-")[1]) for item in row["item_id"]]
        np.testing.assert_allclose(row["score"], np.sort(mine)[::-1][:6], rtol=1e-5)
        np.testing.assert_allclose(mine[found], row["score"], rtol=1e-5)
        assert row["probability"] == [None] * 6


def test_exported_vectors_multiply_to_the_scores(ray_cluster, planted_bundle, tmp_path):
    manifest = run_batch(planted_bundle, str(tmp_path / "out"), stage="embeddings", settings=SMALL)
    users = np.array([row["vector"] for row in read_parts(tmp_path / "out")], np.float32)
    items = pq.read_table(tmp_path / "out" / "items.parquet")
    vectors = np.array(items["vector"].to_pylist(), np.float32)
    bundle = Bundle.open(planted_bundle)
    np.testing.assert_allclose(users @ vectors.T, bundle.models["interest"].scores(planted.sequences().queries()), rtol=1e-4, atol=1e-4)
    assert items["item_id"].to_pylist() == bundle.item_ids and "items.parquet" in manifest["files"]


def test_wrong_settings_are_one_clear_line(ray_cluster, planted_bundle, tmp_path):
    with pytest.raises(ConfigError, match="a worker asks for 99 CPUs and 0 GPUs, the cluster has 2 and 0"):
        run_batch(planted_bundle, str(tmp_path / "a"), settings=BatchConfig(cpus_per_actor=99))
    with pytest.raises(ConfigError, match="got both"):
        run_batch(planted_bundle, str(tmp_path / "a"), users_uri="u", prepared_uri="p")
    with pytest.raises(ConfigError, match="-k: expected at least 1"):
        run_batch(planted_bundle, str(tmp_path / "a"), k=0)


@pytest.mark.slow
def test_the_driver_killed_in_the_middle(planted_bundle, tmp_path):
    """A real kill -9 of the command; its cluster dies with it, the second call finishes the rest."""
    command = [sys.executable, "-m", "raysys.cli", "recommend-all", "--model", planted_bundle, "-k", "10", "--set", "actors=1"]
    command += ["--set", "users_per_part=1", "--set", "batch_size=1"]
    out, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob("part-*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    assert 0 < len(before) < planted.NUM_USERS and not (out / "manifest.json").exists()
    time.sleep(5)  # the orphaned raylet notices
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    subprocess.run([*command, "--out", str(out)], check=True, stdout=subprocess.DEVNULL, timeout=180)
    subprocess.run([*command, "--out", str(whole)], check=True, stdout=subprocess.DEVNULL, timeout=180)
    assert all((out / name).stat().st_mtime_ns == at for name, at in before.items())
    read = [json.loads((folder / "manifest.json").read_text()) for folder in (out, whole)]
    assert read[0]["files"] == read[1]["files"] and read[0]["this_run"]["parts"] == planted.NUM_USERS - len(before)
