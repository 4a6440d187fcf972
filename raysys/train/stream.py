"""Training histories streamed by Ray Data, so that they never have to fit into a worker.

Every epoch the fragments (`survey.py`) are put in another order and taken
together in pools of so many events; a task reads a pool, cuts it into global
batches (`batches.py`) and hands this rank its share of each. What a batch is
depends on (seed, epoch, pool, index) alone.

Every rank has a stream of its own, made in the worker: `get_dataset_shard` would
give a pool to whichever rank asks first, and could neither take another order in
the next epoch nor start in the middle of one.
"""

from collections.abc import Callable, Generator, Iterator
from functools import partial

import numpy as np
import ray.data

from raysys.errors import RaysysError
from raysys.prepare.dataset import Sequences
from raysys.train.batches import Cut, InMemory, Pool, Source, cut_pool, pool_rng
from raysys.train.config import TrainConfig
from raysys.train.evidence import Evidence
from raysys.train.parts import Parts
from raysys.train.survey import Fragment, Survey, grouped, read_fragments

TASKS = 2
"""Pools that are cut at the same time for one rank."""
PIPELINE_POOLS = 64
"""Pools that one Ray Data pipeline is asked for at most, unless an epoch has more."""


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
        self._ahead: tuple[tuple[Cut, int, int], Generator[dict]] | None = None  # a pipeline that goes on with the next epoch
        self._left = 0  # epochs that it still has

    def pools(self, cut: Cut, *, epoch: int, first: int = 0) -> Iterator[Pool]:
        """See `Source`. Runs a Ray Data pipeline beside the training; its tasks take no CPU slots, the workers have them all."""
        num_pools = len(self.plan(cut.seed, epoch))
        # The processes of a pipeline take seconds to start, so one serves several epochs where they are short.
        if self._ahead is not None and self._ahead[0] == (cut, epoch, first):
            rows = self._ahead[1]
        else:
            self._left = max(1, PIPELINE_POOLS // num_pools)
            plans = {later: self.plan(cut.seed, later) for later in range(epoch, epoch + self._left)}
            todo = [(later, pool) for later, plan in plans.items() for pool in range(first if later == epoch else 0, len(plan))]
            rows = self._pipeline(todo, plans, cut)
        self._ahead = None
        for _ in range(first, num_pools):
            row = next(rows, None)
            if row is None:
                raise RaysysError(
                    f"{self.uri}: expected {num_pools} pools of epoch {epoch}, the stream ended early; see the log of Ray Data"
                )
            yield Pool(**row)
        self._left -= 1
        self._ahead = ((cut, epoch + 1, 0), rows) if self._left else None

    def close(self) -> None:
        """See `Source`."""
        if self._ahead is not None:
            self._ahead[1].close()
            self._ahead = None

    def _pipeline(self, todo: list[tuple[int, int]], plans: dict[int, list[list[Fragment]]], cut: Cut) -> Generator[dict]:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        rows = [{"epoch": epoch, "pool": pool, "fragments": [vars(one) for one in plans[epoch][pool]]} for epoch, pool in todo]
        cutting = partial(_cut, uri=self.uri, part=self.part(), cut=cut)
        yield from ray.data.from_items(rows, override_num_blocks=len(rows)).map(cutting, num_cpus=0, concurrency=TASKS).iter_rows()

    def plan(self, seed: int, epoch: int) -> list[list[Fragment]]:
        """The fragments of each pool of an epoch."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self.survey.fragments))
        return grouped((self.survey.fragments[index] for index in order), self.settings.scaling.shuffle_events)

    def part(self) -> Callable[[Sequences], Sequences]:
        """From all events of some users to those that the stage learns from."""
        return partial(_part, stage=self.stage, settings=self.settings, held=self.survey.held_out(self.settings))

    def num_windows(self, max_length: int) -> int:
        """See `Source`."""
        return self.survey.num_windows(self.stage, max_length, self.settings)


def _part(sequences: Sequences, *, stage: str, settings: TrainConfig, held: int) -> Sequences:
    return Parts(sequences, settings, held=held, has_validation=True).of(stage)


def _cut(row: dict, *, uri: str, part: Callable[[Sequences], Sequences], cut: Cut) -> dict:
    sequences = part(read_fragments(uri, [Fragment(**fragment) for fragment in row["fragments"]]))
    pool = cut_pool(sequences, cut, pool_rng(cut.seed, row["epoch"], row["pool"]))
    return vars(pool.compact())


def source_of(evidence: Evidence, stage: str) -> Source:
    """What the encoder learns from in a stage: in memory, or streamed."""
    if evidence.survey is None:
        return InMemory(evidence.piece(0).of(stage))
    return Streamed(evidence.prepared.uri, evidence.survey, evidence.settings, stage)
