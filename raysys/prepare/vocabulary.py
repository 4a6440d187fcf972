"""What the training window knows: item and user rows, event codes, event meanings. No Ray.

Everything here is counted on the training part; held-out events only tell which
further items exist (leave-one-out ranks all items of the data).
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import polars as pl
import pyarrow as pa

from raysys.prepare.sequences import DUPLICATES, Flat, Vocabulary
from raysys.schema import ITEM_ID, ITEM_IDX, OTHER_EVENT, SPLIT_TRAIN, USER_ID, USER_IDX, EventType

MAX_EVENT_NAMES = 126
"""Event codes are int8 and code 0 is OTHER_EVENT."""

STATS_SCHEMA = pa.schema(
    [
        (USER_ID, pa.large_list(pa.large_string())),
        (ITEM_ID, pa.large_list(pa.large_string())),
        ("num_train", pa.large_list(pa.int64())),
        ("event", pa.list_(pa.large_string())),
        ("event_train", pa.list_(pa.int64())),
        ("watermark", pa.int64()),
        (DUPLICATES, pa.int64()),
        ("interactions", pa.int64()),
        ("positive", pa.int64()),
    ]
)


def partition_stats(flat: Flat, positive: np.ndarray, *, duplicates: int, interactions: int) -> pa.Table:
    """Counts of one partition as one STATS_SCHEMA row.

    Args:
        flat: the partition, split.
        positive: (E,) bool positive targets under the configured event types.
        duplicates: rows dropped as duplicates.
        interactions: events of the partition, those of left-out users included.
    """
    train = flat.split == SPLIT_TRAIN
    frame = pl.DataFrame({ITEM_ID: flat.items, "event": flat.events, "train": train})
    items = frame.group_by(ITEM_ID).agg(pl.col("train").sum().cast(pl.Int64))
    events = frame.group_by("event").agg(pl.col("train").sum().cast(pl.Int64))
    row = [
        flat.users.to_pylist(),
        items[ITEM_ID].to_list(),
        items["train"].to_list(),
        events["event"].to_list(),
        events["train"].to_list(),
        int(flat.times[train].max()) if train.any() else None,
        duplicates,
        interactions,
        int((positive & train).sum()),
    ]
    return pa.table([[value] for value in row], schema=STATS_SCHEMA)


@dataclass
class Stats:
    """Sums of all partitions.

    Attributes:
        items: item_id, num_train (0 = seen in held-out events only).
        users: user_id of all users with events.
        events: event name -> training events; 0 for names seen in held-out events only.
        watermark: largest training time, None without training events.
        duplicates, interactions, positive: rows.
    """

    items: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema={ITEM_ID: pl.String, "num_train": pl.Int64}))
    users: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema={USER_ID: pl.String}))
    events: Counter = field(default_factory=Counter)
    watermark: int | None = None
    duplicates: int = 0
    interactions: int = 0
    positive: int = 0


def sum_stats(batches: Iterable[pa.Table]) -> Stats:
    """Add partitions up; memory holds the vocabulary, never all partitions."""
    total = Stats()
    users: list[pl.DataFrame] = []
    for batch in batches:
        for row in range(batch.num_rows):
            part = batch.slice(row, 1)
            items = pl.DataFrame({name: pl.from_arrow(_flatten(part[name])) for name in (ITEM_ID, "num_train")})
            total.items = pl.concat([total.items, items]).group_by(ITEM_ID).agg(pl.col("num_train").sum())
            users.append(pl.DataFrame({USER_ID: pl.from_arrow(_flatten(part[USER_ID]))}))
            for name, count in zip(part["event"][0].as_py(), part["event_train"][0].as_py(), strict=True):
                total.events[name] += count
            watermark = part["watermark"][0].as_py()
            if watermark is not None:
                total.watermark = watermark if total.watermark is None else max(total.watermark, watermark)
            total.duplicates += part[DUPLICATES][0].as_py()
            total.interactions += part["interactions"][0].as_py()
            total.positive += part["positive"][0].as_py()
    total.users = pl.concat(users) if users else total.users
    return total


def _flatten(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks().flatten()


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


def order_users(stats: Stats, table_ids: pl.Series) -> pl.DataFrame:
    """user_id in row order: users with events by id, then users that only the user table knows, by id."""
    active = stats.users[USER_ID].sort()
    listed = table_ids.filter(~table_ids.is_in(active.implode())).sort()
    return pl.concat([active, listed]).alias(USER_ID).to_frame()


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


def build_vocabulary(order: ItemOrder, users: pl.DataFrame, events: list[str], types: dict[str, EventType], *, ordinal: bool) -> Vocabulary:
    """What the encoding tasks need."""
    items = order.rows.select(ITEM_ID).with_row_index(ITEM_IDX)
    numbered = users.with_row_index(USER_IDX)
    return Vocabulary(items.to_arrow(), numbered.to_arrow(), events, types, order.rare.to_arrow(), ordinal)
