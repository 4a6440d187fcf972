"""One step of continual learning: a bundle and new events in, updated models and a verdict out.

Knows neither log nor registry, and sees no user ids. Order of judgement: the
serving models first predict every new event before anything learns from it
(prequential), then a candidate that learnt from the older new events predicts
the newest ones. Only after both is the published update made, from all events.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raysys.bundle import Bundle
from raysys.models.base import Arrays, Meta
from raysys.models.fusion import Fusion
from raysys.models.interest import InterestRetriever
from raysys.online.config import OnlineConfig
from raysys.online.feed import Fresh, sampled_histories
from raysys.online.gate import as_mixed, is_change, named, reached, score, shifted, verdict
from raysys.online.mixture import Evidence
from raysys.online.recent import RECENT, emptied, with_recent
from raysys.pipeline import seen_mask
from raysys.prepare.dataset import Sequences
from raysys.train.batches import InMemory
from raysys.train.encoder import EncoderTrainConfig, train_encoder

MAX_MIXED_SCORES = 1 << 23
"""Scores of one source that a mixture is refitted on."""
MIXED_PARTS = 5
"""Parts in which a round's events are scored and then counted."""


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
    prequential = score(bundle, sequences, judged)
    anchor = score(bundle, anchors, anchor_positions)
    gate: dict[str, Any] = {}
    figures: dict[str, Any] = {"events": fresh.num_events, "prequential": named(prequential), "gate": gate}

    # Users without news then stand for tastes of which it is proven that they have changed.
    known = (bundle.manifest.get("metrics") or {}).get("online") or {}
    changed = figures["changed"] = is_change(known.get("level"), prequential[:, 1], config.proven_fall)
    figures["level"] = reached(known.get("level"), prequential[:, 1])
    if changed and not known.get("changed"):
        bundle = emptied(bundle)  # once: from here on it counts what is true now

    found = _evidence(bundle, sequences, arrival, judged, config)

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
            "new": (prequential[arrival[judged] >= cut], score(candidate, sequences, held_out)),
            "anchor": (anchor, score(as_mixed(candidate, bundle), anchors, anchor_positions)),
        }
        reason = verdict(candidate, slices, config, gate, changed) or shifted(
            bundle, candidate, {"new": (sequences, held_out), "anchor": (anchors, anchor_positions)}, config, gate, changed
        )
        if reason:
            return Improvement({}, bundle.fusion, False, reason, figures)
    final = _updated(bundle, sequences, arrival >= 0, replay, config, seed)
    final.fusion = mixed(fresh.num_events)
    slices = {"anchor": (anchor, score(as_mixed(final, bundle), anchors, anchor_positions))}
    reason = verdict(final, slices, config, gate, changed) or shifted(
        bundle, final, {"anchor": (anchors, anchor_positions)}, config, gate, changed
    )
    if reason:
        return Improvement({}, bundle.fusion, False, reason, figures)
    updated = {name: model.to_arrays() for name, model in final.models.items() if model is not bundle.models[name]}
    return Improvement(updated, final.fusion, True, "", figures)


def _updated(bundle: Bundle, sequences: Sequences, new: np.ndarray, replay: Sequences, config: OnlineConfig, seed: int) -> Bundle:
    models = _counted(bundle.models, sequences, new)
    if "interest" in models and config.epochs > 0:
        models["interest"] = _fine_tuned(models["interest"], sequences, new, replay, config, seed)
    if "ranker" in models:
        models["ranker"] = models["ranker"].counted(sequences, new)
    return dataclasses.replace(bundle, models=models)


def _counted(models: Mapping[str, Any], sequences: Sequences, new: np.ndarray) -> dict[str, Any]:
    """The models with new events in those that count."""
    counted = dict(models)
    for name in ("covisit", RECENT):
        if name in models:
            counted[name] = models[name].update(sequences, new)
    counted["popularity"] = models["popularity"].update(sequences.items[new], sequences.events[new], sequences.times[new])
    return counted


def _evidence(
    bundle: Bundle, sequences: Sequences, arrival: np.ndarray, judged: np.ndarray, config: OnlineConfig
) -> tuple[Evidence, np.ndarray] | None:
    """What the sources say about the newest events, and the positions of these; None where the mixture stays as it is.

    The round is gone through in a few parts: a part is scored first and then counted, so that what the newest events say about
    a source that counts is not a round old. An event after an empty history says nothing: popularity alone answers there.
    """
    count = min(config.mixture_events, max(16, MAX_MIXED_SCORES // bundle.items.num_rows))
    positions = judged[-count:]
    positions = positions[positions > sequences.indptr[sequences.rows[positions]]]
    if config.mixture_prior <= 0 or not len(positions):
        return None
    models, counted = bundle.models, 0
    names = [name for name in models if name != "ranker"]
    scores: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for part in np.array_split(positions, min(MIXED_PARTS, len(positions))):
        before = int(arrival[part[0]])
        if before > counted:
            upto = (arrival < before) | (arrival < 0)
            models, counted = _counted(models, sequences.where(upto), arrival[upto] >= counted), before
        queries = sequences.queries_before(part)
        for name in names:
            scores[name].append(models[name].scores(queries))
    found = {name: np.concatenate(parts) for name, parts in scores.items()}
    queries = sequences.queries_before(positions)
    # The ranker has learnt from its sources' probabilities at these temperatures, so those stay.
    fixed = bundle.models["ranker"].sources if "ranker" in bundle.models else ()
    evidence = Evidence(
        Fusion.from_dict(bundle.fusion["mixture"]),
        {name: values.__getitem__ for name, values in found.items()},
        sequences.items[positions].astype(np.int64),
        lambda rows: seen_mask(queries[rows], bundle.items.num_rows),
        fixed=fixed,
    )
    return evidence, positions


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
