"""What a bundle is worth and what it costs, on one sample of validation events: every candidate is asked the same."""

import os
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from raysys import storage
from raysys.bundle import Bundle
from raysys.errors import ConfigError, SchemaError
from raysys.evaluate import metrics
from raysys.evaluate.run import matched_sequences
from raysys.evaluate.stages import Stages
from raysys.pipeline import Pipeline
from raysys.prepare.dataset import Prepared

K = 10
SINGLES, BATCH, BATCHES = 300, 64, 20
"""Requests timed one at a time, and size and number of the batches that throughput is taken from."""


@dataclass(frozen=True)
class Figures:
    """One bundle on the sample.

    Attributes:
        ndcg: (Q,) NDCG@10 of the final order, by query.
        auc: of the ranker's probabilities; None where there is none.
        num_bytes: of the bundle on disk.
        p50_ms: of retrieval and ranking of one request, one thread, without HTTP.
        per_second: requests in batches, one thread.
    """

    ndcg: np.ndarray
    auc: float | None
    num_bytes: int
    p50_ms: float
    per_second: float


class Judge:
    """Validation events and how to ask about them.

    Args:
        prepared: with a validation part.
        bundle: the original; items and events are matched by name.
        max_queries: events at most.
        seed: of their sample and of ties.

    Raises:
        ConfigError: the bundle was fitted on the validation part.
        SchemaError: there is no validation part.
    """

    def __init__(self, prepared: Prepared, bundle: Bundle, max_queries: int, seed: int):
        if bundle.manifest.get("fit") == "train+valid":
            raise ConfigError(
                f"bundle {bundle.version} was fitted on train+valid: expected one fitted on train, or nothing unseen can judge"
            )
        sequences = matched_sequences(prepared, bundle)
        positions = sequences.target_positions("valid")
        if not len(positions):
            raise SchemaError(f"{prepared.uri}: expected a validation part, found none; prepare with --split leave-one-out or time")
        if len(positions) > max_queries:
            positions = np.sort(np.random.default_rng(seed).choice(positions, max_queries, replace=False))
        self.queries, self.targets = sequences.queries_before(positions, max_events=500), sequences.items[positions]
        self.positive, self.seed = sequences.positive[positions], seed

    def figures(self, bundle: Bundle, *, packing: bool) -> Figures:
        """Quality and cost of a bundle, as it would be written."""
        stages = Stages(Pipeline(bundle), mask=True, list_k=200, seed=self.seed)
        for first in range(0, len(self.targets), 128):
            rows = slice(first, first + 128)
            stages.add(self.queries[rows], self.targets[rows])
        ranks = np.concatenate(stages.ranks["final"])
        p50_ms, per_second = self._speed(Pipeline(bundle).frozen())
        ndcg = metrics.rank_metrics(ranks, (K,))[f"ndcg@{K}"]
        return Figures(ndcg, stages.ranker_figures(self.positive)["auc"], bytes_of(bundle, packing=packing), p50_ms, per_second)

    def _speed(self, pipeline: Pipeline) -> tuple[float, float]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with threadpool_limits(1):  # of NumPy's products too, as in a replica
                times = [_seconds(pipeline, self.queries[row : row + 1]) for row in range(min(SINGLES, len(self.targets)))]
                batches = [self.queries[first : first + BATCH] for first in range(0, min(BATCHES * BATCH, len(self.targets)), BATCH)]
                batch_s = float(np.median([_seconds(pipeline, batch) / len(batch) for batch in batches]))
            return float(np.median(times)) * 1000, 1 / batch_s
        finally:
            torch.set_num_threads(threads)


def bytes_of(bundle: Bundle, *, packing: bool) -> int:
    """Bytes of the bundle on disk, all files."""
    with tempfile.TemporaryDirectory(prefix="raysys-compress-") as folder:
        kept = dict(bundle.manifest)
        Bundle(bundle.items, bundle.models, bundle.fusion, bundle.histories).write(
            storage.join(folder, "bundle"), manifest=kept, packing=packing
        )
        return sum(entry.stat().st_size for entry in os.scandir(storage.join(folder, "bundle")))


def _seconds(pipeline: Pipeline, queries) -> float:
    started = time.perf_counter()
    pipeline.rank(queries, pipeline.retrieve(queries).candidates)
    return time.perf_counter() - started
