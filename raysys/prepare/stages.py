"""The distributed part: three passes of Ray Data over the interactions, few and large.

1. read and clean chunks, one hash partition by user, deduplicate and order   -> materialised, one row a user
2. count (and, for a time split, first a histogram of time to find the cuts)  -> driver
3. encode with the vocabulary and write shards

Up to one partition of rows skips the shuffle: one task reads, cleans and orders.
What is done to rows stands in rows.py and sequences.py; here is only where it runs.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import polars as pl
import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext

from raysys import storage
from raysys.errors import RaysysError
from raysys.prepare.config import PrepareConfig
from raysys.prepare.dataset import SEQUENCES
from raysys.prepare.fingerprint import content_sums
from raysys.prepare.rows import CLEAN_SCHEMA, Chunk, RowRules, clean_chunk
from raysys.prepare.sequences import (
    DUPLICATES,
    SplitRule,
    Vocabulary,
    encode_partition,
    order_partition,
    positives,
    split_partition,
)
from raysys.prepare.source import SourceFile
from raysys.prepare.vocabulary import Stats, partition_stats, sum_stats
from raysys.schema import SPLIT_CODES, UNKNOWN_ITEM, USER_ID, EventType

HISTOGRAM_BINS = 1 << 20
SECOND_US = 1_000_000
CSV_BYTES_PER_ROW = 30


@contextlib.contextmanager
def quiet_ray_data() -> Iterator[None]:
    """Ray Data without its bars and logs; errors of ours come out as they were raised in the task.

    Also keeps blocks whole: splitting them would only cost copies here.
    """
    context = DataContext.get_current()
    loggers = [logging.getLogger(name) for name in ("ray.data", "ray.data._internal")]
    saved = (context.enable_progress_bars, context.target_max_block_size, [logger.level for logger in loggers])
    context.enable_progress_bars, context.target_max_block_size = False, None
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        raise _ours(error) or error from None
    finally:
        context.enable_progress_bars, context.target_max_block_size = saved[0], saved[1]
        for logger, level in zip(loggers, saved[2], strict=True):
            logger.setLevel(level)


def _ours(error: BaseException | None) -> RaysysError | None:
    while error is not None:
        if isinstance(error, RaysysError):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None


def num_partitions(files: list[SourceFile], config: PrepareConfig) -> int:
    """Partitions of users: as configured, else by the number of rows (of CSV files by their size)."""
    if config.partitions:
        return config.partitions
    rows = sum(file.num_rows if file.num_rows is not None else file.size_bytes // CSV_BYTES_PER_ROW for file in files)
    return max(1, math.ceil(rows / config.rows_per_partition))


def read_and_order(chunks: list[Chunk], rules: RowRules, partitions: int) -> ray.data.Dataset:
    """Pass 1: every user's events, deduplicated and in order (RAW_SEQUENCE_SCHEMA), held by Ray."""
    if partitions == 1:

        def read_all(_: pa.Table) -> pa.Table:
            return order_partition(_concat([table for chunk in chunks for table in clean_chunk(chunk, rules)]))

        return ray.data.from_items([0], override_num_blocks=1).map_batches(read_all, batch_format="pyarrow", batch_size=None).materialize()

    def read(batch: pa.Table) -> Iterator[pa.Table]:
        for index in batch["item"].to_pylist():
            yield from clean_chunk(chunks[index], rules)

    numbered = ray.data.from_items(list(range(len(chunks))), override_num_blocks=len(chunks))
    cleaned = numbered.map_batches(read, batch_format="pyarrow", batch_size=None)
    parted = cleaned.repartition(partitions, keys=[USER_ID])
    return parted.map_batches(lambda table: order_partition(_concat([table])), batch_format="pyarrow", batch_size=None).materialize()


def _concat(tables: list[pa.Table]) -> pa.Table:
    # A partition that got no row has no columns either.
    full = [table.select(CLEAN_SCHEMA.names).cast(CLEAN_SCHEMA) for table in tables if table.num_rows]
    return pa.concat_tables(full) if full else CLEAN_SCHEMA.empty_table()


def time_cuts(ordered: ray.data.Dataset, valid_fraction: float, test_fraction: float) -> tuple[int, int]:
    """Global times from which validation and test begin.

    The cuts are borders of 2**20 equal bins (whole seconds) between the first and the last
    event, those nearest to the wanted shares from below, so at most one bin of events is misplaced.

    Returns:
        (valid_from, test_from) in UTC epoch microseconds; a part starts at its time, inclusive.
    """

    def limits(table: pa.Table) -> pa.Table:
        times = _times(table)
        return pa.table({"low": [times.min()], "high": [times.max()]})

    ends = _map(ordered, limits).take_all()
    low, high = min(row["low"] for row in ends), max(row["high"] for row in ends)
    low -= low % SECOND_US
    width = -(-(high - low + 1) // (HISTOGRAM_BINS * SECOND_US)) * SECOND_US

    def histogram(table: pa.Table) -> pa.Table:
        bins, counts = np.unique((_times(table) - low) // width, return_counts=True)
        return pa.table({"bin": bins, "count": counts})

    total = np.zeros(HISTOGRAM_BINS + 1, np.int64)
    for batch in _tables(_map(ordered, histogram)):
        np.add.at(total, batch["bin"].to_numpy(), batch["count"].to_numpy())
    before = np.concatenate([[0], np.cumsum(total)])
    shares = (1 - valid_fraction - test_fraction, 1 - test_fraction)
    bins = [int(np.searchsorted(before, share * before[-1], side="right")) - 1 for share in shares]
    return low + bins[0] * width, low + bins[1] * width


def _times(table: pa.Table) -> np.ndarray:
    return table["time"].combine_chunks().flatten().to_numpy()


def count(ordered: ray.data.Dataset, rule: SplitRule, event_types: dict[str, EventType]) -> Stats:
    """Pass 2: the counts from which the vocabulary is built."""

    def stats(table: pa.Table) -> pa.Table:
        flat = split_partition(table, rule)
        positive = positives(pl.Series(flat.events), pl.Series(flat.values), event_types)
        return partition_stats(
            flat, positive.to_numpy(), duplicates=int(np.sum(table[DUPLICATES].to_numpy())), interactions=len(_times(table))
        )

    return sum_stats(_tables(_map(ordered, stats)))


def encode_and_write(ordered: ray.data.Dataset, rule: SplitRule, vocabulary: Vocabulary, work: str) -> dict:
    """Pass 3: write the shards.

    Returns:
        Sums over all shards: `users`, `train`, `valid`, `test`, `unknown_targets`, `positive`, `sums` (fingerprint).
    """
    shared = ray.put(vocabulary)

    def encode(table: pa.Table) -> pa.Table:
        encoded = encode_partition(split_partition(table, rule), ray.get(shared))
        if encoded.num_rows:
            # The first user of a shard names it: unique, and the same when the task is retried.
            name = f"part-{encoded['user_idx'][0].as_py():010d}.parquet"
            storage.write_table(storage.join(work, SEQUENCES, name), encoded)
        split = encoded["split"].combine_chunks().flatten().to_numpy()
        items = encoded["item_idx"].combine_chunks().flatten().to_numpy()
        sums = content_sums(encoded)
        row = {name: int((split == code).sum()) for name, code in SPLIT_CODES.items()}
        row |= {"users": encoded.num_rows, "unknown_targets": int((items == UNKNOWN_ITEM).sum())}
        row |= {"positive": int(encoded["positive"].combine_chunks().flatten().to_numpy(zero_copy_only=False).sum())}
        return pa.table({name: [value] for name, value in row.items()} | {"sums": [[str(value) for value in sums]]})

    total: dict = {"sums": [0, 0]}
    for row in _map(ordered, encode).take_all():
        total["sums"] = [(old + int(new)) % 2**64 for old, new in zip(total["sums"], row.pop("sums"), strict=True)]
        for name, value in row.items():
            total[name] = total.get(name, 0) + value
    return total


def _tables(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    for batch in dataset.iter_batches(batch_format="pyarrow", batch_size=None):
        table = cast(pa.Table, batch)
        if table.num_rows:
            yield table


def _map(dataset: ray.data.Dataset, function: Callable[[pa.Table], pa.Table]) -> ray.data.Dataset:
    def on_rows(table: pa.Table) -> pa.Table:
        # A partition without users has no columns.
        return function(table) if table.num_rows else pa.table({})

    return dataset.map_batches(on_rows, batch_format="pyarrow", batch_size=None, zero_copy_batch=True)
