"""A log of another kind (Kafka, say) implements the abstract part of `EventLog`; state, lake, retention and erasure take it as it is."""

import contextlib

from raysys.events.embedded_state import EmbeddedState
from raysys.events.erasure import erase_record
from raysys.events.log import EventLog, SegmentInfo, Span, is_erased
from raysys.events.retention import Retention
from raysys.events.state import StateLimits
from raysys.events.store import EventStore
from raysys.lake import compact as compaction
from raysys.lake.layout import load, read_files


class PartitionedLog(EventLog):
    """Like a topic: fixed partitions, records by number, in this process only. The writer holds partition 1, somebody else wrote to 0."""

    def __init__(self):
        self.partitions: dict[str, list[dict]] = {"partition-0": [], "partition-1": []}
        self.first = dict.fromkeys(self.partitions, 0)
        self.offsets: dict[str, str] = {}
        self.erasures: dict[bytes, float] = {}

    def append(self, records):
        for record in records:
            if record["kind"] == "erase":
                self.erasures[bytes.fromhex(record["user_key"])] = record["at"]
        start = len(self.partitions["partition-1"])
        self.partitions["partition-1"] += records
        return Span("partition-1", start, start + len(records))

    def segments(self):
        return sorted(self.partitions)

    def read_raw(self, segment, start, limit=None):
        records = self.partitions[segment]
        start = max(start, self.first[segment])
        stop = len(records) if limit is None else min(len(records), start + limit)
        return records[start:stop], max(start, stop)

    def describe(self):
        return [SegmentInfo(name, len(records), 100 * len(records), 1.0, False) for name, records in sorted(self.partitions.items())]

    def drop(self, segment):
        self.first[segment] = len(self.partitions[segment])

    def tombstones(self):
        return self.erasures

    def overwrite_erased(self):
        count = 0
        for records in self.partitions.values():
            for at, record in enumerate(records):
                if record["kind"] != "erased" and is_erased(record, self.erasures):
                    records[at], count = {"kind": "erased"}, count + 1
        return count

    def commit(self, consumer, offset):
        self.offsets[consumer] = offset

    def consumers(self):
        return self.offsets

    def remove_consumer(self, consumer):
        del self.offsets[consumer]

    @contextlib.contextmanager
    def exclusive(self, task):
        yield

    def close(self):
        pass


def event(n: int, user: str) -> dict:
    record = {"kind": "event", "event_id": f"e{n}", "user_id": user, "item_id": f"i{n}", "event": "click"}
    return {**record, "timestamp": 1.7e9 + n, "received": 1.7e9 + n}


def test_state_lake_retention_and_erasure_need_nothing_else(tmp_path, monkeypatch):
    log = PartitionedLog()
    log.partitions["partition-0"] = [event(n, "bob") for n in range(3)]
    store = EventStore(log, EmbeddedState(str(tmp_path / "state"), StateLimits()))
    assert store.replayed == 3
    store.submit([event(3, "ann"), event(0, "bob")]).result()
    assert [entry.item_id for entry in store.state.history("ann")] == ["i3"] and len(store.state.history("bob")) == 3
    store.submit([erase_record("ann", 1.7e9 + 100)]).result()
    store._note_place()

    monkeypatch.setattr(compaction, "open_log", lambda uri: log)
    lake = str(tmp_path / "lake")
    report = compaction.compact(str(tmp_path), lake, retention=Retention(max_bytes=0))
    assert (report["events"], report["duplicates"], report["segments dropped"]) == (3, 1, 2)
    assert sorted(read_files(lake, list(load(lake).of("interactions")))["event_id"]) == ["e0", "e1", "e2"]
    assert "ann" not in repr(log.partitions) and log.read()[0] == []
    store.close()
