"""One step of continual learning: a bundle and new events in, updated models and a verdict out.

Knows neither log nor registry, and sees no user ids. Order of judgement: the
serving models first predict every new event before anything learns from it
(prequential), then a candidate that learnt from the older new events predicts
the newest ones. Only after both is the published update made, from all events.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raysys.bundle import Bundle
from raysys.models.base import Arrays, Meta
from raysys.models.fusion import Fusion
from raysys.models.interest import InterestRetriever
from raysys.online.change import Change, counted_along, counted_in, has_fallen, outdated, reached, started_anew
from raysys.online.config import OnlineConfig
from raysys.online.feed import Fresh, learnable_since, sampled_histories
from raysys.online.gate import as_mixed, named, score, shifted, verdict
from raysys.online.mixture import Evidence
from raysys.online.recent import with_recent
from raysys.pipeline import seen_mask
from raysys.prepare.dataset import Sequences
from raysys.train.batches import InMemory
from raysys.train.encoder import EncoderTrainConfig, train_encoder

LEAST_PRIOR = 0.05
"""Share of `mixture_prior` that the mixture counts for just after a change."""
MAX_MIXED_SCORES = 1 << 23
"""Scores of one source that a mixture is refitted on."""


@dataclass(frozen=True)
class Improvement:
    """What a step came to.

    Attributes:
        models: name -> (arrays, metadata) of the models that changed; empty when refused.
        dropped: names of models that the update does without.
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
    dropped: tuple[str, ...] = ()


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
    oldest_judged = max(0, fresh.num_events - config.max_evaluated)
    judged = np.flatnonzero(arrival >= oldest_judged)
    judged = judged[np.argsort(arrival[judged])]
    prequential = score(bundle, sequences, judged)
    gate: dict[str, Any] = {}
    figures: dict[str, Any] = {"events": fresh.num_events, "prequential": named(prequential), "gate": gate}

    known = (bundle.manifest.get("metrics") or {}).get("online") or {}
    change, serving = Change.of(known), bundle
    figures["level"] = reached(known.get("level"), prequential[:, 1])
    if has_fallen(known.get("level"), prequential[:, 1], config.proven_fall):
        asked = judged[judged > sequences.indptr[sequences.rows[judged]]]
        if anew := outdated(bundle, sequences, arrival, asked):
            bundle = started_anew(bundle, anew)
            change = Change(int(sequences.times[arrival >= 0].min()), 0)
            figures["anew"] = list(anew)
    figures["change"] = None if change is None else change.after(fresh.num_events)

    # While a change is young nobody can say what must be kept; later those can whose last event came after it.
    since = None if change is None else change.since
    age = np.inf if change is None else change.events / config.young_events
    young = age < 1
    away = [*fresh.keys, *fresh.erased]
    anchors = sampled_histories(bundle.histories, away, 0 if young else config.anchor_users, rng, since=since)
    replay = sampled_histories(bundle.histories, away, config.replay_users, rng, since=since)
    lesson = Lesson(replay, since, _steps(config, young), seed)
    anchor_positions = anchors.last_positions()
    anchor = score(serving, anchors, anchor_positions)

    found = _evidence(bundle, sequences, arrival, judged, config, anew=age == 0)
    # The present mixture counts for no more than what it has been learnt from.
    prior = config.mixture_prior * min(1.0, max(LEAST_PRIOR, age))

    def mixed(before: int) -> dict[str, Any]:
        """`Bundle.fusion` with the mixture that the events before a place in the stream speak for."""
        if found is None:
            return bundle.fusion
        evidence, positions = found
        fusion = evidence.refitted(prior_events=prior, first=int((arrival[positions] < before).sum()))
        return {**bundle.fusion, "mixture": fusion.to_dict()}

    cut = fresh.num_events - int(config.holdout_share * fresh.num_events)
    if 0 < cut < fresh.num_events:
        older = arrival < cut
        candidate = _updated(bundle, sequences.where(older), arrival[older] >= 0, lesson)
        candidate.fusion = mixed(cut)
        held_out = judged[arrival[judged] >= cut]
        slices = {
            "new": (prequential[arrival[judged] >= cut], score(candidate, sequences, held_out)),
            "anchor": (anchor, score(as_mixed(candidate, bundle), anchors, anchor_positions)),
        }
        reason = verdict(candidate, slices, config, gate) or shifted(
            serving, candidate, {"new": (sequences, held_out), "anchor": (anchors, anchor_positions)}, config, gate
        )
        if reason:
            return Improvement({}, bundle.fusion, False, reason, figures)
    final = _updated(bundle, sequences, arrival >= 0, lesson)
    final.fusion = mixed(fresh.num_events)
    slices = {"anchor": (anchor, score(as_mixed(final, bundle), anchors, anchor_positions))}
    reason = verdict(final, slices, config, gate) or shifted(serving, final, {"anchor": (anchors, anchor_positions)}, config, gate)
    if reason:
        return Improvement({}, bundle.fusion, False, reason, figures)
    updated = {name: model.to_arrays() for name, model in final.models.items() if model is not serving.models[name]}
    return Improvement(updated, final.fusion, True, "", figures, tuple(serving.models.keys() - final.models.keys()))


@dataclass(frozen=True)
class Lesson:
    """What the encoder is fine-tuned on besides a round's users, and how."""

    replay: Sequences
    since: int | None
    """Only what followed from this time on is learnt; None for everything."""
    steps: EncoderTrainConfig | None
    """None leaves the encoder as it is."""
    seed: int


def _steps(config: OnlineConfig, young: bool) -> EncoderTrainConfig | None:
    if config.epochs == 0:
        return None
    epochs, batch_size, lr = config.epochs, config.batch_size, config.lr
    if young:
        epochs, batch_size, lr = config.young_epochs, config.young_batch_size, config.young_lr
    # No running average: over the few steps of a round it would keep the old weights and learn next to nothing.
    return EncoderTrainConfig(epochs=epochs, batch_size=batch_size, lr=lr, warmup_steps=0, ema=0.0)


def _updated(bundle: Bundle, sequences: Sequences, new: np.ndarray, lesson: Lesson) -> Bundle:
    models = counted_in(bundle.models, sequences, new)
    if "interest" in models and lesson.steps is not None:
        models["interest"] = _fine_tuned(models["interest"], sequences, new, lesson)
    if "ranker" in models:
        models["ranker"] = models["ranker"].counted(sequences, new)
    return dataclasses.replace(bundle, models=models)


def _evidence(
    bundle: Bundle, sequences: Sequences, arrival: np.ndarray, judged: np.ndarray, config: OnlineConfig, *, anew: bool
) -> tuple[Evidence, np.ndarray] | None:
    """What the sources say about the newest events, and the positions of these; None where the mixture stays as it is.

    The round is gone through in a few parts: a part is scored first and then counted, so that what the newest events say about
    a source that counts is not a round old. An event after an empty history says nothing: popularity alone answers there.
    `anew`: the present mixture is that of other tastes, so all sources start alike.
    """
    count = min(config.mixture_events, max(16, MAX_MIXED_SCORES // bundle.items.num_rows))
    positions = judged[-count:]
    positions = positions[positions > sequences.indptr[sequences.rows[positions]]]
    if config.mixture_prior <= 0 or not len(positions):
        return None
    names = [name for name in bundle.models if name != "ranker"]
    scores: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for part, models in counted_along({name: bundle.models[name] for name in names}, sequences, arrival, positions):
        queries = sequences.queries_before(part)
        for name in names:
            scores[name].append(models[name].scores(queries))
    found = {name: np.concatenate(parts) for name, parts in scores.items()}
    queries = sequences.queries_before(positions)
    # The ranker has learnt from its sources' probabilities at these temperatures, so those stay.
    fixed = bundle.models["ranker"].sources if "ranker" in bundle.models else ()
    evidence = Evidence(
        Fusion(dict.fromkeys(names, 1 / len(names)), {}) if anew else Fusion.from_dict(bundle.fusion["mixture"]),
        {name: values.__getitem__ for name, values in found.items()},
        sequences.items[positions].astype(np.int64),
        lambda rows: seen_mask(queries[rows], bundle.items.num_rows),
        fixed=fixed,
    )
    return evidence, positions


def _fine_tuned(retriever: InterestRetriever, sequences: Sequences, new: np.ndarray, lesson: Lesson) -> InterestRetriever:
    """The encoder after a few steps on the users with new events; others are replayed, so that it does not forget them."""
    assert lesson.steps is not None
    clone = InterestRetriever.from_arrays(*retriever.to_arrays())
    everything = _together(sequences, lesson.replay)
    learnt = everything if lesson.since is None else learnable_since(everything, lesson.since)
    train_encoder(clone.encoder, InMemory(learnt), lesson.steps, seed=lesson.seed)
    warm = clone.warm.copy()
    warm[sequences.items[new]] = True
    return InterestRetriever(clone.encoder, warm)


def _together(first: Sequences, second: Sequences) -> Sequences:
    indptr = np.concatenate([first.indptr, first.indptr[-1] + second.indptr[1:]])
    names = ("items", "events", "times", "values", "positive", "split")
    flat = [np.concatenate([getattr(first, name), getattr(second, name)]) for name in names]
    return Sequences(np.arange(len(indptr) - 1, dtype=np.int32), indptr, *flat)
