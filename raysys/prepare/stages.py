"""The distributed part: three passes of Ray Data over the interactions, few and large.

1. clean the chunks and split them by user      -> a file a chunk
2. order and count the partitions               -> a raw file a partition, counts   (a `time` split counts in a pass of its own)
3. encode with the vocabulary and write shards

Between the passes everything is a file: Ray moves task numbers and reports, so its object
store stays empty and a lost node costs the tasks that ran on it. What a task does
stands in tasks.py; here is only where it runs.
"""

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import polars as pl
import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext

from raysys import storage
from raysys.errors import RaysysError
from raysys.prepare import tasks
from raysys.prepare.chunks import CSV_BYTES_PER_ROW, Piece
from raysys.prepare.config import PrepareConfig
from raysys.prepare.output import step
from raysys.prepare.rows import RowRules
from raysys.prepare.sequences import SplitRule, Vocabulary
from raysys.prepare.source import SourceFile
from raysys.prepare.vocabulary import Stats, merge_stats
from raysys.schema import USER_ID, EventType

FAN_IN = 32
"""Counts that one task adds up."""


@contextlib.contextmanager
def quiet_ray_data() -> Iterator[None]:
    """Ray Data without its bars and logs; errors of ours come out as they were raised in the task."""
    context = DataContext.get_current()
    loggers = [logging.getLogger(name) for name in ("ray.data", "ray.data._internal")]
    saved = (context.enable_progress_bars, [logger.level for logger in loggers])
    context.enable_progress_bars = False
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        raise _ours(error) or error from None
    finally:
        context.enable_progress_bars = saved[0]
        for logger, level in zip(loggers, saved[1], strict=True):
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


def run_tasks(task: Callable[[int], dict], count: int) -> list[dict]:
    """Run `task(0) ... task(count - 1)` on the cluster and return what they report, in that order."""

    def run(batch: pa.Table) -> pa.Table:
        numbers = batch["item"].to_pylist()
        return pa.table({"number": numbers, "report": [json.dumps(task(number)) for number in numbers]})

    numbers = ray.data.from_items(list(range(count)), override_num_blocks=count)
    rows = numbers.map_batches(run, batch_format="pyarrow", batch_size=None).take_all()
    return [json.loads(row["report"]) for row in sorted(rows, key=lambda row: row["number"])]


def clean(chunks: Sequence[tuple[Piece, ...]], rules: RowRules, partitions: int, chunk_rows: int, work: str) -> list[dict]:
    """Pass 1: a report a chunk (`tasks.clean_chunk`)."""
    shared = ray.put(list(chunks))
    return run_tasks(lambda number: tasks.clean_chunk(number, ray.get(shared)[number], rules, partitions, chunk_rows, work), len(chunks))


def order(reports: list[dict], partitions: int, kept: list[str] | None, counting: tasks.Counting, work: str) -> np.ndarray:
    """Pass 2: every user's events, deduplicated and in order, counted unless the cuts are still to be found.

    Returns:
        Events in each bin of the grid, (HISTOGRAM_BINS + 1,) int64.
    """
    segments: Sequence[str] = [name for report in reports for name in report["segments"]]
    shared = ray.put(segments)
    total = np.zeros(tasks.HISTOGRAM_BINS + 1, np.int64)
    for report in run_tasks(
        lambda number: tasks.order(number, ray.get(shared), None if kept is None else kept[number], counting, work), partitions
    ):
        np.add.at(total, np.array(report["bins"], np.int64), np.array(report["events"], np.int64))
    return total


def time_cuts(grid: tasks.TimeGrid, histogram: np.ndarray, valid_fraction: float, test_fraction: float) -> tuple[int, int]:
    """Global times from which validation and test begin.

    The cuts are borders of the grid, those nearest to the wanted shares from below, so at most
    one bin of events is misplaced.

    Returns:
        (valid_from, test_from) in UTC epoch microseconds; a part starts at its time, inclusive.
    """
    before = np.concatenate([[0], np.cumsum(histogram)])
    shares = (1 - valid_fraction - test_fraction, 1 - test_fraction)
    valid, test = (int(np.searchsorted(before, share * before[-1], side="right")) - 1 for share in shares)
    return grid.low + valid * grid.width, grid.low + test * grid.width


def count(partitions: int, rule: SplitRule, event_types: dict[str, EventType], work: str) -> None:
    """Count the partitions where pass 2 could not."""
    run_tasks(lambda number: tasks.count(number, rule, event_types, work), partitions)


def read_counts(partitions: int, work: str) -> tuple[Stats, list[pl.Series]]:
    """Sums over all partitions, added up in a tree, and the users of each."""
    names = [step(work, "stats", tasks.part_name(number)) for number in range(partitions)]
    level = 0
    while len(names) > FAN_IN:
        level += 1
        groups = [names[first : first + FAN_IN] for first in range(0, len(names), FAN_IN)]
        names = [step(work, f"stats-{level}", tasks.part_name(number)) for number in range(len(groups))]

        def merge(number: int, groups=groups, names=names) -> dict:
            storage.write_table(names[number], merge_stats([storage.read_table(name) for name in groups[number]]))
            return {}

        run_tasks(merge, len(groups))
    stats = Stats.of(merge_stats([storage.read_table(name) for name in names]))
    users = (storage.read_table(step(work, "users", tasks.part_name(number))) for number in range(partitions))
    return stats, [pl.Series(pl.from_arrow(table[USER_ID])) for table in users]


def encode(rule: SplitRule, user_idx: list[np.ndarray], vocabulary: Vocabulary, work: str) -> dict:
    """Pass 3: write the shards.

    Returns:
        Sums of what the shards report (`tasks.encode`).
    """
    shared, rows = ray.put(vocabulary), [ray.put(part) for part in user_idx]
    total: dict = {"sums": [0, 0]}
    for report in run_tasks(lambda number: tasks.encode(number, rule, ray.get(rows[number]), ray.get(shared), work), len(rows)):
        total["sums"] = [(old + new) % 2**64 for old, new in zip(total["sums"], report.pop("sums"), strict=True)]
        for name, value in report.items():
            total[name] = total.get(name, 0) + value
    return total
