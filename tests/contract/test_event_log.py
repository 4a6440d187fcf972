"""What every event log promises, against each implementation; the lines for one only say so."""

import subprocess
import sys
import threading

import pytest

from raysys.errors import ConfigError, StateError
from raysys.events.embedded_log import EmbeddedLog
from raysys.events.identity import user_key
from raysys.events.log import open_log
from raysys.events.redis_log import RedisLog
from raysys.events.retention import Retention, retain


def event(n: int, user: str | None = None, received: float | None = None) -> dict:
    record = {"kind": "event", "event_id": str(n), "user_id": user or f"u{n}", "value": n / 3, "title": "Amélie \N{SNOWMAN}"}
    return record if received is None else {**record, "received": received}


def erase(user: str, at: float) -> dict:
    return {"kind": "erase", "user_key": user_key(user).hex(), "at": at}


def ids(log, after=None) -> list[str]:
    return [record["event_id"] for record in log.read(after, limit=10**9)[0] if record["kind"] == "event"]


def writer(location: str, **small):
    """A log whose segments end soon, where asked."""
    if not small:
        return open_log(location, writable=True)
    if location.startswith("redis"):
        return RedisLog(location, writable=True, segment_records=small["records"])
    return EmbeddedLog(location, writable=True, segment_bytes=small["records"] * 100)


def test_records_come_back_in_order_and_from_any_offset(place):
    log = writer(place("log"))
    for first in range(0, 100, 10):
        log.append([event(n) for n in range(first, first + 10)])
    records, offset = log.read(None, limit=37)
    assert records == [event(n) for n in range(37)]
    more, offset = log.read(offset, limit=1000)
    assert more == [event(n) for n in range(37, 100)]
    assert log.read(offset)[0] == []
    log.append([event(100)])
    assert open_log(place("log")).read(offset)[0] == [event(100)]


def test_positions_of_a_segment_say_what_is_before_them(place):
    log = writer(place("log"))
    spans = [log.append([event(2 * n), event(2 * n + 1)]) for n in range(5)]
    assert spans[0].start == 0 and [span.start for span in spans[1:]] == [span.stop for span in spans[:-1]]
    for n, span in enumerate(spans):
        assert log.read_segment(span.segment, span.start, 2) == ([event(2 * n), event(2 * n + 1)], span.stop)
    assert log.read_segment("seg-nothing-there.log", 0) == ([], 0)


def test_segments_roll_and_are_read_across(place):
    log = writer(place("log"), records=5)
    for n in range(50):
        log.append([event(n)])
    assert len(log.segments()) > 5
    assert ids(log) == [str(n) for n in range(50)]
    assert [info.name for info in log.describe()] == log.segments()
    assert all(info.num_bytes > 0 and info.stop > 0 and info.written > 1e9 for info in log.describe())


def test_threads_of_a_process_do_not_mix_their_records(place):
    log = writer(place("log"))

    def write(worker: int) -> None:
        for n in range(20):
            log.append([{"kind": "test", "worker": worker, "n": n, "part": part} for part in range(3)])

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


def test_many_writers_each_have_a_segment(place):
    logs = [writer(place("log")) for _ in range(3)]
    for n in range(30):
        logs[n % 3].append([event(n)])
    assert len(logs[0].segments()) == 3 and sorted(map(int, ids(logs[1]))) == list(range(30))


def test_named_consumers_go_on_where_they_were(place):
    log = writer(place("log"))
    log.append([event(n) for n in range(10)])
    _, at_four = log.read(limit=4)
    _, at_end = log.read()
    log.commit("learner", at_four)
    log.commit("lake", at_end)
    again = open_log(place("log"))
    assert ids(again, again.committed("learner")) == [str(n) for n in range(4, 10)]
    assert ids(again, again.committed("lake")) == [] and again.committed("nobody") is None
    log.commit("learner", at_end)
    assert again.consumers() == {"learner": at_end, "lake": at_end}
    again.remove_consumer("lake")
    assert list(log.consumers()) == ["learner"]
    with pytest.raises(StateError, match="consumer name"):
        log.commit("../outside", at_end)


def test_retention_waits_for_the_slowest_consumer_unless_it_is_forced(place):
    log = writer(place("log"), records=5)
    for n in range(50):
        log.append([event(n)])
    log.close()
    log = open_log(place("log"))
    _, middle = log.read(limit=25)
    log.commit("slow", middle)
    log.commit("fast", log.read(limit=1000)[1])
    before = log.segments()
    held = retain(log, Retention(max_bytes=0), now=1e10)
    assert 0 < held.segments < len(before) and held.held == {"slow": len(log.segments())} and held.unread == {}
    assert ids(log, middle) == [str(n) for n in range(25, 50)], "what the slow consumer has not read is there"
    forced = retain(log, Retention(max_bytes=0, force=True), now=1e10)
    assert log.segments() == [] and forced.unread == {"slow": 25} and forced.num_bytes > 0
    assert log.read(middle)[0] == []


def test_retention_goes_by_age_and_by_size(place):
    log = writer(place("log"), records=5)
    for n in range(50):
        log.append([event(n)])
    log.close()
    log = open_log(place("log"))
    infos = log.describe()
    newest = max(info.written for info in infos)
    assert retain(log, Retention(), now=1e10).segments == 0
    assert retain(log, Retention(max_age_s=60), now=newest + 30).segments == 0
    kept_bytes = sum(info.num_bytes for info in infos[-3:])
    retain(log, Retention(max_bytes=kept_bytes), now=newest)
    assert [info.name for info in log.describe()] == [info.name for info in infos[-3:]]
    retain(log, Retention(max_age_s=60), now=newest + 61)
    assert log.segments() == []


def test_what_an_erased_user_did_is_never_read_again(place):
    log, other = writer(place("log")), writer(place("log"))
    log.append([event(1, "ann", 10.0), event(2, "bob", 10.0), event(3, "ann", 11.0)])
    other.append([event(4, "ann", 11.5)])
    reader = open_log(place("log"))
    assert sorted(ids(reader)) == ["1", "2", "3", "4"]
    log.append([erase("ann", 12.0)])
    other.append([event(5, "ann", 11.9), event(6, "ann", 13.0)])  # one was under way, one came after
    assert sorted(ids(reader)) == ["2", "6"]
    assert [record["user_key"] for record in reader.read()[0] if record["kind"] == "erase"] == [user_key("ann").hex()]
    assert dict(reader.tombstones()) == {user_key("ann"): 12.0}
    log.append([erase("ann", 14.0)])
    assert sorted(ids(reader)) == ["2"]


def test_erased_records_are_overwritten_and_positions_stay(place):
    log = writer(place("log"))
    log.append([event(n, "the secret name" if n % 3 == 0 else None, 10.0) for n in range(30)])
    _, middle = log.read(limit=10)
    log.append([erase("the secret name", 12.0)])
    assert log.overwrite_erased() == 10 and log.overwrite_erased() == 0
    log.append([event(30, received=13.0)])
    again = open_log(place("log"), writable=True)
    kept = [str(n) for n in range(31) if n % 3]
    assert ids(again) == [*kept, "30"]
    assert ids(again, middle) == [n for n in [*kept, "30"] if int(n) >= 10]
    raw = [record for segment in again.segments() for record in again.read_raw(segment, 0)[0]]
    assert "secret" not in repr(raw)
    offset = again.read()[1]
    log.append([erase("u30", 20.0)])
    again.overwrite_erased()
    later = open_log(place("log")).read(offset)
    assert [record["kind"] for record in later[0]] == ["erase"], "an offset behind overwritten records is still good"


def test_a_read_of_nothing_but_erased_records_is_not_the_end(place):
    log = writer(place("log"))
    log.append([event(n, "ann", 10.0) for n in range(50)])
    log.append([erase("ann", 11.0), event(50, received=12.0)])
    records, offset = log.read(limit=5)
    assert records and (ids(log) == ["50"])
    seen = [record.get("event_id") for record in records]
    while records:
        records, offset = log.read(offset, limit=5)
        seen += [record.get("event_id") for record in records]
    assert seen[-1] == "50"


def test_one_task_at_a_time(place):
    log, other = open_log(place("log")), open_log(place("log"))
    with log.exclusive("compact"):
        with pytest.raises(StateError, match="another process"), other.exclusive("compact"):
            pass
        with other.exclusive("something-else"):
            pass
    with other.exclusive("compact"):
        pass


def test_readers_do_not_write_and_wrong_offsets_are_refused(place):
    with pytest.raises(StateError, match="opened for reading"):
        open_log(place("log")).append([event(0)])
    with pytest.raises(StateError, match="offset"):
        open_log(place("log")).read("not-an-offset")


def test_another_process_reads_what_was_acknowledged(place):
    log = writer(place("log"))
    log.append([event(n) for n in range(7)])
    code = "import sys; from raysys.events.log import open_log; print(len(open_log(sys.argv[1]).read()[0]))"
    out = subprocess.run([sys.executable, "-c", code, place("log")], capture_output=True, text=True, check=True).stdout
    assert int(out) == 7


def test_wrong_places_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="local folder .* or redis://"):
        open_log("kafka://localhost:9092/topic")
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="writable folder"):
        EmbeddedLog(str(tmp_path / "file" / "events"), writable=True)
    with pytest.raises(ConfigError, match="durability"):
        open_log("redis://localhost:1/0?durability=never")
    with pytest.raises(StateError, match="events at redis://127.0.0.1:1/0") as refused:
        open_log("redis://:my-password@127.0.0.1:1/0")
    assert "my-password" not in str(refused.value)
