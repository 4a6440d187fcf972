"""What the training window knows: item and user rows, event codes, event meanings. No Ray.

Everything here is counted on the training part; held-out events only tell which
further items exist (leave-one-out ranks all items of the data).
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from raysys.prepare.sequences import Flat, Vocabulary, positives
from raysys.schema import ITEM_ID, ITEM_IDX, OTHER_EVENT, SPLIT_TRAIN, USER_ID, EventType

MAX_EVENT_NAMES = 126
"""Event codes are int8 and code 0 is OTHER_EVENT."""

STATS_SCHEMA = pa.schema(
    [
        (ITEM_ID, pa.list_(pa.string())),
        ("num_train", pa.list_(pa.int64())),
        ("event", pa.list_(pa.string())),
        ("event_train", pa.list_(pa.int64())),
        ("watermark", pa.int64()),
        ("interactions", pa.int64()),
        ("positive", pa.int64()),
    ]
)
"""Counts of some users as one row: they add up in any order and grouping (`merge_stats`)."""


def partition_stats(flat: Flat, event_types: dict[str, EventType], interactions: int) -> pa.Table:
    """Counts of one partition as one STATS_SCHEMA row.

    Args:
        flat: the partition, split.
        event_types: which events are positive targets.
        interactions: events of the partition, those of left-out users included.
    """
    train = flat.split == SPLIT_TRAIN
    row: list = []
    for column in (flat.items, flat.events):
        codes, size = column.indices.to_numpy(), len(column.dictionary)
        seen = np.flatnonzero(np.bincount(codes, minlength=size))
        row += [column.dictionary.take(pa.array(seen)), pa.array(np.bincount(codes[train], minlength=size)[seen])]
    positive = positives(flat.events, flat.values, event_types) & train
    row += [int(flat.times[train].max()) if train.any() else None, interactions, int(positive.sum())]
    return _stats_row(row)


def merge_stats(batches: Iterable[pa.Table]) -> pa.Table:
    """Add STATS_SCHEMA rows up to one row."""
    table = pa.concat_tables(batches)
    row: list = []
    for name, count in ((ITEM_ID, "num_train"), ("event", "event_train")):
        texts, counts = (pl.Series(pl.from_arrow(_flatten(table[column]))) for column in (name, count))
        total = pl.DataFrame({"text": texts, "count": counts}).group_by("text").agg(pl.col("count").sum()).sort("text")
        row += [total["text"].to_arrow().cast(pa.string()), total["count"].to_arrow()]
    row += [pc.max(table["watermark"]).as_py(), *(pc.sum(table[name]).as_py() for name in ("interactions", "positive"))]
    return _stats_row(row)


def _stats_row(row: list) -> pa.Table:
    columns = [
        pa.ListArray.from_arrays(pa.array([0, len(value)], pa.int32()), value) if isinstance(value, pa.Array) else pa.array([value])
        for value in row
    ]
    return pa.table([column.cast(field.type) for column, field in zip(columns, STATS_SCHEMA, strict=True)], schema=STATS_SCHEMA)


def _flatten(column: pa.ChunkedArray) -> pa.Array:
    return pa.chunked_array([chunk.flatten() for chunk in column.chunks], column.type.value_type).combine_chunks()


@dataclass
class Stats:
    """Sums over all users.

    Attributes:
        items: item_id, num_train (0 = seen in held-out events only).
        events: event name -> training events; 0 for names seen in held-out events only.
        watermark: largest training time, None without training events.
        interactions, positive: rows.
    """

    items: pl.DataFrame
    events: Counter
    watermark: int | None
    interactions: int
    positive: int

    @classmethod
    def of(cls, row: pa.Table) -> "Stats":
        """Unpack one STATS_SCHEMA row."""
        items = pl.DataFrame({name: pl.from_arrow(_flatten(row[name])) for name in (ITEM_ID, "num_train")})
        (facts,) = row.drop_columns([ITEM_ID, "num_train"]).to_pylist()
        events = Counter(dict(zip(facts.pop("event"), facts.pop("event_train"), strict=True)))
        return cls(items, events, **facts)


@dataclass(frozen=True)
class ItemOrder:
    """item_id and num_train in row order, and how the rows came to be.

    Attributes:
        rows: item_id, num_train. num_warm: rows with training events.
        rare: (item_id,) items whose training events are left out. dropped: how many events those are.
    """

    rows: pl.DataFrame
    num_warm: int
    rare: pl.Series
    dropped: int


def order_items(stats: Stats, table_ids: pl.Series, *, split: str, min_item_events: int) -> ItemOrder:
    """Rows of the item vocabulary: warm items by (-num_train, item_id), held-out items, items of the table only.

    On a `time` split an item that only the future knows has no row unless the item table lists it.
    """
    rare = stats.items.filter(pl.col("num_train").is_between(1, min_item_events - 1))
    counted = stats.items.with_columns(
        num_train=pl.when(pl.col(ITEM_ID).is_in(rare[ITEM_ID].implode())).then(0).otherwise("num_train").cast(pl.Int64)
    )
    warm = counted.filter(pl.col("num_train") > 0).sort([-pl.col("num_train"), pl.col(ITEM_ID)])
    cold = counted.filter(pl.col("num_train") == 0)[ITEM_ID] if split != "time" else pl.Series([], dtype=pl.String)
    listed = table_ids.filter(~table_ids.is_in(warm[ITEM_ID].implode()) & ~table_ids.is_in(cold.implode()))
    rest = pl.concat([cold.sort(), listed.sort()]).alias(ITEM_ID).to_frame().with_columns(num_train=pl.lit(0, pl.Int64))
    return ItemOrder(pl.concat([warm, rest]), len(warm), rare[ITEM_ID], int(rare["num_train"].sum()))


def order_users(parts: list[pl.Series], table_ids: pl.Series) -> tuple[pl.DataFrame, list[np.ndarray]]:
    """Rows of the users: those with events by id, then those that only the user table knows, by id.

    Args:
        parts: ids of the users of every partition; no id is in two.
        table_ids: ids of the user table.

    Returns:
        user_id in row order, and for each partition the (U,) int32 rows of its users.
    """
    everyone = pl.concat(parts).alias(USER_ID)
    order = everyone.arg_sort().to_numpy()
    rank = np.empty(len(everyone), np.int32)
    rank[order] = np.arange(len(everyone), dtype=np.int32)
    active = everyone.gather(order)
    listed = table_ids.filter(~table_ids.is_in(active.implode())).sort()
    bounds = np.cumsum([len(part) for part in parts])[:-1]
    return pl.concat([active, listed.alias(USER_ID)]).to_frame(), np.split(rank, bounds)


def event_codes(counts: Counter) -> tuple[list[str], list[str]]:
    """Event names by code (code 0 = other), and the names for which no code was left.

    Names of the training part in alphabetical order; when there are too many, the most frequent.
    """
    seen = sorted((name for name, count in counts.items() if count), key=lambda name: (-counts[name], name))
    return [OTHER_EVENT, *sorted(name for name in seen[:MAX_EVENT_NAMES] if name != OTHER_EVENT)], seen[MAX_EVENT_NAMES:]


def resolve_event_types(configured: dict[str, EventType], stats: Stats) -> tuple[dict[str, EventType], list[str]]:
    """Meaning of every event name, and notes on what had to be assumed.

    A name without configuration gets weight 1 and is not positive. When no training event
    is positive, every event with weight is: a data set of views has views as targets.
    """
    notes = []
    unknown = sorted(name for name in stats.events if name not in configured)
    types = {**configured, **{name: EventType() for name in unknown}}
    if unknown:
        notes.append(f"event names without configuration, taken with weight 1 and not positive: {', '.join(unknown)}")
    if stats.positive == 0:
        seen = sorted(name for name in stats.events if types[name].weight > 0)
        types.update({name: replace(types[name], positive=True, min_value=None) for name in seen})
        notes.append(f"no training event was positive, so all of these count as positive: {', '.join(seen)}")
    return types, notes


def build_vocabulary(order: ItemOrder, events: list[str], types: dict[str, EventType], *, ordinal: bool) -> Vocabulary:
    """What the encoding tasks need."""
    items = order.rows.select(ITEM_ID).with_row_index(ITEM_IDX)
    return Vocabulary(items.to_arrow(), events, types, order.rare.to_arrow(), ordinal)
