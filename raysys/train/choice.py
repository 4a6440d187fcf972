"""What is decided on held-out positions, once the sources answer them: the ranker learnt there, and its weight in the final score.

None of the models that answer a position has seen it. Runs in one process, without Ray.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from raysys.models.base import Candidates
from raysys.models.grading import Grading
from raysys.models.ranker import Ranker
from raysys.pipeline import Pipeline, mix_scores, seen_mask
from raysys.queries import Queries
from raysys.train.config import TrainConfig
from raysys.train.evidence import Evidence
from raysys.train.judge import learn_judge
from raysys.train.parts import Held, chunks
from raysys.train.ranker import train_ranker

RANKER_WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
MAX_WEIGHT_QUERIES = 4000
"""Positions on which the ranker's weight is chosen, at most."""
MAX_CHOICE_SCORES = 40_000_000
"""Validation queries times items looked at when fusion is chosen; bounds memory."""
AT_ONCE = 256
"""Queries answered together."""


def max_judged(num_items: int) -> int:
    """Positions on which the judge stops and is calibrated, at most."""
    return int(np.clip(MAX_CHOICE_SCORES // num_items, 2000, 10_000))


def max_fusion_queries(num_items: int) -> int:
    """Positions on which fusion is chosen, at most."""
    return max(200, MAX_CHOICE_SCORES // num_items)


def fusion_arguments(pipeline: Pipeline, held: Held) -> tuple[dict[str, Callable], np.ndarray, Callable]:
    """Scores of each source, targets and masks of some positions: arguments of `choose_fusion` and `judge_fusion`."""
    scorers: dict[str, Callable] = {name: partial(_scores_of, model, held.queries) for name, model in pipeline.bundle.models.items()}
    return scorers, held.targets, lambda rows: seen_mask(held.queries[rows], pipeline.num_items)


def learn_ranker(pipeline: Pipeline, evidence: Evidence, grading: Grading, settings: TrainConfig) -> tuple[Ranker, dict]:
    """A ranker that learns from what the pipeline retrieves for the held-out positions; see `train_ranker` and `learn_judge`.

    Args:
        pipeline: of sources that were fitted on `Parts.fit`, with their final mixture.
        evidence: of all users.
        grading: how events are read.
        settings: of the training.
    """
    held = evidence.held("heldout", settings.max_ranker_queries)
    kept, singles = [], []
    for rows in chunks(len(held), AT_ONCE):
        query = held.queries[rows]
        log_probs = pipeline.source_log_probs(query)
        retrieved = pipeline.retrieve(query, allowed=seen_mask(query, pipeline.num_items), log_probs=log_probs)
        kept.append(retrieved.candidates)
        singles.append(pipeline.candidates_of(query, held.targets[rows][:, None], log_probs=log_probs))
    judge = learn_judge(
        pipeline,
        evidence.sample("fit"),
        held,
        Candidates.stack(singles),
        evidence.held("choice", max_judged(pipeline.num_items)),
        grading=grading,
        ordinal_time=evidence.prepared.ordinal_time,
        config=settings.judge,
        seed=settings.seed,
    )
    models = pipeline.bundle.models
    vectors = models["interest"].item_vectors if "interest" in models else models["dot_product"].item_vectors
    return train_ranker(
        held.queries,
        Candidates.stack(kept),
        held.targets,
        judge,
        item_vectors=vectors,
        content_vectors=models["content"].item_vectors if "content" in models else None,
        item_counts=evidence.item_counts,
        config=settings.ranker,
        seed=settings.seed,
    )


def choose_ranker_weight(pipeline: Pipeline, held: Held) -> tuple[float, dict[float, float]]:
    """The ranker's weight in the final score, 0 where it does not help, and NDCG@10 by weight."""
    assert pipeline.ranker is not None
    gains: dict[float, list[np.ndarray]] = {weight: [] for weight in RANKER_WEIGHTS}
    for rows in chunks(len(held), AT_ONCE):
        query = held.queries[rows]
        candidates = pipeline.retrieve(query, allowed=seen_mask(query, pipeline.num_items)).candidates
        logits, _ = pipeline.ranker.score(query, candidates)
        hit = candidates.items == held.targets[rows][:, None]
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


def _scores_of(model: Any, queries: Queries, rows: slice) -> np.ndarray:
    return model.scores(queries[rows])
