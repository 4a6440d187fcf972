"""What only the log in files can break: torn tails, damage, half-written batches."""

import os
import time

import pytest

from raysys import storage
from raysys.errors import StateError
from raysys.events import embedded_log, frames
from raysys.events.embedded_log import EmbeddedLog
from raysys.events.identity import user_key


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / "events")


def event(n: int) -> dict:
    return {"kind": "event", "event_id": str(n), "user_id": f"u{n}", "received": 1.0}


def ids(folder: str) -> list[str]:
    return [record["event_id"] for record in EmbeddedLog(folder).read()[0] if record["kind"] == "event"]


def change(path: str, at: int, new: bytes) -> None:
    content = open(path, "rb").read()
    with open(path, "wb") as file:
        file.write(content[:at] + new + content[at + len(new) :])


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_tail_is_not_read_and_is_cut_at_the_next_open(folder, damage):
    log = EmbeddedLog(folder, writable=True)
    intact = log.append([event(n) for n in range(3)]).stop
    log.append([event(3)])
    log.close()
    path = os.path.join(folder, log.segments()[0])
    content = open(path, "rb").read()
    changed = content[:-4] if damage == "cut" else content[:-4] + bytes([content[-4] ^ 1]) + content[-3:]
    with open(path, "wb") as file:
        file.write(changed)
    assert ids(folder) == ["0", "1", "2"]
    assert os.path.getsize(path) == len(changed), "a reader changes nothing"
    again = EmbeddedLog(folder, writable=True)
    assert os.path.getsize(path) == intact
    again.append([event(4)])
    assert ids(folder) == ["0", "1", "2", "4"]


@pytest.mark.parametrize("place", ["payload", "length"])
def test_damage_in_the_middle_costs_only_what_it_hit(folder, place):
    log = EmbeddedLog(folder, writable=True)
    spans = [log.append([event(n)]) for n in range(5)]
    log.close()
    path = os.path.join(folder, spans[0].segment)
    change(path, spans[2].start + (12 if place == "payload" else 0), b"\xff\xff\xff")
    reader = EmbeddedLog(folder)
    assert [record["event_id"] for record in reader.read()[0]] == ["0", "1", "3", "4"] and reader.damaged == 1
    EmbeddedLog(folder, writable=True)
    assert ids(folder) == ["0", "1", "3", "4"], "opening for writing cuts torn tails, not what follows damage"


def test_blocks_that_end_inside_a_record_are_read_on(folder, monkeypatch):
    log = EmbeddedLog(folder, writable=True)
    log.append([event(n) for n in range(200)])
    monkeypatch.setattr(embedded_log, "BLOCK_BYTES", 101)
    assert ids(folder) == [str(n) for n in range(200)]


def test_a_living_writer_is_left_alone(folder):
    log = EmbeddedLog(folder, writable=True)
    log.append([event(0)])
    path = os.path.join(folder, log.segments()[0])
    with open(path, "ab") as file:
        file.write(b"half a rec")  # what a write under way looks like
    EmbeddedLog(folder, writable=True)
    assert open(path, "rb").read().endswith(b"half a rec")
    with pytest.raises(StateError, match="nobody writes to"):
        EmbeddedLog(folder).drop(log.segments()[0])


def test_nothing_is_acknowledged_before_it_is_flushed(folder, monkeypatch):
    log = EmbeddedLog(folder, writable=True)
    log.append([event(0)])
    flushed = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (flushed.append(os.fstat(descriptor).st_size), fsync(descriptor)))
    stop = log.append([event(1)]).stop
    assert flushed == [stop], "one flush, after all bytes of the batch"


def test_a_refused_write_leaves_nothing_behind(folder, monkeypatch):
    log = EmbeddedLog(folder, writable=True)
    log.append([event(0)])

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StateError, match="nothing of this batch was accepted"):
            log.append([event(1)])
    log.append([event(2)])
    assert ids(folder) == ["0", "2"]


def test_a_crash_while_erased_records_are_overwritten_is_finished_at_the_next_open(folder):
    log = EmbeddedLog(folder, writable=True)
    spans = [log.append([event(n)]) for n in range(5)]
    log.close()
    path = os.path.join(folder, spans[0].segment)
    size = spans[4].stop - spans[4].start
    storage.write_json(os.path.join(folder, embedded_log.OVERWRITING), [[spans[0].segment, spans[4].start, size]])
    change(path, spans[4].start, frames.filler(size)[:20])  # the crash came after 20 bytes: a torn frame, and it is the last
    again = EmbeddedLog(folder, writable=True)
    assert os.path.getsize(path) == spans[4].stop, "not taken for a torn tail"
    assert ids(folder) == ["0", "1", "2", "3"]
    assert not os.path.exists(os.path.join(folder, embedded_log.OVERWRITING))
    again.append([event(6)])
    assert ids(folder)[-1] == "6"


def test_a_torn_tombstone_was_never_answered_and_spoils_no_other(folder):
    log = EmbeddedLog(folder, writable=True)
    log.append([{"kind": "erase", "user_key": user_key("a").hex(), "at": 1.0}])
    with open(os.path.join(folder, embedded_log.TOMBSTONES), "ab") as file:
        file.write(b'{"user_key": "ab')
    log.append([{"kind": "erase", "user_key": user_key("b").hex(), "at": 2.0}])
    assert dict(EmbeddedLog(folder).tombstones()) == {user_key("a"): 1.0, user_key("b"): 2.0}


def test_whole_segments_are_looked_through_once(folder, monkeypatch):
    log = EmbeddedLog(folder, writable=True, segment_bytes=200)
    for n in range(20):
        log.append([event(n)])
    log.close()
    EmbeddedLog(folder, writable=True)

    def never(content):
        raise AssertionError("read again")

    monkeypatch.setattr(frames, "intact_end", never)
    EmbeddedLog(folder, writable=True)


def test_segments_end_with_age_too(folder):
    log = EmbeddedLog(folder, writable=True, segment_age_s=0.001)
    for n in range(3):
        log.append([event(n)])
        time.sleep(0.003)
    assert len(log.segments()) == 3
