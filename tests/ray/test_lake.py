"""A log that was compacted is a data set: prepared whole, or a batch at a time, each event once."""

import pytest

from raysys.cli import main
from raysys.events.identity import user_key
from raysys.events.log import open_log
from raysys.prepare.dataset import Prepared
from raysys.prepare.run import prepare

pytestmark = pytest.mark.usefixtures("ray_cluster")
START = 1_700_000_000.0


def event(n: int) -> dict:
    at = START + 3600.0 * n
    return {
        "kind": "event",
        "event_id": f"e{n}",
        "user_id": f"u{n % 7}",
        "item_id": f"i{n % 11}",
        "event": "click",
        "timestamp": at,
        "received": at,
    }


def item(n: int) -> dict:
    return {
        "kind": "item",
        "item_id": f"i{n}",
        "attributes": {"title": f"item {n}", "categories": ["x"]},
        "replace": True,
        "received": START,
    }


def compacted(events: str, folder, capsys) -> str:
    arguments = [
        "--events",
        events,
        "--out",
        f"{folder}/lake",
        "--delta",
        f"{folder}/new",
        "--max-age",
        "7d",
        "--set",
        "batch_records=1000",
    ]
    assert main(["compact", *arguments]) == 0
    return capsys.readouterr().out


def test_a_compacted_log_is_prepared_whole_and_by_the_day(tmp_path, capsys):
    events = str(tmp_path / "log")
    log = open_log(events, writable=True)
    log.append([*(item(n) for n in range(11)), *(event(n) for n in range(100))])
    assert "events            100" in compacted(events, tmp_path, capsys)
    prepare(f"{tmp_path}/lake", f"{tmp_path}/by-day", split="leave-one-out", progress=False)
    log.append([event(n) for n in range(90, 150)])  # ten of them were sent again
    assert "duplicates        10" in compacted(events, tmp_path, capsys)
    prepare(f"{tmp_path}/new/batch-00000002", f"{tmp_path}/by-day", append=True, progress=False)
    prepare(f"{tmp_path}/lake", f"{tmp_path}/whole", split="leave-one-out", progress=False)
    by_day, whole = Prepared.open(f"{tmp_path}/by-day"), Prepared.open(f"{tmp_path}/whole")
    assert whole.manifest["counts"]["users"] == 7 and len(whole.sequences().items) == 150
    assert by_day.manifest["fingerprint"] == whole.manifest["fingerprint"]
    assert whole.items()["title"].to_pylist()[0].startswith("item ")
    assert not any(whole.manifest["quarantine"].values())

    log.append([{"kind": "erase", "user_key": user_key("u3").hex(), "at": START + 3600.0 * 1000}])
    compacted(events, tmp_path, capsys)
    prepare(f"{tmp_path}/lake", f"{tmp_path}/later", split="leave-one-out", progress=False)
    assert "u3" not in Prepared.open(f"{tmp_path}/later").users()["user_id"].to_pylist()


def test_wrong_commands_print_one_line(tmp_path, capsys):
    for arguments, message in (
        (["--events", "kafka://x/y"], "redis://host:port/db"),
        (["--events", str(tmp_path / "log"), "--max-bytes", "many"], "--max-bytes: expected a size"),
        (["--events", str(tmp_path / "log"), "--max-age", "soon"], "--max-age: expected a duration"),
        (["--events", str(tmp_path / "log"), "--set", "window=5"], "window_s"),
        (["--events", "redis://127.0.0.1:1/0"], "events at redis://127.0.0.1:1/0"),
    ):
        assert main(["compact", "--out", str(tmp_path / "lake"), *arguments]) == 2
        assert message in capsys.readouterr().err
