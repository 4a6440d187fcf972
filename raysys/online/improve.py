"""One step of continual learning: a bundle and new events in, updated models and a verdict out.

Knows neither log nor registry, and sees no user ids. Order of judgement: the
serving models first predict every new event before anything learns from it
(prequential), then a candidate that learnt from the older new events predicts
the newest ones. Only after both is the published update made, from all events.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raysys.bundle import Bundle
from raysys.evaluate import metrics
from raysys.models.base import Arrays, Meta
from raysys.models.interest import InterestRetriever
from raysys.online.config import OnlineConfig
from raysys.online.feed import Fresh, sampled_histories
from raysys.pipeline import Pipeline, seen_mask
from raysys.prepare.dataset import Sequences
from raysys.train.batches import InMemory
from raysys.train.encoder import EncoderTrainConfig, train_encoder

K = 10
MAX_BATCH_SCORES = 1 << 21
"""Scores of one source in an evaluation batch."""
MAX_COMPARED = 200
"""Queries whose whole distributions are compared, serving against updated."""
MAX_COMPARED_SCORES = 1 << 24
"""Scores held of either distribution."""


@dataclass(frozen=True)
class Improvement:
    """What a step came to.

    Attributes:
        models: name -> (arrays, metadata) of the models that changed; empty when refused.
        passed: whether the update may be published.
        reason: in words, why not; empty when passed.
        figures: prequential and gate metrics, JSON-ready.
    """

    models: dict[str, tuple[Arrays, Meta]]
    passed: bool
    reason: str
    figures: dict[str, Any]


def improve(bundle: Bundle, fresh: Fresh, config: OnlineConfig, seed: int) -> Improvement:
    """Update the models of a bundle with new events, and judge the result.

    Args:
        bundle: the serving version; not changed.
        fresh: at least one new event.
        config: settings.
        seed: of samples and dropout; the same seed and events give the same models.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        return _improve(bundle, fresh, config, seed)
    finally:
        torch.set_num_threads(threads)


def _improve(bundle: Bundle, fresh: Fresh, config: OnlineConfig, seed: int) -> Improvement:
    rng = np.random.default_rng([config.seed, seed])
    sequences, arrival = fresh.sequences, fresh.arrival
    away = [*fresh.keys, *fresh.erased]
    anchors = sampled_histories(bundle.histories, away, config.anchor_users, rng)
    replay = sampled_histories(bundle.histories, away, config.replay_users, rng)
    anchor_positions = anchors.last_positions()
    oldest_judged = max(0, fresh.num_events - config.max_evaluated)
    judged = np.flatnonzero(arrival >= oldest_judged)
    prequential = _score(bundle, sequences, judged)
    anchor = _score(bundle, anchors, anchor_positions)
    figures: dict[str, Any] = {"events": fresh.num_events, "prequential": _named(prequential), "gate": {}}

    cut = fresh.num_events - int(config.holdout_share * fresh.num_events)
    if 0 < cut < fresh.num_events:
        older = arrival < cut
        candidate = _updated(bundle, sequences.where(older), arrival[older] >= 0, replay, config, seed)
        held_out = judged[arrival[judged] >= cut]
        slices = {
            "new": (prequential[arrival[judged] >= cut], _score(candidate, sequences, held_out)),
            "anchor": (anchor, _score(candidate, anchors, anchor_positions)),
        }
        reason = _verdict(candidate, slices, config.margin, figures["gate"]) or _shifted(
            bundle, candidate, {"new": (sequences, held_out), "anchor": (anchors, anchor_positions)}, config, figures["gate"]
        )
        if reason:
            return Improvement({}, False, reason, figures)
    final = _updated(bundle, sequences, arrival >= 0, replay, config, seed)
    reason = _verdict(final, {"anchor": (anchor, _score(final, anchors, anchor_positions))}, config.margin, figures["gate"]) or _shifted(
        bundle, final, {"anchor": (anchors, anchor_positions)}, config, figures["gate"]
    )
    if reason:
        return Improvement({}, False, reason, figures)
    changed = {name: model.to_arrays() for name, model in final.models.items() if model is not bundle.models[name]}
    return Improvement(changed, True, "", figures)


def _updated(bundle: Bundle, sequences: Sequences, new: np.ndarray, replay: Sequences, config: OnlineConfig, seed: int) -> Bundle:
    models = dict(bundle.models)
    if "covisit" in models:
        models["covisit"] = models["covisit"].update(sequences, new)
    models["popularity"] = models["popularity"].update(sequences.items[new], sequences.events[new], sequences.times[new])
    if "interest" in models and config.epochs > 0:
        models["interest"] = _fine_tuned(models["interest"], sequences, new, replay, config, seed)
    if "ranker" in models:
        models["ranker"] = models["ranker"].counted(sequences, new)
    return Bundle(bundle.items, models, bundle.fusion, bundle.histories, bundle.manifest)


def _fine_tuned(
    retriever: InterestRetriever, sequences: Sequences, new: np.ndarray, replay: Sequences, config: OnlineConfig, seed: int
) -> InterestRetriever:
    """The encoder after a few steps on the users with new events; others are replayed, so that it does not forget them."""
    clone = InterestRetriever.from_arrays(*retriever.to_arrays())
    # No running average: over the few steps of a round it would keep the old weights and learn next to nothing.
    settings = EncoderTrainConfig(epochs=config.epochs, batch_size=config.batch_size, lr=config.lr, warmup_steps=0, ema=0.0)
    train_encoder(clone.encoder, InMemory(_together(sequences, replay)), settings, seed=seed)
    warm = clone.warm.copy()
    warm[sequences.items[new]] = True
    return InterestRetriever(clone.encoder, warm)


def _together(first: Sequences, second: Sequences) -> Sequences:
    indptr = np.concatenate([first.indptr, first.indptr[-1] + second.indptr[1:]])
    names = ("items", "events", "times", "values", "positive", "split")
    flat = [np.concatenate([getattr(first, name), getattr(second, name)]) for name in names]
    return Sequences(np.arange(len(indptr) - 1, dtype=np.int32), indptr, *flat)


def _score(bundle: Bundle, sequences: Sequences, positions: np.ndarray) -> np.ndarray:
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


def _named(values: np.ndarray) -> dict[str, float | int]:
    if not len(values):
        return {"events": 0}
    return {"events": len(values), f"ndcg@{K}": float(values[:, 0].mean()), f"recall@{K}": float(values[:, 1].mean())}


def _verdict(candidate: Bundle, slices: dict[str, tuple[np.ndarray, np.ndarray]], margin: float, gate: dict) -> str:
    """Why the candidate must not be published; empty when it may. Fills `gate` with the figures."""
    for name, model in candidate.models.items():
        bad = [key for key, array in model.to_arrays()[0].items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
        if bad:
            return f"{name} has values that are not finite in {', '.join(bad)}"
    for name, (before, after) in slices.items():
        gate[name] = {"serving": _named(before), "updated": _named(after)}
        if not len(before):
            continue
        loss = float((before[:, 0] - after[:, 0]).mean())
        if not loss <= margin:
            return f"NDCG@{K} on the {name} slice fell by {loss:.4f}, the margin is {margin:g}"
    return ""


def _shifted(bundle: Bundle, candidate: Bundle, slices: dict[str, tuple[Sequences, np.ndarray]], config: OnlineConfig, gate: dict) -> str:
    """Why the candidate's probabilities must not be published; empty when they may. Adds the figures to `gate`.

    Calibration: log loss is a proper score, it rises when a model grows too sure. Drift: people of whom nothing new
    is known should mostly be told what they were told before.
    """
    for name, (sequences, positions) in slices.items():
        positions = positions[-min(MAX_COMPARED, max(1, MAX_COMPARED_SCORES // bundle.items.num_rows)) :]
        if not len(positions):
            continue
        before, after = (_distribution(one, sequences, positions) for one in (bundle, candidate))
        rows, targets = np.arange(len(positions)), sequences.items[positions]
        rise = float((before[rows, targets] - after[rows, targets]).mean())
        gate[name]["log_loss_rise"] = rise
        if not rise <= config.max_log_loss_rise:
            return f"calibration: log loss on the {name} slice rose by {rise:.3f} nats, at most {config.max_log_loss_rise:g} is allowed"
        if name == "anchor":
            drift = float(0.5 * np.abs(np.exp(before) - np.exp(after)).sum(axis=1).mean())
            gate[name]["drift"] = drift
            if not drift <= config.max_drift:
                return f"score drift: answers to users without news moved by {drift:.3f}, at most {config.max_drift:g} is allowed"
    return ""


def _distribution(bundle: Bundle, sequences: Sequences, positions: np.ndarray) -> np.ndarray:
    """(Q, N) float32 log-probability of the next item before each position, as retrieval fuses it."""
    pipeline, queries = Pipeline(bundle), sequences.queries_before(positions)
    return pipeline.fusion.fuse(pipeline.source_log_probs(queries), empty=queries.lengths == 0)
