"""The log as a lake: what `prepare` reads, each event once, whatever is killed in between; erased users are gone from it."""

import json
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from raysys import storage
from raysys.cli import main
from raysys.errors import ConfigError, StateError
from raysys.events.identity import PSEUDONYM, user_key
from raysys.events.log import open_log
from raysys.events.retention import Retention
from raysys.lake import layout
from raysys.lake.compact import CompactConfig, compact, consumer
from raysys.lake.examples import label
from raysys.lake.rows import impressions, interactions
from raysys.prepare.source import find_interactions, open_sources

DAY = 86_400.0
NOW = datetime(2026, 3, 2, tzinfo=UTC).timestamp()


def event(n: int, user: str = "u", item: str = "i", at: float = NOW, **more) -> dict:
    record = {"kind": "event", "event_id": f"e{n}", "user_id": user, "item_id": item, "event": "click", "timestamp": at, "received": at}
    return {**record, **more}


def shown(name: str, user: str | None, items: list[str], at: float = NOW) -> dict:
    return {
        "kind": "impression",
        "recommendation_id": name,
        "user_id": user,
        "items": items,
        "positions": list(range(1, len(items) + 1)),
        "scores": [1.0 / (1 + n) for n in range(len(items))],
        "propensities": [1.0] * len(items),
        "version": "b-1",
        "strategy": "personalized",
        "at": at,
    }


def erase(user: str, at: float) -> dict:
    return {"kind": "erase", "user_key": user_key(user).hex(), "at": at}


def table(lake: str, name: str = "interactions") -> pl.DataFrame:
    paths = [f"{name}/{file}" for file in storage.list_files(storage.join(lake, name))]
    return layout.read_files(lake, paths)


def all_text(folder) -> bytes:
    """Everything that files of a lake say, Parquet decoded."""
    parts = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            parts.append(pl.read_parquet(path).write_csv().encode() if path.suffix == ".parquet" else path.read_bytes())
    return b"\n".join(parts)


@pytest.fixture
def lake(tmp_path):
    return str(tmp_path / "lake")


@pytest.fixture
def run(place, lake, tmp_path):
    def run(**more):
        return compact(place("log"), lake, dead_letters=str(tmp_path / "refused"), **{"clock": lambda: NOW + 10 * DAY, **more})

    return run


@pytest.fixture
def log(place):
    log = open_log(place("log"), writable=True)
    yield log
    log.close()


def test_events_lie_by_day_in_the_data_contract(log, lake, run):
    full = {"value": 4.5, "session_id": "s", "recommendation_id": "r", "position": 3, "properties": {"page": "home"}}
    log.append([event(1, at=NOW - DAY, **full), event(2), event(3, at=NOW + 1.25), {"kind": "item", "item_id": "x", "attributes": {}}])
    assert run()["events"] == 3
    names = storage.list_files(storage.join(lake, "interactions"))
    assert names == ["date=2026-03-01/batch-00000001.parquet", "date=2026-03-02/batch-00000001.parquet"]
    first = table(lake).sort("timestamp").row(0, named=True)
    assert first["timestamp"] == datetime(2026, 3, 1, tzinfo=UTC) and json.loads(first["properties"]) == {"page": "home"}
    assert {name: first[name] for name in ("value", "session_id", "recommendation_id", "position", "event_id")} == {
        "value": 4.5,
        "session_id": "s",
        "recommendation_id": "r",
        "position": 3,
        "event_id": "e1",
    }
    sources = open_sources(lake, find_interactions(lake))
    assert len(sources) == 2 and sum(source.num_rows for source in sources) == 3


def test_each_event_is_there_once_also_when_it_was_sent_again(log, lake, run):
    log.append([event(1), event(2), event(1)])
    assert run()["events"] == 2
    log.append([event(2), event(3), event(3, at=NOW + 5)])
    report = run()
    assert (report["events"], report["duplicates"]) == (1, 2)
    assert sorted(table(lake)["event_id"]) == ["e1", "e2", "e3"]
    assert run()["batches"] == 0, "nothing new"


def test_batches_are_bounded_and_go_on_where_the_last_call_ended(log, lake, run):
    log.append([event(n) for n in range(25)])
    assert run(config=CompactConfig(batch_records=10))["batches"] == 3
    log.append([event(n) for n in range(25, 30)])
    assert run(config=CompactConfig(batch_records=10))["events"] == 5
    assert sorted(table(lake)["event_id"]) == sorted(f"e{n}" for n in range(30))


def test_a_call_that_is_killed_at_any_write_is_repeated_exactly(place, tmp_path, monkeypatch):
    """Every file that is written is a point to die at."""
    write, small = storage.write_bytes, CompactConfig(batch_records=4)
    for dies_at in range(1, 100):
        at, lake, letters = place(f"log-{dies_at}"), str(tmp_path / f"lake-{dies_at}"), str(tmp_path / "refused")
        log = open_log(at, writable=True)

        def again():
            compact(at, lake, config=small, dead_letters=letters, clock=lambda: NOW + 10 * DAY)  # noqa: B023

        log.append([event(n, user=f"u{n % 3}", at=NOW - n % 2 * DAY) for n in range(6)])
        log.append([shown("r1", "u1", ["i", "j"]), {"kind": "item", "item_id": "x", "attributes": {"title": "t"}, "replace": True}])
        again()
        log.append([event(n, user=f"u{n % 3}", at=NOW - n % 2 * DAY) for n in range(6, 12)])
        log.append([shown("r2", "u2", ["i"]), erase("u0", NOW + 1)])
        left = [dies_at]

        def dying(uri, content):
            left[0] -= 1  # noqa: B023
            if left[0] == 0:  # noqa: B023
                raise KeyboardInterrupt
            write(uri, content)

        with monkeypatch.context() as patch:
            patch.setattr(storage, "write_bytes", dying)
            try:
                again()
                died = False
            except KeyboardInterrupt:
                died = True
        again()
        assert sorted(table(lake)["event_id"]) == sorted(f"e{n}" for n in range(12) if n % 3), dies_at
        assert sorted(table(lake, "examples")["recommendation_id"]) == ["r1", "r1", "r2"], dies_at
        found = layout.load(lake)
        assert sum(file.rows for file in found.of("interactions").values()) == 8, dies_at
        assert found.offset == log.committed(consumer(lake)), dies_at
        assert storage.read_table(storage.join(lake, "items.parquet")).to_pylist() == [{"item_id": "x", "title": "t"}], dies_at
        log.close()
        if not died:
            break
    assert 10 < dies_at < 99


def test_what_a_crash_left_of_a_batch_goes_when_the_batch_is_written_anew(log, lake, run, monkeypatch):
    """Between the crash and the next call the only user of a day is erased: that day has no file in the batch any more."""
    log.append([event(1, "ann", at=NOW - DAY), event(2, "bob")])
    write = storage.write_bytes

    def dying(uri, content):
        if "date=2026-03-02" in uri:
            raise KeyboardInterrupt
        write(uri, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(storage, "write_bytes", dying)
        run()
    assert table(lake)["user_id"].to_list() == ["ann"]
    log.append([erase("ann", NOW)])
    run()
    assert table(lake)["user_id"].to_list() == ["bob"]


def test_one_at_a_time_and_not_into_a_folder_of_something_else(place, log, lake, run, tmp_path):
    with log.exclusive("compact"), pytest.raises(StateError, match="another process"):
        run()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="notes.txt"):
        compact(place("log"), str(tmp_path / "other"))


def test_a_delta_holds_the_new_events_alone(log, lake, run, tmp_path):
    log.append([event(1), event(2)])
    run(delta=str(tmp_path / "delta"))
    log.append([event(2), event(3)])
    run(delta=str(tmp_path / "delta"))
    names = sorted(path.name for path in (tmp_path / "delta").iterdir())
    assert names == ["batch-00000001", "batch-00000002"]
    assert pl.read_parquet(tmp_path / "delta" / names[1] / "interactions.parquet")["event_id"].to_list() == ["e3"]
    assert len(find_interactions(str(tmp_path / "delta" / names[0]))) == 1


def test_items_that_were_put_are_there_and_mere_patches_are_not(log, lake, run):
    def said(kind, name, at, **more):
        return {"kind": kind, "item_id": name, "attributes": {}, "received": at, **more}

    log.append(
        [
            said("item", "x", 1.0, attributes={"title": "old", "tags": ["a"], "price": 3}, replace=True),
            said("item", "x", 3.0, attributes={"title": "new", "tags": None}),
            said("item", "x", 2.0, attributes={"title": "between"}),  # from another writer
            said("item", "of-the-data-set", 1.0, attributes={"available": False}),
            said("item", "y", 1.0, attributes={"price": "free"}, replace=True),
            said("item_delete", "y", 2.0),
            {"kind": "user", "user_id": "u", "attributes": {"age": 3}, "replace": True, "received": 1.0},
        ]
    )
    assert run()["patched only"] == 1
    rows = {row.pop("item_id"): row for row in storage.read_table(storage.join(lake, "items.parquet")).to_pylist()}
    assert rows["x"] == {"title": "new", "price": "3", "available": None}
    assert rows["y"] == {"title": None, "price": "free", "available": False}
    assert storage.read_table(storage.join(lake, "users.parquet")).to_pylist() == [{"user_id": "u", "age": 3, "received": 1.0}]


def test_an_erased_user_leaves_lake_log_and_dead_letters(place, log, lake, run, tmp_path):
    name = "the very private name"
    log.append([event(1, name, session_id="s"), event(2, "bob"), shown("r1", name, ["i"], NOW), shown("r2", "bob", ["i"], NOW)])
    log.append([{"kind": "user", "user_id": name, "attributes": {"age": 3}, "replace": True, "received": NOW}])
    letter = {"index": 0, "field": "item_id", "reason": "missing", "received": NOW, "record": {"user_id": name}}
    (tmp_path / "refused").mkdir()
    letters = tmp_path / "refused" / "dead-letter-1.jsonl"
    letters.write_text("".join(json.dumps({**letter, "record": {"user_id": user}}) + "\n" for user in (name, "bob")))
    run(delta=str(tmp_path / "delta"))
    hidden = user_key(name).hex().encode()
    assert name.encode() in all_text(tmp_path / "lake") and name.encode() in all_text(tmp_path / "delta")
    log.append([erase(name, NOW + 1)])
    log.append([event(3, name, at=NOW + 2)])  # the same name came back
    report = run(delta=str(tmp_path / "delta"))
    assert report["erased"] >= 6
    assert table(lake).sort("event_id")["event_id"].to_list() == ["e2", "e3"]
    assert table(lake, "examples")["recommendation_id"].to_list() == ["r2"]
    log.append([erase(name, NOW + 3)])
    run()
    raw = [record for segment in log.segments() for record in log.read_raw(segment, 0)[0] if record["kind"] != "erase"]
    everything = all_text(tmp_path / "lake") + all_text(tmp_path / "delta") + repr(raw).encode() + letters.read_bytes()
    assert name.encode() not in everything
    assert everything.count(hidden) == 1, "only where the lake says that it has carried out this erasure"
    assert b"bob" in letters.read_bytes() and sorted(table(lake)["event_id"]) == ["e2"]


def test_user_ids_can_be_hidden_in_the_lake(log, lake, run):
    log.append([event(1, "ann", session_id="ann's phone"), shown("r1", "ann", ["i"]), event(2, PSEUDONYM + user_key("ann").hex())])
    run(config=CompactConfig(pseudonyms=True))
    assert set(table(lake)["user_id"]) == {PSEUDONYM + user_key("ann").hex()} == set(table(lake, "impressions")["user_id"])
    assert b"ann" not in all_text(Path(lake))
    log.append([erase("ann", NOW + 1)])
    run()
    assert len(table(lake)) == 0 or set(table(lake)["user_id"]) == set()


def test_retention_drops_what_the_lake_has(log, place, lake, run):
    log.append([event(n) for n in range(10)])
    log.close()
    reader = open_log(place("log"))
    reader.commit("learner", reader.read(limit=0)[1])
    report = run(retention=Retention(max_bytes=0))
    assert report["segments dropped"] == 0 and report["segments held"] == {"learner": 1}
    reader.remove_consumer("learner")
    assert run(retention=Retention(max_bytes=0))["segments dropped"] == 1
    assert len(table(lake)) == 10 and reader.segments() == []


def test_impressions_wait_for_their_window_and_are_labelled_once(log, lake, run):
    log.append([shown("r1", "u", ["a", "b", "c"]), event(1, item="b", at=NOW + 60, recommendation_id="r1")])
    assert run(clock=lambda: NOW + 0.5 * DAY)["labelled"] == 0
    log.append([event(2, item="b", at=NOW + 0.9 * DAY, event="purchase", recommendation_id="r1"), event(3, item="c", at=NOW + 2 * DAY)])
    assert run(clock=lambda: NOW + 1.5 * DAY)["labelled"] == 3
    assert run(clock=lambda: NOW + 9 * DAY)["labelled"] == 0
    rows = table(lake, "examples").sort("position").to_dicts()
    assert [(row["item_id"], row["label"], row["event"]) for row in rows] == [("a", 0, None), ("b", 1, "purchase"), ("c", 0, None)]
    assert rows[1]["delay_s"] == 60 and rows[0]["propensity"] == 1.0 and rows[0]["model_version"] == "b-1" and rows[0]["score"] == 1.0


def test_feedback_finds_its_impression_by_name_or_as_the_last_one_before_it():
    log = [
        shown("r1", "u", ["a", "b"], 100.0),
        shown("r2", "u", ["a", "b"], 200.0),
        shown("r3", "v", ["a"], 150.0),
        event(1, "u", "a", 250.0),  # names nothing: r2, the last before it
        event(2, "u", "b", 250.0, recommendation_id="r1"),
        event(3, "v", "a", 140.0),  # before it was shown
        event(4, "w", "a", 160.0),  # to whom it was not shown
        event(5, "u", "b", 260.0, recommendation_id="r2", event="rating", value=2.0),
    ]
    found = {(row["recommendation_id"], row["item_id"]): row for row in label(impressions(log), interactions(log), 1000.0).to_dicts()}
    labels = {key: row["label"] for key, row in found.items()}
    assert labels == {("r1", "a"): 0, ("r1", "b"): 1, ("r2", "a"): 1, ("r2", "b"): 0, ("r3", "a"): 0}
    assert found["r2", "b"]["event"] == "rating" and found["r2", "b"]["value"] == 2.0, "a bad rating is feedback, not a positive"
    assert found["r2", "a"]["delay_s"] == 50.0
    assert label(impressions(log), interactions(log), 40.0)["label"].sum() == 0, "outside the window"
    assert label(impressions(log), interactions([]), 40.0)["label"].to_list() == [0] * 5


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
