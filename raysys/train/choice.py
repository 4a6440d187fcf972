"""What is decided on held-out positions, once the sources answer them: the ranker learnt there, and its weight in the final score.

`Judged` positions are seen by none of the models that answer them. Runs in one process, without Ray.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from raysys.models.base import Candidates
from raysys.models.ranker import Ranker
from raysys.pipeline import Pipeline, mix_scores, seen_mask
from raysys.prepare.dataset import Sequences
from raysys.queries import Queries
from raysys.train.config import TrainConfig
from raysys.train.parts import MAX_HISTORY, chunks
from raysys.train.ranker import Logged, train_ranker

RANKER_WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
MAX_WEIGHT_QUERIES = 4000
"""Positions on which the ranker's weight is chosen, at most."""
MAX_CHOICE_SCORES = 40_000_000
"""Validation queries times items looked at when fusion is chosen; bounds memory."""
AT_ONCE = 256
"""Queries answered together."""


def max_fusion_queries(num_items: int) -> int:
    """Positions on which fusion is chosen, at most."""
    return max(200, MAX_CHOICE_SCORES // num_items)


def fusion_arguments(pipeline: Pipeline, sequences: Sequences, positions: np.ndarray) -> tuple[dict[str, Callable], np.ndarray, Callable]:
    """Scores of each source, targets and masks of some positions: arguments of `choose_fusion` and `judge_fusion`."""
    queries = sequences.queries_before(positions, max_events=MAX_HISTORY)
    scorers: dict[str, Callable] = {name: partial(_scores_of, model, queries) for name, model in pipeline.bundle.models.items()}
    return scorers, sequences.items[positions].astype(np.int64), lambda rows: seen_mask(queries[rows], pipeline.num_items)


def learn_ranker(
    pipeline: Pipeline, sequences: Sequences, positions: np.ndarray, *, item_counts: np.ndarray, settings: TrainConfig
) -> tuple[Ranker, dict]:
    """A ranker that learns from what the pipeline retrieves for some positions; see `train_ranker`.

    Args:
        pipeline: of sources that have not seen the positions, with their final mixture.
        sequences: of the positions.
        positions: flat.
        item_counts: (N,) events that the sources were fitted on.
        settings: of the training.
    """
    queries = sequences.queries_before(positions, max_events=MAX_HISTORY)
    targets = sequences.items[positions].astype(np.int64)
    kept, singles = [], []
    for rows in chunks(len(positions), AT_ONCE):
        query = queries[rows]
        log_probs = pipeline.source_log_probs(query)
        retrieved = pipeline.retrieve(query, allowed=seen_mask(query, pipeline.num_items), log_probs=log_probs)
        kept.append(retrieved.candidates)
        singles.append(pipeline.candidates_of(query, targets[rows][:, None], log_probs=log_probs))
    positive = sequences.positive[positions]
    logged = Logged(_concatenate(singles), positive) if positive.any() and not positive.all() else None
    models = pipeline.bundle.models
    vectors = models["interest"].item_vectors if "interest" in models else models["dot_product"].item_vectors
    return train_ranker(
        queries,
        _concatenate(kept),
        targets,
        logged,
        item_vectors=vectors,
        content_vectors=models["content"].item_vectors if "content" in models else None,
        item_counts=item_counts,
        config=settings.ranker,
        seed=settings.seed,
    )


def choose_ranker_weight(pipeline: Pipeline, sequences: Sequences, positions: np.ndarray) -> tuple[float, dict[float, float]]:
    """The ranker's weight in the final score, 0 where it does not help, and NDCG@10 by weight."""
    assert pipeline.ranker is not None
    queries = sequences.queries_before(positions, max_events=MAX_HISTORY)
    targets = sequences.items[positions]
    gains: dict[float, list[np.ndarray]] = {weight: [] for weight in RANKER_WEIGHTS}
    for rows in chunks(len(positions), AT_ONCE):
        query = queries[rows]
        candidates = pipeline.retrieve(query, allowed=seen_mask(query, pipeline.num_items)).candidates
        logits, _ = pipeline.ranker.score(query, candidates)
        hit = candidates.items == targets[rows][:, None]
        for weight in RANKER_WEIGHTS:
            scores = mix_scores(candidates.fused, logits, weight)
            of_target = np.where(hit, scores, -np.inf).max(axis=1, keepdims=True)
            ranks = (scores > of_target).sum(axis=1)
            gains[weight].append(np.where(hit.any(axis=1) & (ranks < 10), 1 / np.log2(ranks + 2.0), 0.0))
    means = {weight: float(np.concatenate(values).mean()) for weight, values in gains.items()}
    best = np.concatenate(gains[max(means, key=lambda weight: means[weight])])

    def is_as_good(weight: float) -> bool:
        behind = best - np.concatenate(gains[weight])
        return behind.mean() <= behind.std() / np.sqrt(len(behind))

    # The least weight within one standard error of the best one: more than that is fitted to the sample.
    return next(weight for weight in RANKER_WEIGHTS if is_as_good(weight)), means


def _concatenate(parts: list[Candidates]) -> Candidates:
    items, fused, log_probs = (np.concatenate([getattr(part, name) for part in parts]) for name in ("items", "fused", "log_probs"))
    return Candidates(items, fused, log_probs, parts[0].sources)


def _scores_of(model: Any, queries: Queries, rows: slice) -> np.ndarray:
    return model.scores(queries[rows])
