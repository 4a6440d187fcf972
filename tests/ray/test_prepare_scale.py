"""prepare at scale: cut anywhere, killed anywhere, appended to at any time, the result is the same."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import polars as pl
import pytest
import ray

from raysys import storage
from raysys.adapters import import_dataset
from raysys.errors import ConfigError, SchemaError
from raysys.prepare.config import PrepareConfig
from raysys.prepare.dataset import MANIFEST, Prepared
from raysys.prepare.run import prepare

pytestmark = pytest.mark.usefixtures("ray_cluster")
T = 1_700_000_000
DAY = 86_400


def facts(manifest: dict) -> dict:
    """Everything of a manifest that must not depend on how the work was cut."""
    return {name: value for name, value in manifest.items() if name not in ("created", "stages", "files", "config", "raw")}


@pytest.fixture(scope="module")
def skewed(tmp_path_factory) -> str:
    """Zipf items, one user with a tenth of all events, files of unequal size."""
    folder = str(tmp_path_factory.mktemp("skewed") / "data")
    import_dataset("synthetic", None, folder, users=400, items=150, events=20_000, seed=4, files=6, heavy_user=0.1)
    return folder


def test_any_number_of_chunks_and_partitions_gives_the_same_set(tmp_path, skewed):
    # 40 partitions have their counts added up in a tree of two levels.
    cuts = [{}, {"partitions": 7, "rows_per_chunk": 999}, {"partitions": 40, "rows_per_chunk": 7000}]
    manifests = [prepare(skewed, str(tmp_path / "out"), config=PrepareConfig(**cut), progress=False) for cut in cuts]
    assert facts(manifests[0]) == facts(manifests[1]) == facts(manifests[2])
    sequences = Prepared.open(str(tmp_path / "out")).sequences()
    lengths = sequences.indptr[1:] - sequences.indptr[:-1]
    assert len(lengths) == 401 and lengths.max() == pytest.approx(2000, abs=20)  # two drawn events may be the same
    assert len([name for name in manifests[2]["files"] if name.startswith("sequences/")]) == 40
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.slow
def test_one_worker_gives_what_two_give(tmp_path, skewed):
    two = prepare(skewed, str(tmp_path / "two"), config=PrepareConfig(partitions=3), progress=False)
    code = f"""
import ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
from raysys.prepare.run import prepare
prepare({skewed!r}, {str(tmp_path / "one")!r}, progress=False)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert facts(Prepared.open(str(tmp_path / "one")).manifest) == facts(two)


def marks(tmp_path: Path, kind: str) -> list[Path]:
    """Marks of finished tasks in the working folder beside `out`."""
    return sorted(tmp_path.glob(f"out.work-*/steps/{kind}/*.json"))


@pytest.mark.parametrize(
    "kind", [pytest.param("chunks", marks=pytest.mark.slow), "ordered", pytest.param("written", marks=pytest.mark.slow)]
)
def test_a_killed_driver_goes_on_where_it_was(tmp_path, skewed, kind):
    whole = prepare(skewed, str(tmp_path / "whole"), progress=False)
    settings = {"partitions": 30, "rows_per_chunk": 700}
    command = [sys.executable, "-m", "raysys.cli", "prepare", "--data", skewed, "--out", str(tmp_path / "out")]
    command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while len(marks(tmp_path, kind)) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    time.sleep(1)  # the killed driver's tasks end with it
    assert not (tmp_path / "out").exists()
    assert 3 <= len(marks(tmp_path, kind)) < 30
    # A finished chunk is not read again: what its mark says is believed.
    mark = marks(tmp_path, "chunks")[0]
    report = json.loads(mark.read_text())
    report["forms"] |= {"read before the kill": 1}
    mark.write_text(json.dumps(report))
    resumed = prepare(skewed, str(tmp_path / "out"), config=PrepareConfig(**settings), progress=False)
    assert "read before the kill (1 rows)" in " ".join(resumed["notes"])
    assert (resumed["fingerprint"], resumed["counts"]) == (whole["fingerprint"], whole["counts"])
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


def test_changed_input_does_not_go_on_with_old_work(tmp_path):
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "interactions.csv"
    file.write_text(f"user_id,item_id,timestamp\na,x,{T}\na,y,{T + 1}\n")
    code = f"""
import os, ray
from raysys.prepare import stages
from raysys.prepare.run import prepare
stages.order = lambda *_: os._exit(9)
ray.init(address={ray.get_runtime_context().gcs_address!r}, log_to_driver=False)
prepare({str(tmp_path / "data")!r}, {str(tmp_path / "out")!r}, progress=False)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert len(marks(tmp_path, "chunks")) == 1
    file.write_text(f"user_id,item_id,timestamp\na,x,{T}\na,z,{T + 1}\n")  # of the same size
    prepare(str(tmp_path / "data"), str(tmp_path / "out"), progress=False)
    assert Prepared.open(str(tmp_path / "out")).items()["item_id"].to_pylist() == ["x", "z"]
    assert sorted(os.listdir(tmp_path)) == ["data", "out"]


def busy_workers() -> list[int]:
    """Process ids of this cluster's workers that run a task of Ray Data now."""
    parents, busy = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if (folder / "cmdline").read_text().startswith("ray::MapBatches"):
                busy.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue

    def ours(process: int) -> bool:
        return process == os.getpid() or (process in parents and ours(parents[process]))

    return [process for process in busy if ours(process)]


@pytest.mark.slow
def test_killed_workers_cost_their_tasks_only(tmp_path, skewed):
    whole = prepare(skewed, str(tmp_path / "whole"), progress=False)
    killed, done = set(), threading.Event()

    def kill() -> None:
        while not done.is_set() and len(killed) < 4:
            for process in busy_workers()[:1]:
                os.kill(process, signal.SIGKILL)
                killed.add(process)
            time.sleep(0.4)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        disturbed = prepare(skewed, str(tmp_path / "out"), config=PrepareConfig(partitions=30, rows_per_chunk=700), progress=False)
    finally:
        done.set()
        thread.join()
    assert killed
    assert facts(disturbed) == facts(whole)


def days(tmp_path: Path) -> list[Path]:
    """Three days as data folders. Later ones bring new users and items, late events, repeated rows and ids, bad rows."""
    rng, folders, before = random.Random(5), [], []
    for day in range(3):
        rows = []
        for _ in range(1500):
            late = DAY * rng.choice([0, 0, 0, 1, 2]) if day else 0
            user = f"u{rng.randrange(20 * (day + 1))}"
            item = f"i{int(15 * (day + 1) * rng.random() ** 2)}"
            event_id = f"e{rng.randrange(900)}" if rng.random() < 0.3 else None
            rows.append((user, item, T + DAY * day - late + rng.randrange(2000), rng.choice(["view", "click"]), event_id))
        repeated = rng.sample(before, 100) if before else []
        bad = [("", "i1", T, "view", None), ("u1", "i1", 17, "view", None)]
        before += rows
        folder = tmp_path / f"day{day}"
        (folder / "interactions").mkdir(parents=True)
        frame = pl.DataFrame([*rows, *repeated, *bad], orient="row", schema=["user_id", "item_id", "timestamp", "event", "event_id"])
        frame.write_parquet(folder / "interactions" / f"day={day}.parquet", row_group_size=400)
        items = pl.DataFrame({"item_id": [f"i{n}" for n in range(0, 30, 3 - day)], "title": f"day {day}"})
        if day:
            (folder / "items").mkdir()
            items.write_parquet(folder / "items" / f"day={day}.parquet")
        folders.append(folder)
    return folders


def together(folders: list[Path], target: Path) -> str:
    """One data folder with the files of all."""
    for folder in folders:
        for file in folder.rglob("*.parquet"):
            (target / file.parent.name).mkdir(parents=True, exist_ok=True)
            (target / file.parent.name / file.name).write_bytes(file.read_bytes())
    return str(target)


@pytest.mark.parametrize("split", ["leave-one-out", "time", "none"])
def test_appended_days_give_what_all_days_at_once_give(tmp_path, split):
    folders = days(tmp_path)
    settings = PrepareConfig(min_item_events=3, min_user_events=2, partitions=2)
    out = str(tmp_path / "out")
    prepare(str(folders[0]), out, split=split, config=settings, progress=False)
    for upto in (2, 3):
        appended = prepare(str(folders[upto - 1]), out, append=True, progress=False)
        scratch = prepare(
            together(folders[:upto], tmp_path / f"all{upto}"), str(tmp_path / "scratch"), split=split, config=settings, progress=False
        )
        assert facts(appended) == facts(scratch)
        assert Prepared.open(out).items().equals(Prepared.open(str(tmp_path / "scratch")).items())
    assert scratch["counts"]["duplicates"] > 100 and scratch["quarantine"]["empty user_id"] == 3
    refused = storage.read_table(f"{out}/quarantine")
    assert sorted(refused["file"].to_pylist()) == sorted(f"interactions/day={day}.parquet" for day in (0, 0, 1, 1, 2, 2))
    # The same day once more changes nothing but the counts of what was read and left out.
    again = prepare(str(folders[2]), out, append=True, progress=False)
    assert again["fingerprint"] == appended["fingerprint"]
    assert again["counts"]["interactions"] == appended["counts"]["interactions"]


def test_an_append_that_is_refused_or_killed_leaves_the_set(tmp_path):
    folders = days(tmp_path)
    out = str(tmp_path / "out")
    first = prepare(str(folders[0]), out, progress=False)
    with pytest.raises(ConfigError, match="--append: expected the split of .*, leave-one-out, got time"):
        prepare(str(folders[1]), out, split="time", append=True, progress=False)
    with pytest.raises(ConfigError, match="found another min_item_events"):
        prepare(str(folders[1]), out, config=PrepareConfig(min_item_events=9), append=True, progress=False)
    with pytest.raises(SchemaError, match="expected a prepared set with manifest.json, found none"):
        prepare(str(folders[1]), str(tmp_path / "nothing"), append=True, progress=False)
    with pytest.raises(SchemaError, match=r"expected no bad rows \(--strict\), found 1 x"):
        prepare(str(folders[1]), out, append=True, strict=True, progress=False)
    code = f"""
import os, ray
from raysys.prepare import stages
from raysys.prepare.run import prepare
stages.encode = lambda *_: os._exit(9)
ray.init(address={ray.get_runtime_context().gcs_address!r}, log_to_driver=False)
prepare({str(folders[1])!r}, {out!r}, append=True, progress=False)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert storage.read_json(f"{out}/{MANIFEST}") == json.loads(json.dumps(first))
    assert Prepared.open(out).sequences().items.size == first["counts"]["interactions"]
    appended = prepare(str(folders[1]), out, append=True, progress=False)
    assert facts(appended) == facts(prepare(together(folders[:2], tmp_path / "all"), str(tmp_path / "scratch"), progress=False))

    prepare(str(folders[0]), out, config=PrepareConfig(keep_raw=False), progress=False)
    assert not (tmp_path / "out" / "raw").exists()
    with pytest.raises(ConfigError, match="found one without raw/"):
        prepare(str(folders[1]), out, append=True, progress=False)
