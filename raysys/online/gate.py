"""May an update be published? Figures of the serving and the updated version, and the bounds between them.

Judges whole bundles by the code that serves. Two slices: `new`, the newest events, which the update has not seen; and `anchor`,
the last known events of users without news, which say what is being forgotten.
"""

import numpy as np

from raysys.bundle import Bundle
from raysys.evaluate import metrics
from raysys.online.config import OnlineConfig
from raysys.pipeline import Pipeline, seen_mask
from raysys.prepare.dataset import Sequences

K = 10
MAX_BATCH_SCORES = 1 << 21
"""Scores of one source in an evaluation batch."""
MAX_COMPARED = 200
"""Queries whose whole distributions are compared, serving against updated."""
MAX_COMPARED_SCORES = 1 << 24
"""Scores held of either distribution."""


def score(bundle: Bundle, sequences: Sequences, positions: np.ndarray) -> np.ndarray:
    """(Q, 2) NDCG@10 and Recall@10 of the live code for the events at `positions`; NaN where a score is not a number."""
    pipeline = Pipeline(bundle)
    size = max(1, min(256, MAX_BATCH_SCORES // pipeline.num_items))
    parts = [np.zeros((0, 2))]
    for first in range(0, len(positions), size):
        batch = positions[first : first + size]
        queries = sequences.queries_before(batch)
        items, scores, _ = pipeline.recommend(queries, K, allowed=seen_mask(queries, pipeline.num_items))
        values = metrics.rank_metrics(metrics.list_ranks(items, sequences.items[batch]), (K,))
        both = np.stack([values[f"ndcg@{K}"], values[f"recall@{K}"]], axis=1)
        parts.append(np.where(np.isnan(scores).any(axis=1)[:, None], np.nan, both))
    return np.concatenate(parts)


def named(values: np.ndarray) -> dict[str, float | int]:
    """The means of `score`, for reports."""
    if not len(values):
        return {"events": 0}
    return {"events": len(values), f"ndcg@{K}": float(values[:, 0].mean()), f"recall@{K}": float(values[:, 1].mean())}


def verdict(candidate: Bundle, slices: dict[str, tuple[np.ndarray, np.ndarray]], config: OnlineConfig, gate: dict) -> str:
    """Why the candidate must not be published; empty when it may. Fills `gate` with the figures.

    A loss counts as far as it is more than one standard error: less cannot be told from the luck of the sample.
    """
    for name, model in candidate.models.items():
        bad = [key for key, array in model.to_arrays()[0].items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
        if bad:
            return f"{name} has values that are not finite in {', '.join(bad)}"
    for name, (before, after) in slices.items():
        gate[name] = {"serving": named(before), "updated": named(after)}
        if not len(before):
            continue
        losses = before[:, 0] - after[:, 0]
        if not losses.mean() - losses.std() / np.sqrt(len(losses)) <= config.margin:
            return f"NDCG@{K} on the {name} slice fell by {losses.mean():.4f}, the margin is {config.margin:g}"
    return ""


def shifted(
    bundle: Bundle,
    candidate: Bundle,
    slices: dict[str, tuple[Sequences, np.ndarray]],
    config: OnlineConfig,
    gate: dict,
) -> str:
    """Why the candidate's probabilities must not be published; empty when they may. Adds the figures to `gate`.

    Calibration: log loss is a proper score, it rises when a model grows too sure. Drift: people of whom nothing new
    is known should mostly be told what they were told before.
    """
    for name, (sequences, positions) in slices.items():
        positions = positions[-min(MAX_COMPARED, max(1, MAX_COMPARED_SCORES // bundle.items.num_rows)) :]
        if not len(positions):
            continue
        rows, targets = np.arange(len(positions)), sequences.items[positions]
        before, after = (_distribution(one, sequences, positions) for one in (bundle, candidate))
        if name == "anchor":
            drift = gate[name]["drift"] = float(0.5 * np.abs(np.exp(before) - np.exp(after)).sum(axis=1).mean())
            if not drift <= config.max_drift:
                return f"score drift: answers to users without news moved by {drift:.3f}, at most {config.max_drift:g} is allowed"
            after = _distribution(as_mixed(candidate, bundle), sequences, positions)
        rise = gate[name]["log_loss_rise"] = float((before[rows, targets] - after[rows, targets]).mean())
        if not rise <= config.max_log_loss_rise:
            return f"calibration: log loss on the {name} slice rose by {rise:.3f} nats, at most {config.max_log_loss_rise:g} is allowed"
    return ""


def as_mixed(candidate: Bundle, bundle: Bundle) -> Bundle:
    """The candidate's models in the mixture of another version.

    So it is judged by anchor users: their events have been learnt, by some sources more than by others, and would speak for those.
    """
    return Bundle(candidate.items, candidate.models, bundle.fusion, candidate.histories, candidate.manifest)


def _distribution(bundle: Bundle, sequences: Sequences, positions: np.ndarray) -> np.ndarray:
    """(Q, N) float32 log-probability of the next item before each position, as retrieval fuses it."""
    pipeline, queries = Pipeline(bundle), sequences.queries_before(positions)
    return pipeline.fusion.fuse(pipeline.source_log_probs(queries), empty=queries.lengths == 0)
