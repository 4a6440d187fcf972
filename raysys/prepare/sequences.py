"""One partition of users: deduplicate, order, split, encode. Arrow and NumPy, no files, no Ray.

A partition that is in order has the columns of clean rows (CLEAN_SCHEMA), sorted by user
and time, with the user dictionary in byte order. It is kept so beside the prepared set:
new rows are appended to it by ordering both together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa

from raysys.prepare.dataset import SEQUENCE_SCHEMA
from raysys.prepare.partition import compact, dictionary_column
from raysys.prepare.rows import CLEAN_SCHEMA, TIME
from raysys.schema import EVENT, EVENT_ID, ITEM_ID, SPLIT_TEST, SPLIT_TRAIN, SPLIT_VALID, UNKNOWN_ITEM, USER_ID, VALUE, EventType

SECOND_US = 1_000_000


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
        users: U user ids, ascending. indptr: (U+1,) int64. items, events: E texts as dictionaries.
        times: (E,) int64. values: (E,) float32. split: (E,) int8.
    """

    users: pa.StringArray
    indptr: np.ndarray
    items: pa.DictionaryArray
    events: pa.DictionaryArray
    times: np.ndarray
    values: np.ndarray
    split: np.ndarray


def order_partition(tables: Sequence[pa.Table]) -> pa.Table:
    """Put each user's events in time order and drop what can never be kept.

    Of the events of a user with the same `event_id`, the first by time stays. Of those with the
    same user, item, time and event name, the first stays, and so do the others that have an
    `event_id`, and the first without one: an earlier event with the id of the first could still
    arrive in a later call, and then the next one takes its place; and a later event with the id of
    another must still be known for a duplicate (`split_partition` leaves them out until then).
    So ordering in two calls gives what one call gives. Ties in time keep the order of the rows.

    Args:
        tables: all rows of some users (CLEAN_SCHEMA) in the order of their files.

    Returns:
        CLEAN_SCHEMA, sorted by user id and time.
    """
    table = pa.concat_tables(tables).unify_dictionaries().combine_chunks() if tables else CLEAN_SCHEMA.empty_table()
    if not table.num_rows:
        return CLEAN_SCHEMA.empty_table()
    column = dictionary_column(table, USER_ID)
    names = pl.Series(pl.from_arrow(column.dictionary))
    by_name = names.arg_sort().to_numpy()
    rank = np.empty(len(names), np.int32)
    rank[by_name] = np.arange(len(names), dtype=np.int32)
    user, time = rank[column.indices.to_numpy()], table[TIME].to_numpy()
    order = stable_order(user, time)
    user, time = user[order], time[order]
    keep = np.ones(len(user), bool)
    event_ids = table[EVENT_ID]
    if event_ids.null_count < len(event_ids):
        keep[_repeated_ids(user, pl.Series(pl.from_arrow(event_ids.take(pa.array(order)))))] = False
    tied = np.flatnonzero(_tied(user, time) & keep)
    if len(tied):
        columns = {name: dictionary_column(table, name).indices.to_numpy()[order[tied]] for name in (ITEM_ID, EVENT)}
        frame = pl.DataFrame({USER_ID: user[tied], TIME: time[tied], **columns})
        anchor = event_ids.take(pa.array(order[tied])).is_null().to_numpy(zero_copy_only=False).astype(np.int32)
        before = (pl.col("anchor").cum_sum() - pl.col("anchor")).over(USER_ID, TIME, ITEM_ID, EVENT)
        again = frame.with_columns(anchor=anchor).select((before > 0) & (pl.col("anchor") == 1)).to_series()
        keep[tied[again.to_numpy()]] = False
    order, user = order[keep], user[keep]
    users = pa.DictionaryArray.from_arrays(pa.array(user), names.gather(by_name).to_arrow().cast(pa.string()))
    ordered = table.take(pa.array(order))
    return compact(ordered.set_column(0, USER_ID, users).combine_chunks())


def stable_order(user: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Row numbers by (user, time), ties in row order; one 64-bit key where it holds both, which halves the cost."""
    first = int(time.min())
    span = int(time.max()) - first
    unit = SECOND_US if span >= SECOND_US and not ((time - first) % SECOND_US).any() else 1
    bits = (span // unit).bit_length()
    if bits + int(user.max()).bit_length() > 62:
        return np.lexsort((time, user))
    return np.argsort((user.astype(np.int64) << bits) | ((time - first) // unit), kind="stable")


def _tied(user: np.ndarray, time: np.ndarray) -> np.ndarray:
    """(E,) bool: another event of the user has the same time."""
    same = (user[1:] == user[:-1]) & (time[1:] == time[:-1])
    return np.append(same, False) | np.insert(same, 0, False)


def _repeated_ids(user: np.ndarray, event_ids: pl.Series) -> np.ndarray:
    """Rows whose event id their user had before."""
    again = np.flatnonzero((event_ids.is_duplicated() & event_ids.is_not_null()).to_numpy())
    frame = pl.DataFrame({USER_ID: user[again], EVENT_ID: event_ids.gather(again)})
    return again[~frame.select(pl.struct(pl.all()).is_first_distinct()).to_series().to_numpy()]


def split_partition(table: pa.Table, rule: SplitRule) -> Flat:
    """Lay an ordered partition out flat, mark every event's part and drop users with too few training events."""
    table = _first_of_each(table)
    column = dictionary_column(table, USER_ID)
    lengths = np.bincount(column.indices.to_numpy(), minlength=len(column.dictionary))
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    times = table[TIME].to_numpy()
    flat = Flat(
        column.dictionary,
        indptr,
        dictionary_column(table, ITEM_ID),
        dictionary_column(table, EVENT),
        times,
        table[VALUE].to_numpy(),
        split_codes(indptr, times, rule),
    )
    if not rule.min_user_events or not len(flat.users):
        return flat
    enough = np.add.reduceat(flat.split == SPLIT_TRAIN, indptr[:-1], dtype=np.int64) >= rule.min_user_events
    return flat if enough.all() else _select(flat, np.repeat(enough, lengths), enough)


def _first_of_each(table: pa.Table) -> pa.Table:
    """Leave out events with the same user, item, time and event name but an `event_id` of their own."""
    if table[EVENT_ID].null_count == table.num_rows:
        return table
    user = dictionary_column(table, USER_ID).indices.to_numpy()
    tied = np.flatnonzero(_tied(user, table[TIME].to_numpy()))
    if not len(tied):
        return table
    columns = {name: dictionary_column(table, name).indices.to_numpy()[tied] for name in (ITEM_ID, EVENT)}
    frame = pl.DataFrame({USER_ID: user[tied], TIME: table[TIME].to_numpy()[tied], **columns})
    keep = np.ones(table.num_rows, bool)
    keep[tied] = frame.select(pl.struct(pl.all()).is_first_distinct()).to_series().to_numpy()
    return table.filter(pa.array(keep)).combine_chunks()


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


@dataclass(frozen=True)
class Vocabulary:
    """Ids to dense rows, and the meaning of events; built from the training window.

    Attributes:
        items: item_idx, item_id of every item that has a row (Arrow, so that tasks share one copy).
        events: event names by code. event_types: name -> meaning.
        rare: ids of items whose training events are left out.
        ordinal: times are an order, not microseconds.
    """

    items: pa.Table
    events: list[str]
    event_types: dict[str, EventType]
    rare: pa.Array
    ordinal: bool


def encode_partition(flat: Flat, user_idx: np.ndarray, vocabulary: Vocabulary) -> pa.Table:
    """A partition as SEQUENCE_SCHEMA rows, sorted by user_idx.

    Users left without any event (all of them rare items) are left out.

    Args:
        flat: the partition, split.
        user_idx: (U,) int32 row of every user of it, ascending as the ids are.
        vocabulary: rows of items, codes of events.
    """
    if len(vocabulary.rare):
        is_rare = pl.Series(pl.from_arrow(flat.items.dictionary)).is_in(pl.Series(vocabulary.rare).implode()).to_numpy()
        rare = is_rare[flat.items.indices.to_numpy()] & (flat.split == SPLIT_TRAIN)
        lengths = np.bincount(np.repeat(np.arange(len(flat.users)), np.diff(flat.indptr))[~rare], minlength=len(flat.users))
        flat, user_idx = _select(flat, ~rare, lengths > 0), user_idx[lengths > 0]
    known = pl.DataFrame({ITEM_ID: pl.from_arrow(flat.items.dictionary)})
    rows = known.join(pl.DataFrame(vocabulary.items), on=ITEM_ID, how="left", maintain_order="left")["item_idx"]
    names = flat.events.dictionary.to_pylist()
    codes = {name: code for code, name in enumerate(vocabulary.events)}
    event_codes = np.array([codes.get(name, 0) for name in names], np.int8)
    columns = [
        rows.fill_null(UNKNOWN_ITEM).cast(pl.Int32).to_numpy()[flat.items.indices.to_numpy()],
        event_codes[flat.events.indices.to_numpy()],
        flat.times if vocabulary.ordinal else flat.times // SECOND_US,
        flat.values,
        positives(flat.events, flat.values, vocabulary.event_types),
        flat.split,
    ]
    offsets = pa.array(flat.indptr.astype(np.int32))
    lists = [
        pa.ListArray.from_arrays(offsets, pa.array(column, field.type.value_type))
        for column, field in zip(columns, list(SEQUENCE_SCHEMA)[1:], strict=True)
    ]
    return pa.table([pa.array(user_idx, pa.int32()), *lists], schema=SEQUENCE_SCHEMA)


def positives(events: pa.DictionaryArray, values: np.ndarray, event_types: dict[str, EventType]) -> np.ndarray:
    """(E,) bool: the event is a positive target by its type and, where the type asks for it, its value."""
    kinds = [event_types.get(name, EventType()) for name in events.dictionary.to_pylist()]
    always = np.array([kind.positive and kind.min_value is None for kind in kinds], bool)
    least = np.array([kind.min_value if kind.positive and kind.min_value is not None else np.inf for kind in kinds], np.float32)
    codes = events.indices.to_numpy()
    return always[codes] | (values >= least[codes])  # False where the value is NaN
