"""What one task does, from files to files: clean a chunk, order a partition, count it, encode it. No Ray.

Every task writes its result first and its mark last, under names that follow from what it
was given. A mark that is there means that the result is, so a second run of the same work
skips the task, and a task that Ray runs twice writes the same bytes twice.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raysys import storage
from raysys.prepare import quarantine
from raysys.prepare.chunks import Piece, read_piece
from raysys.prepare.dataset import RAW, SEQUENCES
from raysys.prepare.fingerprint import content_sums
from raysys.prepare.output import step
from raysys.prepare.partition import read_row_group, write_row_groups, write_slices
from raysys.prepare.rows import COUNTERS, TIME, RowRules, clean_rows, ragged_rows
from raysys.prepare.sequences import SplitRule, Vocabulary, encode_partition, order_partition, split_partition
from raysys.prepare.vocabulary import partition_stats
from raysys.schema import SPLIT_CODES, UNKNOWN_ITEM, USER_ID, EventType

HISTOGRAM_BINS = 1 << 20
SECOND_US = 1_000_000


def part_name(number: int, suffix: str = "parquet") -> str:
    """File name of a partition."""
    return f"part-{number:05d}.{suffix}"


def once(mark: str, make: Callable[[], dict]) -> dict:
    """The content of a mark; made, and written when all else is, if it is not there."""
    if storage.exists(mark):
        return storage.read_json(mark)
    result = make()
    storage.write_json(mark, result)
    return result


def clean_chunk(number: int, pieces: Sequence[Piece], rules: RowRules, partitions: int, chunk_rows: int, work: str) -> dict:
    """Clean the rows of a chunk and write them split by partition.

    Returns:
        `rows` read, `good` rows kept, `first` and `last` time, `pieces` (key -> rows), a count for each of COUNTERS,
        `segments` (names of the files written: one, or more where a piece could not be cut) and `error`: a file that cannot
        be read is told here, because an exception out of a Ray Data task would print pages of traceback first.
    """

    def clean() -> dict:
        report: dict = {"rows": 0, "good": 0, "first": None, "last": None, "pieces": {}, "segments": [], "error": None}
        report |= {name: Counter() for name in COUNTERS}
        waiting: list[pa.Table] = []

        def flush() -> None:
            table = pa.concat_tables(waiting).unify_dictionaries()
            waiting.clear()
            if not table.num_rows:
                return
            name = f"{number:06d}-{len(report['segments']):04d}.parquet"
            write_slices(step(work, "chunks", name), table, partitions)
            report["segments"].append(name)
            report["good"] += table.num_rows
            times = table[TIME].to_numpy()
            report["first"] = _known(min, report["first"], int(times.min()))
            report["last"] = _known(max, report["last"], int(times.max()))

        for piece in pieces:
            try:
                for good in _clean_piece(piece, rules, chunk_rows, report, work):
                    waiting.append(good)
                    if sum(table.num_rows for table in waiting) >= chunk_rows:
                        flush()
            except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
                reason = " ".join(str(error).split())[:200]
                report["error"] = f"{piece.file.name}: expected readable {piece.file.format} data, found: {reason}"
                return report
        if waiting:
            flush()
        return report

    return once(step(work, "chunks", f"{number:06d}.json"), clean)


def _clean_piece(piece: Piece, rules: RowRules, chunk_rows: int, report: dict, work: str) -> Iterator[pa.Table]:
    rows = 0
    ragged: list[dict] = []
    for table in read_piece(piece, ragged, chunk_rows):
        good, bad = clean_rows(table, piece.file, rows, rules, report)
        quarantine.write(bad, work, piece.key, rows)
        rows += table.num_rows
        yield good
    if ragged:
        report["quarantine"]["wrong number of fields"] += len(ragged)
        rows += len(ragged)
        quarantine.write(ragged_rows(ragged, piece.file), work, piece.key, rows)
    report["rows"] += rows
    report["pieces"][piece.key] = rows


def sum_reports(reports: Iterable[dict]) -> dict:
    """Add chunk reports up: `rows`, `good`, `first`, `last` and COUNTERS; also sums of sums."""
    total: dict = {"rows": 0, "good": 0, "first": None, "last": None} | {name: Counter() for name in COUNTERS}
    for report in reports:
        for name in ("rows", "good"):
            total[name] += report[name]
        for name, choose in (("first", min), ("last", max)):
            total[name] = _known(choose, total[name], report[name])
        for name in COUNTERS:
            total[name].update(report[name])
    return total


def _known(choose: Callable, *values: int | None) -> int | None:
    return choose((value for value in values if value is not None), default=None)


@dataclass(frozen=True)
class TimeGrid:
    """Equal bins of whole seconds over all events, for the cuts of a `time` split.

    Attributes:
        low: UTC epoch microseconds where bin 0 begins. width: microseconds a bin.
    """

    low: int
    width: int

    @classmethod
    def over(cls, first: int, last: int) -> "TimeGrid":
        """The finest grid of at most HISTOGRAM_BINS + 1 bins over [first, last]."""
        low = first - first % SECOND_US
        return cls(low, -(-(last - low + 1) // (HISTOGRAM_BINS * SECOND_US)) * SECOND_US)


@dataclass(frozen=True)
class Counting:
    """How a partition is counted.

    Attributes:
        rule: the split; None while the cuts of a `time` split are not known.
        event_types: which events are positive.
        grid: bins of time to count, where cuts are wanted.
    """

    rule: SplitRule | None
    event_types: dict[str, EventType]
    grid: TimeGrid | None


def order(number: int, segments: Sequence[str], kept: str | None, counting: Counting, work: str) -> dict:
    """Gather a partition from all chunks, put it in order, write it to RAW, and count it.

    Args:
        number: of the partition.
        segments: names of the files of all chunks, in order.
        kept: URI of the same partition as an earlier call left it; its rows come before the new ones.
        counting: what is counted at once, while the rows are in memory.
        work: working folder.

    Returns:
        `bins` and `events`: the histogram of times, empty without a grid.
    """

    def gather() -> dict:
        tables = [] if kept is None else [read_row_group(kept, 0)]
        tables += [read_row_group(step(work, "chunks", name), number) for name in segments]
        table = order_partition([table for table in tables if table.num_rows])
        del tables
        write_row_groups(storage.join(work, RAW, part_name(number)), [table])
        if counting.rule is not None:
            _count(number, table, counting.rule, counting.event_types, work)
        if counting.grid is None:
            return {"bins": [], "events": []}
        times = split_partition(table, SplitRule("none")).times
        bins, events = np.unique((times - counting.grid.low) // counting.grid.width, return_counts=True)
        return {"bins": bins.tolist(), "events": events.tolist()}

    return once(step(work, "ordered", part_name(number, "json")), gather)


def count(number: int, rule: SplitRule, event_types: dict[str, EventType], work: str) -> dict:
    """Count a partition that is in order, once the cuts of a `time` split are known."""

    def read() -> dict:
        _count(number, read_row_group(storage.join(work, RAW, part_name(number)), 0), rule, event_types, work)
        return {}

    return once(step(work, "counted", part_name(number, "json")), read)


def _count(number: int, table: pa.Table, rule: SplitRule, event_types: dict[str, EventType], work: str) -> None:
    everything = split_partition(table, SplitRule(rule.kind, rule.valid_from, rule.test_from))
    flat = split_partition(table, rule) if rule.min_user_events else everything
    storage.write_table(step(work, "users", part_name(number)), pa.table({USER_ID: flat.users}))
    storage.write_table(step(work, "stats", part_name(number)), partition_stats(flat, event_types, len(everything.times)))


def encode(number: int, rule: SplitRule, user_idx: np.ndarray, vocabulary: Vocabulary, work: str) -> dict:
    """Write one shard of the prepared set.

    Returns:
        `users`, `train`, `valid`, `test`, `unknown_targets`, `positive` and `sums` (fingerprint).
    """

    def write() -> dict:
        table = read_row_group(storage.join(work, RAW, part_name(number)), 0)
        encoded = encode_partition(split_partition(table, rule), user_idx, vocabulary)
        if encoded.num_rows:
            storage.write_table(storage.join(work, SEQUENCES, part_name(number)), encoded)
        split, items, positive = (encoded[name].combine_chunks().flatten() for name in ("split", "item_idx", "positive"))
        parts = np.bincount(split.to_numpy(), minlength=len(SPLIT_CODES))
        return {
            **{name: int(parts[code]) for name, code in SPLIT_CODES.items()},
            "users": encoded.num_rows,
            "unknown_targets": int((items.to_numpy() == UNKNOWN_ITEM).sum()),
            "positive": positive.true_count,
            "sums": content_sums(encoded),
        }

    return once(step(work, "written", part_name(number, "json")), write)
