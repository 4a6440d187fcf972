"""What every event log promises, against each implementation (one so far)."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from raysys.errors import ConfigError, StateError
from raysys.events.embedded_log import EmbeddedLog
from raysys.events.log import open_log

WRITER = """
import sys
from raysys.events.embedded_log import EmbeddedLog
log, name, at = EmbeddedLog(sys.argv[1], writable=True), sys.argv[2], 0
while True:
    log.append([{"kind": "event", "event_id": f"{name}-{at + n}", "filler": "x" * (37 * n)} for n in range(5)])
    at += 5
    print(at, flush=True)
"""


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / "events")


def event(n: int) -> dict:
    return {"kind": "event", "event_id": str(n), "user_id": f"u{n}", "value": n / 3, "title": "Amélie \N{SNOWMAN}"}


def test_records_come_back_in_order_and_from_any_offset(folder):
    log = EmbeddedLog(folder, writable=True)
    for first in range(0, 100, 10):
        log.append([event(n) for n in range(first, first + 10)])
    records, offset = log.read(None, limit=37)
    assert records == [event(n) for n in range(37)]
    more, offset = log.read(offset, limit=1000)
    assert more == [event(n) for n in range(37, 100)]
    assert log.read(offset)[0] == []
    log.append([event(100)])
    assert open_log(folder).read(offset)[0] == [event(100)]


def test_segments_roll_and_are_read_across(folder):
    log = EmbeddedLog(folder, writable=True, segment_bytes=500)
    for n in range(50):
        log.append([event(n)])
        time.sleep(0.002)  # segment names carry milliseconds
    assert len(log.segments()) > 5
    assert [record["event_id"] for record in log.read()[0]] == [str(n) for n in range(50)]


def test_threads_of_a_process_do_not_mix_their_records(folder):
    log = EmbeddedLog(folder, writable=True)

    def write(worker: int) -> None:
        for n in range(20):
            log.append([{"worker": worker, "n": n, "part": part} for part in range(3)])

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = log.read()[0]
    assert len(records) == 240
    for worker in range(4):
        mine = [(record["n"], record["part"]) for record in records if record["worker"] == worker]
        assert mine == [(n, part) for n in range(20) for part in range(3)]


def test_kill_9_of_two_writers_twenty_times_loses_nothing_acknowledged(folder):
    rng = random.Random(0)
    acknowledged: dict[str, int] = {}
    for kill in range(10):
        names = [f"w{kill}-{writer}" for writer in range(2)]
        processes = [subprocess.Popen([sys.executable, "-c", WRITER, folder, name], stdout=subprocess.PIPE, text=True) for name in names]
        for process in processes:
            process.stdout.readline()  # it has begun
        time.sleep(rng.uniform(0.0, 0.05))
        for name, process in zip(names, processes, strict=True):
            os.kill(process.pid, signal.SIGKILL)
            rest = process.stdout.read().split()
            process.wait()
            acknowledged[name] = max([5, *(int(line) for line in rest)])
    log = EmbeddedLog(folder, writable=True)  # opens after every crash, and cuts torn tails
    ids = [record["event_id"] for record in log.read(limit=10**9)[0]]
    assert len(ids) == len(set(ids))
    for name, count in acknowledged.items():
        assert {f"{name}-{n}" for n in range(count)} <= set(ids), name
    log.append([event(0)])
    assert log.read(limit=10**9)[0][-1] == event(0)


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_tail_is_not_read_and_is_cut_at_the_next_open(folder, damage):
    log = EmbeddedLog(folder, writable=True)
    log.append([event(n) for n in range(3)])
    intact = os.path.getsize(os.path.join(folder, log.segments()[0]))
    log.append([event(3)])
    log.close()
    path = os.path.join(folder, log.segments()[0])
    content = open(path, "rb").read()
    changed = content[:-4] if damage == "cut" else content[:-4] + bytes([content[-4] ^ 1]) + content[-3:]
    with open(path, "wb") as file:
        file.write(changed)
    assert EmbeddedLog(folder).read()[0] == [event(n) for n in range(3)]
    assert os.path.getsize(path) == len(changed), "a reader changes nothing"
    again = EmbeddedLog(folder, writable=True)
    assert os.path.getsize(path) == intact
    again.append([event(4)])
    assert [record["event_id"] for record in again.read()[0]] == ["0", "1", "2", "4"]


def test_a_living_writer_is_left_alone(folder):
    log = EmbeddedLog(folder, writable=True)
    log.append([event(0)])
    path = os.path.join(folder, log.segments()[0])
    with open(path, "ab") as file:
        file.write(b"half a rec")  # what a write under way looks like
    EmbeddedLog(folder, writable=True)
    assert open(path, "rb").read().endswith(b"half a rec")


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
    assert [record["event_id"] for record in EmbeddedLog(folder).read()[0]] == ["0", "2"]


def test_wrong_places_and_offsets_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="local folder"):
        open_log("redis://localhost:6379")
    with pytest.raises(StateError, match="opened for reading"):
        EmbeddedLog(folder).append([event(0)])
    with pytest.raises(StateError, match="offset"):
        EmbeddedLog(folder).read("not-an-offset")
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="writable folder"):
        EmbeddedLog(str(tmp_path / "file" / "events"), writable=True)
