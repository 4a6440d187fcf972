"""From records of the event log to histories with new events at their end, and back into a bundle.

Only this part of the learner sees user ids; what leaves it is keyed by hash.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysys.bundle import HISTORY_SCHEMA, Bundle, Histories
from raysys.events.identity import user_key
from raysys.events.log import EventLog, Record
from raysys.prepare.dataset import Sequences
from raysys.schema import DEFAULT_EVENT, NON_HISTORY_EVENTS, SPLIT_TRAIN

READ_AT_ONCE = 10_000
"""Records read from the log in one call."""
Event = tuple[int, int, int, float]
"""Item row, event code, time, value (NaN for none)."""


@dataclass(frozen=True)
class Fresh:
    """What the log holds beyond a bundle, for the users concerned (U of them, E events).

    Attributes:
        sequences: their histories as the bundle has them, and the new events, in time order.
        arrival: (E,) int64 place of a new event among all new ones in time order; -1 for events that the bundle has.
        keys: U user keys.
        erased: users to forget; a key that is also in `keys` came back after its erasure.
        offset: of the log, after the last record read.
        num_records: records read, of all kinds.
        num_skipped: events left out: unknown items, duplicates.
        oldest: when the service took in the first of the new usable events, UTC epoch seconds; None without any that say so.
        new_items: item id -> attributes of items upserted since that the bundle has no row for, in the order of their rows:
            the first one is row N of the bundle's items.
    """

    sequences: Sequences
    arrival: np.ndarray
    keys: list[bytes]
    erased: frozenset[bytes]
    offset: str
    num_records: int
    num_skipped: int
    oldest: float | None = None
    new_items: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def num_events(self) -> int:
        """New usable events."""
        return int((self.arrival >= 0).sum())


def read_fresh(
    log: EventLog, bundle: Bundle, after: str | None, *, max_events: int, pending: Mapping[str, dict[str, Any]] | None = None
) -> Fresh:
    """Read on from an offset until the log ends or enough usable events were found.

    Args:
        log: open for reading.
        bundle: whose items, event codes and histories count.
        after: offset of the last record that is already learnt.
        max_events: stop once so many events are there.
        pending: new items that an earlier read found and nobody has published.
    """
    gathered: dict[str, list[Record]] = defaultdict(list)  # user id -> events
    new_items = dict(pending or {})
    # Not from the records alone: a version that a rollback went back to may be older than what retention has left of the log.
    created = datetime.fromisoformat(bundle.manifest["created"]).timestamp()
    erased = {key for key, at in log.tombstones().items() if at >= created}
    seen_ids: set[str] = set()
    num_records = num_events = num_skipped = 0
    offset = after
    while num_events < max_events:
        records, offset = log.read(offset, READ_AT_ONCE)
        if not records:
            break
        num_records += len(records)
        for record in records:
            if record.get("kind") == "erase":
                key = bytes.fromhex(record["user_key"])
                erased.add(key)
                for user_id in [user_id for user_id in gathered if user_key(user_id) == key]:
                    num_events -= len(gathered.pop(user_id))
            elif record.get("kind") == "event" and record.get("event", DEFAULT_EVENT) not in NON_HISTORY_EVENTS:
                event_id = record.get("event_id")
                if event_id is not None and event_id in seen_ids:
                    num_skipped += 1  # a retry that raced with itself is in the log twice
                    continue
                if event_id is not None:
                    seen_ids.add(event_id)
                gathered[record["user_id"]].append(record)
                num_events += 1
            elif record.get("kind") in ("item", "item_delete") and record["item_id"] not in bundle.item_index:
                _change(new_items, record)
    assert offset is not None  # a read gives one, and there was at least one read
    # Only now: an item may be told of after the first event on it.
    rows = {item_id: bundle.items.num_rows + place for place, item_id in enumerate(new_items)}
    usable: dict[str, list[Event]] = {}
    received: list[float] = []
    for user_id, records in gathered.items():
        found = [(record, event) for record in records if (event := _usable(record, bundle, rows)) is not None]
        num_skipped += len(records) - len(found)
        if found:
            usable[user_id] = [event for _, event in found]
            received += [record["received"] for record, _ in found if "received" in record]
    sequences, arrival, keys = _joined(usable, erased, bundle)
    oldest = min(received, default=None)
    return Fresh(sequences, arrival, keys, frozenset(erased), offset, num_records, num_skipped, oldest, new_items)


def _change(items: dict[str, dict[str, Any]], record: Record) -> None:
    item_id = record["item_id"]
    if record["kind"] == "item_delete":
        items.pop(item_id, None)
        return
    before = {} if record.get("replace", True) else items.get(item_id, {})
    items[item_id] = {**before, **record["attributes"]}


def _usable(record: Record, bundle: Bundle, rows: Mapping[str, int]) -> Event | None:
    item = bundle.item_index.get(record["item_id"], rows.get(record["item_id"]))
    if item is None:
        return None
    value = record.get("value")
    code = bundle.event_codes.get(record.get("event", DEFAULT_EVENT), 0)
    return item, code, int(record["timestamp"]), np.nan if value is None else float(value)


def _joined(
    gathered: dict[str, list[Event]],
    erased: set[bytes],
    bundle: Bundle,
) -> tuple[Sequences, np.ndarray, list[bytes]]:
    keys, columns, lengths = [], [], []
    for user_id, events in gathered.items():
        key = user_key(user_id)
        known = None if key in erased else bundle.histories.lookup(user_id)
        # Whole numbers of this size are exact in float64.
        old = np.zeros((5, 0)) if known is None else np.stack([*known, np.zeros(len(known[0]))]).astype(np.float64)
        new = np.array([(*event, 1) for event in events], np.float64).T
        both = np.concatenate([old, new], axis=1)
        columns.append(both[:, np.argsort(both[2], kind="stable")])
        keys.append(key)
        lengths.append(both.shape[1])
    items, codes, times, values, is_new = np.concatenate([*columns, np.zeros((5, 0))], axis=1)
    arrival = np.full(len(items), -1, np.int64)
    new_positions = np.flatnonzero(is_new)
    arrival[new_positions[np.argsort(times[new_positions], kind="stable")]] = np.arange(len(new_positions))
    sequences = flat_sequences(items, codes, times, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), values=values)
    return sequences, arrival, keys


def flat_sequences(
    items: np.ndarray, events: np.ndarray, times: np.ndarray, indptr: np.ndarray, *, values: np.ndarray | None = None
) -> Sequences:
    """Sequences of training events, for models that update; without `values` none has one."""
    count = len(items)
    return Sequences(
        np.arange(len(indptr) - 1, dtype=np.int32),
        indptr,
        items.astype(np.int32),
        events.astype(np.int8),
        times.astype(np.int64),
        np.full(count, np.nan, np.float32) if values is None else values.astype(np.float32),
        np.zeros(count, bool),
        np.full(count, SPLIT_TRAIN, np.int8),
    )


def sampled_histories(
    histories: Histories, without: Sequence[bytes], count: int, rng: np.random.Generator, *, since: int | None = None
) -> Sequences:
    """Histories of random users that the bundle knows, as sequences.

    Args:
        histories: of the bundle.
        without: keys of users to leave out.
        count: users at most.
        rng: of the sample.
        since: only users whose last event has this time or a later one; None for all.
    """
    others = histories.table.filter(pc.invert(_among(histories, without)))
    if since is not None:
        ends = np.cumsum(pc.list_value_length(others["timestamp"]).to_numpy())
        others = others.filter(pa.array(pc.list_flatten(others["timestamp"]).to_numpy()[ends - 1] >= since))
    chosen = np.sort(rng.choice(len(others), min(count, len(others)), replace=False))
    table = others.take(chosen).combine_chunks()
    lengths = pc.list_value_length(table["item_idx"]).to_numpy().astype(np.int64)
    items, events, times, values = (pc.list_flatten(table[name]).to_numpy() for name in HISTORY_SCHEMA.names[1:])
    return flat_sequences(items, events, times, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), values=values)


def learnable_since(sequences: Sequences, since: int) -> Sequences:
    """The events from a time on, and the one before them of each user: all that a model needs to learn what followed what since then."""
    late = sequences.times >= since
    before_late = np.append(late[1:] & (sequences.rows[1:] == sequences.rows[:-1]), False)
    return sequences.where(late | before_late)


def merged_histories(histories: Histories, fresh: Fresh) -> Histories:
    """The bundle's histories with the new events in them and the erased users gone."""
    kept = histories.table.filter(pc.invert(_among(histories, [*fresh.keys, *fresh.erased])))
    indptr, sequences = fresh.sequences.indptr, fresh.sequences
    starts = np.maximum(indptr[:-1], indptr[1:] - histories.max_events)
    cuts = [slice(start, stop) for start, stop in zip(starts, indptr[1:], strict=True)]
    columns = [
        fresh.keys,
        *([array[cut] for cut in cuts] for array in (sequences.items, sequences.events, sequences.times, sequences.values)),
    ]
    return Histories(pa.concat_tables([kept, pa.table(columns, schema=HISTORY_SCHEMA)]).combine_chunks(), histories.max_events)


def _among(histories: Histories, keys: Sequence[bytes]) -> pa.ChunkedArray:
    return pc.is_in(histories.table["user_key"], value_set=pa.array(list(keys), HISTORY_SCHEMA.field("user_key").type))
