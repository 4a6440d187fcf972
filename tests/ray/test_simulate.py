"""A timeline through the running service, with the learner on and off."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest

from raysys import cluster, storage
from raysys.online.simulate import SimulateConfig, flip_figures, flip_place, recovery, simulate, split
from raysys.serve.launch import family, port_holder
from tests import planted


def write_data(folder: str) -> None:
    """Walks of planted clusters, interleaved in time; the last items occur only late."""
    walks, items = planted.sequences(), planted.items_table()
    ids = np.array(items["item_id"].to_pylist())
    table = {
        "user_id": [planted.user_ids()[row] for row in walks.rows],
        "item_id": ids[walks.items],
        "timestamp": walks.times + walks.rows,  # one after the other, each user still in order
        "event": ["rating"] * len(walks.items),
        "value": walks.values,
    }
    table = pa.table(table).sort_by("timestamp")
    fresh = ["brand-new" if at >= table.num_rows - 60 and at % 6 == 0 else item for at, item in enumerate(table["item_id"].to_pylist())]
    table = table.set_column(table.schema.get_field_index("item_id"), "item_id", [fresh])
    storage.write_table(storage.join(folder, "interactions.parquet"), table)
    told = items.select(["item_id", "title", "categories", "year"])
    brand_new = {"item_id": ["brand-new"], "title": ["A title of its own"], "categories": [["new"]], "year": [2000]}
    storage.write_table(storage.join(folder, "items.parquet"), pa.concat_tables([told, pa.table(brand_new, schema=told.schema)]))


def test_a_flip_changes_only_what_follows_it(tmp_path):
    write_data(str(tmp_path / "data"))
    _, plain, _ = split(str(tmp_path / "data"), SimulateConfig(max_events=100))
    _, flipped, _ = split(str(tmp_path / "data"), SimulateConfig(max_events=100, flip=0.5))
    assert flipped["item_id"][:50] == plain["item_id"][:50]
    assert np.mean([a != b for a, b in zip(flipped["item_id"][50:], plain["item_id"][50:], strict=True)]) > 0.8
    assert flipped["user_id"] == plain["user_id"]


@pytest.mark.slow
def test_both_arms_of_a_small_replay(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    write_data(str(tmp_path / "data"))
    config = SimulateConfig(share=0.1, learn_every=60, window=30, train_epochs=2)
    result = simulate(str(tmp_path / "data"), str(tmp_path / "out"), config)
    assert json.loads(json.dumps(result)) == json.loads((tmp_path / "out" / "replay.json").read_text())
    assert (tmp_path / "out" / "replay.png").stat().st_size > 10_000
    off, on = result["arms"]["off"], result["arms"]["on"]
    assert len(off["hits"]) == len(on["hits"]) == result["events"] > 120
    assert off["rounds"] == [] and off["upserts"] == on["upserts"] != []
    published = [one for one in on["rounds"] if one["status"] == "published"]
    assert len(on["rounds"]) == result["events"] // 60 and published
    assert len(off["versions"]) == 1 and len(on["versions"]) > 1
    assert len(on["visible"]) == -(-result["events"] // 20) and np.mean([one["changed"] for one in on["visible"]]) > 0.5
    first = published[0]["at"]
    assert on["hits"][:first] == off["hits"][:first], "before the first version the arms are the same"


def test_ray_does_not_keep_the_signal(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ours = lambda *_: sys.exit(143)  # noqa: E731
    before = signal.signal(signal.SIGTERM, ours)
    try:
        with cluster.connected():
            assert signal.getsignal(signal.SIGTERM) is ours
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_a_terminated_replay_leaves_no_service_behind(tmp_path, planted_bundle):
    write_data(str(tmp_path / "data"))
    token = f"RAYSYS_TEST_CHILD={secrets.token_hex(8)}"
    environment = {**os.environ, **dict([token.split("=")])}
    environment.pop("RAY_ADDRESS", None)
    arguments = ["simulate", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--model", planted_bundle]
    arguments += ["--set", "port=8079", "--set", "share=0.5"]
    command = [sys.executable, "-c", "import sys; from raysys.cli import main; sys.exit(main())", *arguments]
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out/off/events/seg-*.log")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    assert process.poll() is None and port_holder(8079), "events are on their way"
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert process.wait(timeout=60) == 143
    assert family(token.encode()) == [] and port_holder(8079) is None


def test_the_flip_of_the_data_themselves_is_found(tmp_path):
    tail = {"item_id": list("abcd"), "timestamp": [10, 20, 30, 40]}
    assert flip_place(str(tmp_path), tail, SimulateConfig()) is None and flip_place(str(tmp_path), tail, SimulateConfig(flip=0.5)) == 2
    for flip_time, place in ((25, 2), (30, 2), (5, None), (50, None), (None, None)):
        storage.write_json(str(tmp_path / "truth.json"), {"flip_time": flip_time})
        assert flip_place(str(tmp_path), tail, SimulateConfig()) == place


def test_what_is_won_back_is_asked_at_a_fixed_place():
    hits = np.concatenate([np.tile([1, 0], 50), np.zeros(2000), np.tile([1, 0, 0, 0], 50)])
    found = flip_figures(hits, 100, 100)
    assert found["hit rate before the flip"] == 0.5 and found["hit rate after the flip"] == 0
    assert found["lost hit rate won back after 2000 events"] == 0.5 and found["events to recovery"] is None
    assert flip_figures(hits[:2150], 100, 100)["lost hit rate won back after 2000 events"] is None, "too short to say"


def test_recovery_counts_from_the_flip():
    hits = np.array([1] * 100 + [0] * 50 + [1] * 150)
    assert recovery(hits, 100, 20) == 48, "18 of the 20 after it are hits"
    assert recovery(np.array([1] * 100 + [0] * 200), 100, 20) is None
    assert recovery(np.ones(300), 100, 20) is None, "nothing was lost"
