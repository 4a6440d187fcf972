"""Whom a batch run answers: the users of a bundle, of a file, or of a prepared set, in fixed parts.

The driver cuts the parts and holds the key of user hashes; a worker turns a
part into keys and histories. No Ray here. Ids go into output files and nowhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from raysys import storage
from raysys.bundle import Bundle
from raysys.errors import SchemaError
from raysys.events.identity import key_id, user_key
from raysys.prepare.dataset import SEQUENCES, Prepared
from raysys.queries import Queries
from raysys.schema import ITEM_ID, ITEM_IDX, NON_HISTORY_EVENTS, UNKNOWN_ITEM, USER_ID, USER_IDX

STRANGER = -1
"""History row of a user whom the bundle does not know."""


@dataclass(frozen=True)
class Part:
    """A share of the users, the content of one output file.

    Attributes:
        index: place among the parts, and number of the output file.
        rows: (U,) int64 rows of the bundle's histories, STRANGER possible; None where a prepared file says who.
        user_ids: U ids that go into the output; None gives the bundle's keyed hashes.
        file: sequences file of the prepared set.
    """

    index: int
    rows: np.ndarray | None = None
    user_ids: list[str] | None = None
    file: str | None = None


@dataclass(frozen=True)
class Users:
    """All parts, and what identifies them.

    Attributes:
        kind: "bundle", "file" or "prepared".
        key: column of the output that names a user: `user_key` (16 bytes, keyed hash) or `user_id`.
        parts: in order.
        identity: what a resumed run compares.
    """

    kind: str
    key: str
    parts: list[Part]
    identity: dict[str, Any] = field(default_factory=dict)


def users_of_bundle(bundle: Bundle, users_per_part: int) -> Users:
    """Every user with a history in the bundle, named by the keyed hash, because a bundle holds no ids."""
    slices = _slices(len(bundle.histories), users_per_part)
    parts = [Part(index, np.arange(first, last)) for index, (first, last) in enumerate(slices)]
    return Users("bundle", "user_key", parts, {"user_key_id": bundle.manifest["user_key_id"]})


def users_of_file(bundle: Bundle, uri: str, users_per_part: int) -> Users:
    """The ids of a Parquet, CSV (column `user_id`) or text file (one a line), in its order, repeats once.

    Raises:
        SchemaError: the file is missing, has no such column or no id, or the bundle was written with another key of user hashes.
    """
    ids = list(dict.fromkeys(_read_ids(uri)))
    if not ids:
        raise SchemaError(f"{uri}: expected user ids, found none")
    if bundle.manifest["user_key_id"] != key_id():
        raise SchemaError(
            f"bundle {bundle.version} was written with user key {bundle.manifest['user_key_id']}, this machine has {key_id()}; "
            "set RAYSYS_USER_KEY to the key of training"
        )
    known = {key: row for row, key in enumerate(bundle.histories.table["user_key"].to_pylist())}
    keys = [user_key(user_id) for user_id in ids]
    rows = np.array([known.get(key, STRANGER) for key in keys], np.int64)
    slices = _slices(len(ids), users_per_part)
    parts = [Part(index, rows[first:last], ids[first:last]) for index, (first, last) in enumerate(slices)]
    return Users("file", USER_ID, parts, {"users": len(ids), "users_sha256": storage.sha256(uri)})


def users_of_prepared(prepared: Prepared) -> Users:
    """Every user of a prepared set with the whole history there, test part included; a part is one of its sequences files."""
    files = [name for name in storage.list_dir(storage.join(prepared.uri, SEQUENCES)) if name.endswith(".parquet")]
    parts = [Part(index, file=storage.join(prepared.uri, SEQUENCES, name)) for index, name in enumerate(files)]
    return Users("prepared", USER_ID, parts, {"fingerprint": prepared.manifest["fingerprint"], "files": files})


class Histories:
    """Parts as keys and queries, in a worker.

    Args:
        bundle: whose item rows and event codes the queries use.
        prepared: the prepared set, when the parts name its files.
    """

    def __init__(self, bundle: Bundle, prepared: Prepared | None):
        self.bundle = bundle
        if prepared is None:
            table = bundle.histories.table
            self.keys = table["user_key"].combine_chunks()
            self.offsets, (self.items, self.events, self.times, self.values) = _flat_lists(table)
            return
        self.user_ids = prepared.users()[USER_ID].combine_chunks()
        item_ids = prepared.items()[ITEM_ID].to_pylist()
        # The last entry is for UNKNOWN_ITEM, which is -1.
        self.rows = np.array([*(bundle.item_index.get(item_id, UNKNOWN_ITEM) for item_id in item_ids), UNKNOWN_ITEM], np.int32)
        self.codes = np.array([bundle.event_codes.get(name, 0) for name in prepared.events], np.int8)
        self.history = np.array([name not in NON_HISTORY_EVENTS for name in prepared.events])

    def load(self, part: Part) -> tuple[pa.Array, Queries]:
        """The (U,) key column and U queries, asked right after each user's last event."""
        if part.file is not None:
            return self._of_file(part.file)
        assert part.rows is not None
        queries = self._of_rows(part.rows)
        return (self.keys.take(pa.array(part.rows)) if part.user_ids is None else pa.array(part.user_ids, pa.string())), queries

    def _of_rows(self, rows: np.ndarray) -> Queries:
        # Behind the last user stands an empty one, for strangers.
        offsets, rows = np.append(self.offsets, self.offsets[-1]), np.where(rows == STRANGER, len(self.offsets) - 1, rows)
        starts, stops = offsets[rows], offsets[rows + 1]
        lengths = stops - starts
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        take = np.arange(indptr[-1]) - np.repeat(indptr[:-1] - starts, lengths)
        return self._queries(self.items[take], self.events[take], self.times[take], self.values[take], indptr)

    def _of_file(self, file: str) -> tuple[pa.Array, Queries]:
        table = storage.read_table(file).sort_by(USER_IDX)
        offsets, (items, events, times, values) = _flat_lists(table)
        known = (self.rows[items] != UNKNOWN_ITEM) & self.history[events]
        indptr = np.concatenate([[0], np.cumsum(known)])[offsets].astype(np.int64)
        queries = self._queries(self.rows[items[known]], self.codes[events[known]], times[known], values[known], indptr)
        return self.user_ids.take(table[USER_IDX].combine_chunks()), queries

    def _queries(self, items: np.ndarray, events: np.ndarray, times: np.ndarray, values: np.ndarray, indptr: np.ndarray) -> Queries:
        # As `recommend_user` does: a user without history is asked at the data's watermark.
        now = np.full(len(indptr) - 1, self.bundle.manifest.get("watermark") or 0, np.int64)
        filled = np.diff(indptr) > 0
        now[filled] = times[indptr[1:][filled] - 1]
        return Queries(items, events, times, values, indptr, now)


def _flat_lists(table: pa.Table) -> tuple[np.ndarray, list[np.ndarray]]:
    """(U+1,) int64 offsets, and item rows, event codes, times and values of all users in one array each."""
    columns = [table[name].combine_chunks() for name in (ITEM_IDX, "event", "timestamp", "value")]
    columns = [column.chunk(0) if isinstance(column, pa.ChunkedArray) else column for column in columns]
    offsets = columns[0].offsets.to_numpy().astype(np.int64) if len(columns[0]) else np.zeros(1, np.int64)
    return offsets - offsets[0], [column.flatten().to_numpy(zero_copy_only=False) for column in columns]


def _read_ids(uri: str) -> Sequence[str]:
    if not storage.exists(uri):
        raise SchemaError(f"{uri}: expected a file of user ids, found none")
    if not uri.endswith((".parquet", ".csv")):
        return [line.strip() for line in storage.read_bytes(uri).decode().splitlines() if line.strip()]
    if uri.endswith(".csv"):
        as_text = pa_csv.ConvertOptions(column_types={USER_ID: pa.string()})
        table = pa_csv.read_csv(pa.BufferReader(storage.read_bytes(uri)), convert_options=as_text)
    else:
        table = storage.read_table(uri)
    if USER_ID not in table.column_names:
        raise SchemaError(f"{uri}: expected a column {USER_ID!r}, found {', '.join(table.column_names)}")
    return table[USER_ID].cast(pa.string()).drop_null().to_pylist()


def _slices(count: int, size: int) -> list[tuple[int, int]]:
    return [(first, min(first + size, count)) for first in range(0, count, size)]
