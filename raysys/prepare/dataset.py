"""The prepared set on disk, and in memory as flat arrays. No Ray here.

prepared/
  manifest.json            counts, split, time unit, event types, fingerprint, files
  items.parquet            item_idx, item_id, num_train, title, text, categories, available, created_at, ...
  users.parquet            user_idx, user_id, ...
  sequences/part-*.parquet one row a user, lists in time order (SEQUENCE_COLUMNS)
  quarantine/*.parquet     refused rows and why
  raw/part-*.parquet       the same events before split and encoding, for `prepare --append`; absent with keep_raw: false
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from raysys import storage
from raysys.errors import SchemaError
from raysys.queries import Queries
from raysys.schema import SPLIT_CODES, SPLIT_TRAIN, UNKNOWN_ITEM

FORMAT = "raysys-prepared/1"
MANIFEST, ITEMS, USERS, SEQUENCES = "manifest.json", "items.parquet", "users.parquet", "sequences"
QUARANTINE, RAW = "quarantine", "raw"

SEQUENCE_SCHEMA = pa.schema(
    [
        ("user_idx", pa.int32()),
        ("item_idx", pa.list_(pa.int32())),  # UNKNOWN_ITEM where the training window does not know the item
        ("event", pa.list_(pa.int8())),  # index into manifest["events"]; 0 is OTHER_EVENT
        ("timestamp", pa.list_(pa.int64())),  # UTC epoch seconds, or an ordinal where manifest["time"] == "ordinal"
        ("value", pa.list_(pa.float32())),  # NaN where the event has no value
        ("positive", pa.list_(pa.bool_())),  # a positive target by the event configuration
        ("split", pa.list_(pa.int8())),  # SPLIT_CODES
    ]
)


@dataclass(frozen=True)
class Sequences:
    """Histories of U users with E events in all, flat; each user's events in time order.

    Attributes:
        user_idx: (U,) int32.
        indptr: (U+1,) int64.
        items: (E,) int32, UNKNOWN_ITEM possible outside the training part.
        events: (E,) int8. times: (E,) int64. values: (E,) float32 (NaN = none).
        positive: (E,) bool. split: (E,) int8.
    """

    user_idx: np.ndarray
    indptr: np.ndarray
    items: np.ndarray
    events: np.ndarray
    times: np.ndarray
    values: np.ndarray
    positive: np.ndarray
    split: np.ndarray

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @cached_property
    def rows(self) -> np.ndarray:
        """(E,) int64 the row (not user_idx) each event belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.indptr))

    @property
    def repeats(self) -> float:
        """Share of events whose user had the item before."""
        known = self.items != UNKNOWN_ITEM
        pairs = self.rows[known] * (int(self.items.max(initial=0)) + 1) + self.items[known]
        return 1.0 - len(np.unique(pairs)) / len(pairs) if len(pairs) else 0.0

    def where(self, keep: np.ndarray) -> "Sequences":
        """The events selected by an (E,) bool mask; users stay, also when left without events."""
        counts = np.bincount(self.rows[keep], minlength=len(self))
        return Sequences(
            self.user_idx,
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            *(getattr(self, name)[keep] for name in ("items", "events", "times", "values", "positive", "split")),
        )

    def upto(self, part: str) -> "Sequences":
        """Events of a part and of all earlier parts: `upto("valid")` is train + valid."""
        return self.where(self.split <= SPLIT_CODES[part])

    def train(self) -> "Sequences":
        """The training events with a known item (all of them, by construction)."""
        return self.where((self.split == SPLIT_TRAIN) & (self.items != UNKNOWN_ITEM))

    def last_positions(self, *, min_history: int = 1) -> np.ndarray:
        """Flat positions of each user's last event that has at least `min_history` events before it."""
        long_enough = np.diff(self.indptr) > min_history
        return self.indptr[1:][long_enough] - 1

    def target_positions(self, part: str) -> np.ndarray:
        """Flat positions of the events of a part, the targets of its evaluation."""
        return np.flatnonzero(self.split == SPLIT_CODES[part])

    def queries_before(self, positions: np.ndarray, *, max_events: int | None = None) -> Queries:
        """For each flat position, the same user's known-item events strictly before it.

        Args:
            positions: (B,) int64 flat positions.
            max_events: keep only that many last events of each history.
        """
        known = self.items != UNKNOWN_ITEM
        known_before = np.concatenate([[0], np.cumsum(known)])  # (E+1,)
        starts = known_before[self.indptr[self.rows[positions]]]
        stops = known_before[positions]
        if max_events is not None:
            starts = np.maximum(starts, stops - max_events)
        lengths = stops - starts
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        take = np.flatnonzero(known)[np.arange(indptr[-1]) - np.repeat(indptr[:-1] - starts, lengths)]
        return Queries(self.items[take], self.events[take], self.times[take], self.values[take], indptr, self.times[positions])

    def queries(self) -> Queries:
        """Every user's whole history as queries asked right after the last event (time of that event)."""
        known = self.where(self.items != UNKNOWN_ITEM)
        last = np.maximum(known.indptr[1:] - 1, 0)
        now = known.times[last] if len(known.times) else np.zeros(len(known), np.int64)
        return Queries(known.items, known.events, known.times, known.values, known.indptr, now)


@dataclass(frozen=True)
class Prepared:
    """A prepared set: where it is and what its manifest says; tables are read on demand."""

    uri: str
    manifest: dict

    @classmethod
    def open(cls, uri: str) -> "Prepared":
        """Read the manifest.

        Raises:
            SchemaError: the folder is not a prepared set of this format.
        """
        path = storage.join(uri, MANIFEST)
        if not storage.exists(path):
            raise SchemaError(f"{uri}: expected a prepared set with {MANIFEST}, found none; run `raysys prepare --data DIR --out {uri}`")
        manifest = storage.read_json(path)
        if manifest.get("format") != FORMAT:
            raise SchemaError(f"{uri}: expected format {FORMAT}, found {manifest.get('format')!r}; run `raysys prepare` again")
        return cls(uri, manifest)

    @property
    def num_items(self) -> int:
        """N, rows of the item vocabulary."""
        return self.manifest["counts"]["items"]

    @property
    def events(self) -> list[str]:
        """Event names by code; code 0 is OTHER_EVENT."""
        return self.manifest["events"]

    @property
    def ordinal_time(self) -> bool:
        """True when timestamps carry order only; decay and gap features must then stay off."""
        return self.manifest["time"] == "ordinal"

    def items(self) -> pa.Table:
        """The item table, row i = item_idx i."""
        return storage.read_table(storage.join(self.uri, ITEMS))

    def users(self) -> pa.Table:
        """The user table, row u = user_idx u."""
        return storage.read_table(storage.join(self.uri, USERS))

    def sequences(self) -> Sequences:
        """All sequences in memory, ordered by user_idx."""
        return to_sequences(storage.read_table(storage.join(self.uri, SEQUENCES)).sort_by("user_idx"))


def to_sequences(table: pa.Table) -> Sequences:
    """Rows of SEQUENCE_SCHEMA as flat arrays."""
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    lists = columns["item_idx"]
    lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
    offsets = lists.offsets.to_numpy().astype(np.int64)

    def flat(name: str) -> np.ndarray:
        return columns[name].flatten().to_numpy(zero_copy_only=False)

    return Sequences(
        columns["user_idx"].to_numpy(),
        offsets - offsets[0],
        flat("item_idx"),
        flat("event"),
        flat("timestamp"),
        flat("value"),
        flat("positive").astype(bool),
        flat("split"),
    )
