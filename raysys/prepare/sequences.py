"""One partition of users: deduplicate, order, split, encode. Arrow and Polars, no Ray.

A partition travels between tasks as RAW_SEQUENCE_SCHEMA, one row a user with
lists, so that wherever Ray Data cuts a block no user is cut in two.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa

from raysys.prepare.dataset import SEQUENCE_SCHEMA
from raysys.prepare.rows import SOURCE, TIME
from raysys.schema import EVENT, EVENT_ID, ITEM_ID, SPLIT_TEST, SPLIT_TRAIN, SPLIT_VALID, UNKNOWN_ITEM, USER_ID, VALUE, EventType

DUPLICATES = "duplicates"
RAW_SEQUENCE_SCHEMA = pa.schema(
    [
        (USER_ID, pa.large_string()),
        (ITEM_ID, pa.large_list(pa.large_string())),
        (TIME, pa.large_list(pa.int64())),
        (EVENT, pa.large_list(pa.large_string())),
        (VALUE, pa.large_list(pa.float32())),
        (DUPLICATES, pa.int64()),
    ]
)


@dataclass(frozen=True)
class SplitRule:
    """How events are held out.

    Attributes:
        kind: "leave-one-out", "time" or "none".
        valid_from, test_from: for "time", the global cuts in the unit of `time`.
        min_user_events: users with fewer training events are left out.
    """

    kind: str
    valid_from: int = 0
    test_from: int = 0
    min_user_events: int = 0


@dataclass(frozen=True)
class Flat:
    """A partition as flat columns: U users, E events, each user's in time order.

    Attributes:
        users: U user ids. indptr: (U+1,) int64. items, events: E strings.
        times: (E,) int64. values: (E,) float32. split: (E,) int8.
    """

    users: pa.Array
    indptr: np.ndarray
    items: pa.Array
    events: pa.Array
    times: np.ndarray
    values: np.ndarray
    split: np.ndarray


def order_partition(table: pa.Table) -> pa.Table:
    """Drop duplicates and put each user's events in time order.

    Duplicates are events of a user with the same `event_id`, then events with the same
    user, item, time and event name; the first by (time, source) is kept. Ties in time
    keep the order of (source file, row).

    Args:
        table: all rows of some users, CLEAN_SCHEMA.

    Returns:
        RAW_SEQUENCE_SCHEMA, sorted by user id.
    """
    frame = pl.DataFrame(pl.from_arrow(table)).sort(USER_ID, TIME, SOURCE)
    before = frame.group_by(USER_ID, maintain_order=True).len()
    if frame[EVENT_ID].null_count() < len(frame):
        named = pl.col(EVENT_ID).is_not_null()
        frame = frame.filter(~named | pl.struct(USER_ID, EVENT_ID).is_first_distinct() if len(frame) else named)
    frame = frame.unique([USER_ID, ITEM_ID, TIME, EVENT], keep="first", maintain_order=True)
    after = frame.group_by(USER_ID, maintain_order=True).len()
    offsets = pa.array(np.concatenate([[0], np.cumsum(after["len"].to_numpy())]).astype(np.int64))
    columns = [
        pa.LargeListArray.from_arrays(offsets, _array(frame[name], RAW_SEQUENCE_SCHEMA.field(name).type.value_type))
        for name in (ITEM_ID, TIME, EVENT, VALUE)
    ]
    duplicates = (before["len"].cast(pl.Int64) - after["len"].cast(pl.Int64)).to_arrow()
    return pa.table([_array(after[USER_ID], pa.large_string()), *columns, duplicates], schema=RAW_SEQUENCE_SCHEMA)


def _array(column: pl.Series, kind: pa.DataType) -> pa.Array:
    return column.rechunk().to_arrow().cast(kind)


def split_partition(table: pa.Table, rule: SplitRule) -> Flat:
    """Lay a partition out flat, mark every event's part and drop users with too few training events."""
    table = table.combine_chunks()
    lists = {name: _single(table[name]) for name in (ITEM_ID, TIME, EVENT, VALUE)}
    offsets = lists[TIME].offsets.to_numpy()
    indptr = (offsets - offsets[0]).astype(np.int64)
    times = lists[TIME].flatten().to_numpy()
    flat = Flat(
        _single(table[USER_ID]),
        indptr,
        lists[ITEM_ID].flatten(),
        lists[EVENT].flatten(),
        times,
        lists[VALUE].flatten().to_numpy(zero_copy_only=False),
        split_codes(indptr, times, rule),
    )
    if not rule.min_user_events:
        return flat
    enough = np.add.reduceat(np.append(flat.split == SPLIT_TRAIN, 0), indptr[:-1]) >= rule.min_user_events
    return flat if enough.all() else _select(flat, np.repeat(enough, np.diff(indptr)), enough)


def split_codes(indptr: np.ndarray, times: np.ndarray, rule: SplitRule) -> np.ndarray:
    """(E,) int8 part of every event.

    leave-one-out: a user's last event is the test part, the last but one the
    validation part; a user with two events has no validation, with one only training.
    """
    split = np.full(len(times), SPLIT_TRAIN, np.int8)
    if rule.kind == "time":
        split[times >= rule.valid_from] = SPLIT_VALID
        split[times >= rule.test_from] = SPLIT_TEST
    elif rule.kind == "leave-one-out":
        lengths, ends = np.diff(indptr), indptr[1:]
        split[ends[lengths >= 2] - 1] = SPLIT_TEST
        split[ends[lengths >= 3] - 2] = SPLIT_VALID
    return split


def _select(flat: Flat, events: np.ndarray, users: np.ndarray) -> Flat:
    lengths = np.bincount(np.repeat(np.arange(len(users)), np.diff(flat.indptr))[events], minlength=len(users))[users]
    mask = pa.array(events)
    return Flat(
        flat.users.filter(pa.array(users)),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        flat.items.filter(mask),
        flat.events.filter(mask),
        flat.times[events],
        flat.values[events],
        flat.split[events],
    )


def _single(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return combined.chunk(0) if isinstance(combined, pa.ChunkedArray) and combined.num_chunks == 1 else combined


@dataclass(frozen=True)
class Vocabulary:
    """Ids to dense rows, and the meaning of events; built from the training window.

    Attributes:
        items: item_idx, item_id of every item that has a row (Arrow, so that tasks share one copy).
        users: user_idx, user_id.
        events: event names by code. event_types: name -> meaning.
        rare: ids of items whose training events are left out.
        ordinal: times are an order, not microseconds.
    """

    items: pa.Table
    users: pa.Table
    events: list[str]
    event_types: dict[str, EventType]
    rare: pa.Array
    ordinal: bool


def encode_partition(flat: Flat, vocabulary: Vocabulary) -> pa.Table:
    """A partition as SEQUENCE_SCHEMA rows, sorted by user_idx.

    Users left without any event (all of them rare items) are left out.
    """
    if len(vocabulary.rare):
        rare = pl.Series(flat.items).is_in(pl.Series(vocabulary.rare).implode()).to_numpy() & (flat.split == SPLIT_TRAIN)
        lengths = np.bincount(np.repeat(np.arange(len(flat.users)), np.diff(flat.indptr))[~rare], minlength=len(flat.users))
        flat = _select(flat, ~rare, lengths > 0)
    users = pl.DataFrame({USER_ID: flat.users}).join(pl.DataFrame(vocabulary.users), on=USER_ID, how="left", maintain_order="left")
    items = pl.DataFrame({ITEM_ID: flat.items}).join(pl.DataFrame(vocabulary.items), on=ITEM_ID, how="left", maintain_order="left")
    events = pl.Series(flat.events)
    codes = {name: code for code, name in enumerate(vocabulary.events)}
    values = pl.Series(flat.values)
    offsets = pa.array(flat.indptr.astype(np.int32))
    columns = [
        items["item_idx"].fill_null(UNKNOWN_ITEM).cast(pl.Int32),
        events.replace_strict(codes, default=0, return_dtype=pl.Int8),
        pl.Series(flat.times if vocabulary.ordinal else flat.times // 1_000_000),
        values,
        positives(events, values, vocabulary.event_types),
        pl.Series(flat.split),
    ]
    lists = [
        pa.ListArray.from_arrays(offsets, _array(column, field.type.value_type))
        for column, field in zip(columns, list(SEQUENCE_SCHEMA)[1:], strict=True)
    ]
    table = pa.table([_array(users["user_idx"], pa.int32()), *lists], schema=SEQUENCE_SCHEMA)
    return table.sort_by("user_idx")


def positives(events: pl.Series, values: pl.Series, event_types: dict[str, EventType]) -> pl.Series:
    """(E,) bool: the event is a positive target by its type and, where the type asks for it, its value."""
    always = [name for name, kind in event_types.items() if kind.positive and kind.min_value is None]
    positive = pl.col("event").is_in(always)
    for name, kind in event_types.items():
        if kind.positive and kind.min_value is not None:
            enough = (pl.col("value") >= kind.min_value) & pl.col("value").is_not_nan()
            positive = positive | ((pl.col("event") == name) & enough.fill_null(False))
    return pl.DataFrame({"event": events, "value": values}).select(positive=positive)["positive"]
