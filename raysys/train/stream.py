"""Training histories streamed by Ray Data, so that they never have to fit into a worker.

A fragment is a row group of the prepared sequences. Every epoch the fragments
are put in another order and taken together in pools of so many events; a task
reads a pool, cuts it into global batches (`batches.py`) and hands this rank its
share of each. What a batch is depends on (seed, epoch, pool, index) alone.

Every rank has a stream of its own, made in the worker: `get_dataset_shard` would
give a pool to whichever rank asks first, and could neither take another order in
the next epoch nor start in the middle of one.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from raysys import storage
from raysys.errors import RaysysError
from raysys.prepare.dataset import SEQUENCES, Prepared, Sequences, to_sequences
from raysys.queries import Queries
from raysys.schema import UNKNOWN_ITEM
from raysys.train.batches import Pool, cut_pool, num_windows, pool_rng
from raysys.train.config import TrainConfig
from raysys.train.parts import MAX_HISTORY, MAX_VALIDATION_QUERIES, Judged, Parts, held_counts, held_out

TASKS = 2
"""Pools that are cut at the same time for one rank."""
PIPELINE_POOLS = 64
"""Pools that one Ray Data pipeline is asked for at most, unless an epoch has more."""


@dataclass(frozen=True)
class Fragment:
    """A row group: file below the prepared set, number, events."""

    file: str
    group: int
    events: int


@dataclass(frozen=True)
class Survey:
    """What every worker has to know of the whole, from one pass over it.

    Attributes:
        fragments: all of them, in the order of files.
        train: (L+1,) users by number of training events. upto_valid: the same with the validation part.
        valid: whether there is a validation part.
        repeats: share of training events whose user had the item before.
    """

    fragments: list[Fragment]
    train: np.ndarray
    upto_valid: np.ndarray
    valid: bool
    repeats: float

    @classmethod
    def of(cls, prepared: Prepared) -> "Survey":
        """Read item and split columns, a fragment at a time."""
        fragments = list_fragments(prepared)
        train, both = np.zeros(1, np.int64), np.zeros(1, np.int64)
        repeated, events = 0.0, 0
        for fragment in fragments:
            sequences = read_fragments(prepared.uri, [fragment])
            learnt = sequences.train()
            train = _added(train, np.diff(learnt.indptr))
            repeated, events = repeated + learnt.repeats * len(learnt.items), events + len(learnt.items)
            upto = sequences.upto("valid")
            both = _added(both, np.diff(upto.where(upto.items != UNKNOWN_ITEM).indptr))
        return cls(fragments, train, both, prepared.manifest["counts"]["valid"] > 0, repeated / max(1, events))

    @property
    def lengths(self) -> np.ndarray:
        """(U,) training events of each user, in no order."""
        return np.repeat(np.arange(len(self.train)), self.train)

    def held_out(self, settings: TrainConfig) -> int:
        """See `parts.held_out`."""
        return held_out(int(self.train[2:].sum()), settings)

    def num_windows(self, stage: str, max_length: int, settings: TrainConfig) -> int:
        """Windows of an epoch of a stage."""
        users = self.upto_valid if stage == "last refit" else self.train
        lengths = np.arange(len(users))
        held = held_counts(lengths, self.held_out(settings)) if stage == "fit" else 0
        return num_windows(lengths - held, max_length, users)


def list_fragments(prepared: Prepared) -> list[Fragment]:
    """Row groups of the sequences, in the order of file names."""
    filesystem, path = storage.resolve(storage.join(prepared.uri, SEQUENCES))
    found = []
    for name in storage.list_dir(storage.join(prepared.uri, SEQUENCES)):
        if name.endswith(".parquet"):
            footer = pq.read_metadata(f"{path}/{name}", filesystem=filesystem)
            found += [Fragment(name, group, _events(footer, group)) for group in range(footer.num_row_groups)]
    return found


def _events(footer: pq.FileMetaData, group: int) -> int:
    columns = (footer.row_group(group).column(index) for index in range(footer.num_columns))
    return next(column.num_values for column in columns if column.path_in_schema.startswith("item_idx"))


def read_fragments(uri: str, fragments: list[Fragment]) -> Sequences:
    """The users of some fragments, as they lie there."""
    tables = []
    for fragment in fragments:
        filesystem, path = storage.resolve(storage.join(uri, SEQUENCES, fragment.file))
        with filesystem.open_input_file(path) as file:
            tables.append(pq.ParquetFile(file).read_row_group(fragment.group))
    return to_sequences(pa.concat_tables(tables).combine_chunks())


class Streamed:
    """One stage's histories as a `batches.Source`.

    Args:
        uri: the prepared set.
        survey: of it.
        settings: of the training.
        stage: which part of each history is learnt from; see `Parts.of`.
    """

    def __init__(self, uri: str, survey: Survey, settings: TrainConfig, stage: str):
        self.uri, self.survey, self.settings, self.stage = uri, survey, settings, stage
        self._ahead: tuple[dict, Generator[dict]] | None = None  # a pipeline that goes on with the next epoch
        self._left = 0  # epochs that it still has

    def pools(
        self, *, max_length: int, batch_size: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1, first: int = 0
    ) -> Iterator[Pool]:
        """See `Source`. Runs a Ray Data pipeline beside the training; its tasks take no CPU slots, the workers have them all."""
        options = {"max_length": max_length, "batch_size": batch_size, "seed": seed, "rank": rank, "world_size": world_size}
        asked = {**options, "epoch": epoch, "first": first}
        num_pools = len(self.plan(seed, epoch))
        # The processes of a pipeline take seconds to start, so one serves several epochs where they are short.
        if self._ahead is not None and self._ahead[0] == asked:
            rows = self._ahead[1]
        else:
            self._left = max(1, PIPELINE_POOLS // num_pools)
            plans = {later: self.plan(seed, later) for later in range(epoch, epoch + self._left)}
            todo = [(later, pool) for later, plan in plans.items() for pool in range(first if later == epoch else 0, len(plan))]
            rows = self._pipeline(todo, plans, options)
        self._ahead = None
        for _ in range(first, num_pools):
            row = next(rows, None)
            if row is None:
                raise RaysysError(
                    f"{self.uri}: expected {num_pools} pools of epoch {epoch}, the stream ended early; see the log of Ray Data"
                )
            yield Pool(**row)
        self._left -= 1
        self._ahead = ({**asked, "epoch": epoch + 1, "first": 0}, rows) if self._left else None

    def close(self) -> None:
        """See `Source`."""
        if self._ahead is not None:
            self._ahead[1].close()
            self._ahead = None

    def _pipeline(self, todo: list[tuple[int, int]], plans: dict[int, list[list[Fragment]]], options: dict) -> Generator[dict]:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        rows = [{"epoch": epoch, "pool": pool, "fragments": [vars(one) for one in plans[epoch][pool]]} for epoch, pool in todo]
        cut = partial(_cut, uri=self.uri, part=self.part(), **options)
        yield from ray.data.from_items(rows, override_num_blocks=len(rows)).map(cut, num_cpus=0, concurrency=TASKS).iter_rows()

    def plan(self, seed: int, epoch: int) -> list[list[Fragment]]:
        """The fragments of each pool of an epoch."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self.survey.fragments))
        pools: list[list[Fragment]] = []
        events = 0
        for fragment in (self.survey.fragments[index] for index in order):
            if not pools or events + fragment.events > self.settings.scaling.shuffle_events:
                pools.append([])
                events = 0
            pools[-1].append(fragment)
            events += fragment.events
        return pools

    def part(self) -> Callable[[Sequences], Sequences]:
        """From all events of some users to those that the stage learns from."""
        return partial(_part, stage=self.stage, settings=self.settings, held=self.survey.held_out(self.settings))

    def num_windows(self, max_length: int) -> int:
        """See `Source`."""
        return self.survey.num_windows(self.stage, max_length, self.settings)


def _part(sequences: Sequences, *, stage: str, settings: TrainConfig, held: int) -> Sequences:
    return Parts(sequences, settings, held=held, has_validation=True).of(stage)


def _cut(
    row: dict,
    *,
    uri: str,
    part: Callable[[Sequences], Sequences],
    max_length: int,
    batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
) -> dict:
    sequences = part(read_fragments(uri, [Fragment(**fragment) for fragment in row["fragments"]]))
    rng = pool_rng(seed, row["epoch"], row["pool"])
    pool = cut_pool(sequences, max_length=max_length, batch_size=batch_size, rng=rng, rank=rank, world_size=world_size)
    return vars(pool.compact())


def streamed_judged(prepared: Prepared, survey: Survey, settings: TrainConfig) -> Judged:
    """What `Judged.of` gives, from a fragment at a time."""
    held = survey.held_out(settings)

    def fragments() -> Iterator[tuple[Parts, np.ndarray]]:
        for fragment in survey.fragments:
            parts = Parts(read_fragments(prepared.uri, [fragment]), settings, held=held, has_validation=survey.valid)
            yield parts, parts.choice if survey.valid else parts.heldout

    total = sum(len(positions) for _, positions in fragments())
    rng = np.random.default_rng(settings.seed)
    picked = np.arange(total) if total <= MAX_VALIDATION_QUERIES else np.sort(rng.choice(total, MAX_VALIDATION_QUERIES, replace=False))
    warm = np.zeros(prepared.num_items, bool)
    found, targets, before = [], [], 0
    for parts, positions in fragments():
        warm[parts.fit.items] = True
        here = positions[picked[(picked >= before) & (picked < before + len(positions))] - before]
        before += len(positions)
        found.append(parts.all.queries_before(here, max_events=MAX_HISTORY))
        targets.append(parts.all.items[here])
    return Judged(_together(found), np.concatenate(targets), warm)


def _together(parts: list[Queries]) -> Queries:
    lengths = np.concatenate([part.lengths for part in parts])
    items, events, times, now = (np.concatenate([getattr(part, name) for part in parts]) for name in ("items", "events", "times", "now"))
    return Queries(items, events, times, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), now)


def _added(histogram: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    found = np.bincount(lengths, minlength=len(histogram))
    found[: len(histogram)] += histogram
    return found
