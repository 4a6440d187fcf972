"""One step of continual learning: a bundle and new events in, updated models and a verdict out.

Knows neither log nor registry, and sees no user ids. Order of judgement: the
serving models first predict every new event before anything learns from it
(prequential), then a candidate that learnt from the older new events predicts
the newest ones. Only after both is the published update made, from all events.
"""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from raysys.bundle import Bundle
from raysys.evaluate import metrics
from raysys.models.base import Arrays, Meta
from raysys.models.fusion import Fusion
from raysys.models.interest import InterestRetriever
from raysys.models.ranker import Ranker
from raysys.online.config import OnlineConfig
from raysys.online.feed import Fresh, sampled_histories
from raysys.online.mixture import Evidence
from raysys.online.recent import RECENT, with_recent
from raysys.pipeline import Pipeline, seen_mask
from raysys.prepare.dataset import Sequences
from raysys.queries import Queries
from raysys.train.batches import InMemory
from raysys.train.encoder import EncoderTrainConfig, train_encoder

K = 10
MAX_BATCH_SCORES = 1 << 21
"""Scores of one source in an evaluation batch."""
MAX_MIXED_SCORES = 1 << 25
"""Scores of one source that a mixture is refitted on."""
MAX_COMPARED = 200
"""Queries whose whole distributions are compared, serving against updated."""
MAX_COMPARED_SCORES = 1 << 24
"""Scores held of either distribution."""


@dataclass(frozen=True)
class Improvement:
    """What a step came to.

    Attributes:
        models: name -> (arrays, metadata) of the models that changed; empty when refused.
        fusion: `Bundle.fusion` with the mixture that goes with them.
        passed: whether the update may be published.
        reason: in words, why not; empty when passed.
        figures: prequential and gate metrics, JSON-ready.
    """

    models: dict[str, tuple[Arrays, Meta]]
    fusion: dict[str, Any]
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
    bundle = with_recent(bundle, config.recent_half_life_days)
    sequences, arrival = fresh.sequences, fresh.arrival
    away = [*fresh.keys, *fresh.erased]
    anchors = sampled_histories(bundle.histories, away, config.anchor_users, rng)
    replay = sampled_histories(bundle.histories, away, config.replay_users, rng)
    anchor_positions = anchors.last_positions()
    oldest_judged = max(0, fresh.num_events - config.max_evaluated)
    judged = np.flatnonzero(arrival >= oldest_judged)
    judged = judged[np.argsort(arrival[judged])]
    prequential = _score(bundle, sequences, judged)
    anchor = _score(bundle, anchors, anchor_positions)
    gate: dict[str, Any] = {}
    figures: dict[str, Any] = {"events": fresh.num_events, "prequential": _named(prequential), "gate": gate}

    found = _evidence(bundle, sequences, judged, config)

    def mixed(before: int) -> dict[str, Any]:
        """`Bundle.fusion` with the mixture that the events before a place in the stream speak for."""
        if found is None:
            return bundle.fusion
        evidence, positions = found
        fusion = evidence.refitted(prior_events=config.mixture_prior, first=int((arrival[positions] < before).sum()))
        return {**bundle.fusion, "mixture": fusion.to_dict()}

    cut = fresh.num_events - int(config.holdout_share * fresh.num_events)
    if 0 < cut < fresh.num_events:
        older = arrival < cut
        candidate = _updated(bundle, sequences.where(older), arrival[older] >= 0, replay, config, seed)
        candidate.fusion = mixed(cut)
        held_out = judged[arrival[judged] >= cut]
        slices = {
            "new": (prequential[arrival[judged] >= cut], _score(candidate, sequences, held_out)),
            "anchor": (anchor, _score(_as_mixed(candidate, bundle), anchors, anchor_positions)),
        }
        reason = _verdict(candidate, slices, config.margin, gate) or _shifted(
            bundle, candidate, {"new": (sequences, held_out), "anchor": (anchors, anchor_positions)}, config, gate
        )
        if reason:
            return Improvement({}, bundle.fusion, False, reason, figures)
    final = _updated(bundle, sequences, arrival >= 0, replay, config, seed)
    final.fusion = mixed(fresh.num_events)
    slices = {"anchor": (anchor, _score(_as_mixed(final, bundle), anchors, anchor_positions))}
    reason = _verdict(final, slices, config.margin, gate) or _shifted(bundle, final, {"anchor": (anchors, anchor_positions)}, config, gate)
    if reason:
        return Improvement({}, bundle.fusion, False, reason, figures)
    changed = {name: model.to_arrays() for name, model in final.models.items() if model is not bundle.models[name]}
    return Improvement(changed, final.fusion, True, "", figures)


def _updated(bundle: Bundle, sequences: Sequences, new: np.ndarray, replay: Sequences, config: OnlineConfig, seed: int) -> Bundle:
    models = dict(bundle.models)
    for name in ("covisit", RECENT):
        if name in models:
            models[name] = models[name].update(sequences, new)
    models["popularity"] = models["popularity"].update(sequences.items[new], sequences.events[new], sequences.times[new])
    if "interest" in models and config.epochs > 0:
        models["interest"] = _fine_tuned(models["interest"], sequences, new, replay, config, seed)
    if "ranker" in models:
        models["ranker"] = _recounted(models["ranker"], sequences.items[new])
    return Bundle(bundle.items, models, bundle.fusion, bundle.histories, bundle.manifest)


def _evidence(bundle: Bundle, sequences: Sequences, judged: np.ndarray, config: OnlineConfig) -> tuple[Evidence, np.ndarray] | None:
    """What the sources say about the newest events, and the positions of these; None where the mixture stays as it is.

    An event after an empty history says nothing about the mixture: popularity alone answers there.
    """
    count = min(config.mixture_events, max(16, MAX_MIXED_SCORES // bundle.items.num_rows))
    positions = judged[-count:]
    positions = positions[positions > sequences.indptr[sequences.rows[positions]]]
    if config.mixture_prior <= 0 or not len(positions):
        return None
    queries = sequences.queries_before(positions)
    sources = {name: partial(_scores_of, model, queries) for name, model in bundle.models.items() if name != "ranker"}
    targets = sequences.items[positions].astype(np.int64)
    # The ranker has learnt from its sources' probabilities at these temperatures, so those stay.
    fixed = bundle.models["ranker"].sources if "ranker" in bundle.models else ()
    mixture = Fusion.from_dict(bundle.fusion["mixture"])
    return Evidence(mixture, sources, targets, lambda rows: seen_mask(queries[rows], bundle.items.num_rows), fixed=fixed), positions


def _scores_of(model: Any, queries: Queries, rows: slice) -> np.ndarray:
    return model.scores(queries[rows])


def _recounted(ranker: Ranker, items: np.ndarray) -> Ranker:
    """The ranker with new events in its popularity feature; its weights stay as trained."""
    network = copy.deepcopy(ranker.network)
    counts = torch.from_numpy(np.bincount(items, minlength=len(network.popularity)).astype(np.float32))
    network.popularity = torch.log1p(torch.expm1(network.popularity) + counts)
    return Ranker(network, ranker.sources, calibration=ranker.calibration, label=ranker.label, negatives=ranker.negatives)


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
    """Why the candidate must not be published; empty when it may. Fills `gate` with the figures.

    A loss counts as far as it is more than one standard error: less cannot be told from the luck of the sample.
    """
    for name, model in candidate.models.items():
        bad = [key for key, array in model.to_arrays()[0].items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
        if bad:
            return f"{name} has values that are not finite in {', '.join(bad)}"
    for name, (before, after) in slices.items():
        gate[name] = {"serving": _named(before), "updated": _named(after)}
        if not len(before):
            continue
        losses = before[:, 0] - after[:, 0]
        if not losses.mean() - losses.std() / np.sqrt(len(losses)) <= margin:
            return f"NDCG@{K} on the {name} slice fell by {losses.mean():.4f}, the margin is {margin:g}"
    return ""


def _shifted(bundle: Bundle, candidate: Bundle, slices: dict[str, tuple[Sequences, np.ndarray]], config: OnlineConfig, gate: dict) -> str:
    """Why the candidate's probabilities must not be published; empty when they may. Adds the figures to `gate`.

    Calibration: log loss is a proper score, it rises when a model grows too sure. Drift: people of whom nothing new
    is known should mostly be told what they were told before, unless the new events prove that what was true has changed: by as
    many nats as a candidate that had not seen them predicts them better, beyond two standard errors, answers may move further.
    """
    for name, (sequences, positions) in slices.items():
        positions = positions[-min(MAX_COMPARED, max(1, MAX_COMPARED_SCORES // bundle.items.num_rows)) :]
        if not len(positions):
            continue
        rows, targets = np.arange(len(positions)), sequences.items[positions]
        before, after = (_distribution(one, sequences, positions) for one in (bundle, candidate))
        if name == "anchor":
            drift = float(0.5 * np.abs(np.exp(before) - np.exp(after)).sum(axis=1).mean())
            gate[name]["drift"] = drift
            allowed = config.max_drift + gate.get("new", {}).get("log_loss_proven_fall", 0.0)
            if not drift <= allowed:
                return f"score drift: answers to users without news moved by {drift:.3f}, at most {allowed:.3g} is allowed"
            after = _distribution(_as_mixed(candidate, bundle), sequences, positions)
        rises = before[rows, targets] - after[rows, targets]
        rise = gate[name]["log_loss_rise"] = float(rises.mean())
        if name == "new":
            gate[name]["log_loss_proven_fall"] = max(0.0, -rise - 2 * float(rises.std()) / np.sqrt(len(rises)))
        if not rise <= config.max_log_loss_rise:
            return f"calibration: log loss on the {name} slice rose by {rise:.3f} nats, at most {config.max_log_loss_rise:g} is allowed"
    return ""


def _as_mixed(candidate: Bundle, bundle: Bundle) -> Bundle:
    """The candidate's models in the mixture of another version.

    So it is judged by anchor users: their events have been learnt, by some sources more than by others, and would speak for those.
    """
    return Bundle(candidate.items, candidate.models, bundle.fusion, candidate.histories, candidate.manifest)


def _distribution(bundle: Bundle, sequences: Sequences, positions: np.ndarray) -> np.ndarray:
    """(Q, N) float32 log-probability of the next item before each position, as retrieval fuses it."""
    pipeline, queries = Pipeline(bundle), sequences.queries_before(positions)
    return pipeline.fusion.fuse(pipeline.source_log_probs(queries), empty=queries.lengths == 0)
