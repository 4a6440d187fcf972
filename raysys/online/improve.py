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
from raysys.models.base import Arrays, Meta
from raysys.online.change import Change, has_fallen, log_ranks, outdated, ranks_better, reached, started_anew
from raysys.online.config import OnlineConfig
from raysys.online.feed import Fresh, sampled_histories
from raysys.online.gate import as_mixed, named, score, shifted, verdict
from raysys.online.kinds import with_kinds
from raysys.online.recent import with_recent
from raysys.online.update import Update


@dataclass(frozen=True)
class Improvement:
    """What a step came to.

    Attributes:
        models: name -> (arrays, metadata) of the models that changed; empty when refused.
        fusion: `Bundle.fusion` with the mixture that goes with them.
        passed: whether the update may be published.
        reason: in words, why not; empty when passed.
        figures: prequential and gate metrics, JSON-ready.
        dropped: names of models that the update does without.
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


def _improve(serving: Bundle, fresh: Fresh, config: OnlineConfig, seed: int) -> Improvement:
    rng = np.random.default_rng([config.seed, seed])
    sequences, arrival = fresh.sequences, fresh.arrival
    oldest_judged = max(0, fresh.num_events - config.max_evaluated)
    judged = np.flatnonzero(arrival >= oldest_judged)
    judged = judged[np.argsort(arrival[judged])]
    prequential = score(serving, sequences, judged)
    gate: dict[str, Any] = {}
    figures: dict[str, Any] = {"events": fresh.num_events, "prequential": named(prequential), "gate": gate}
    known = (serving.manifest.get("metrics") or {}).get("online") or {}
    figures["level"] = reached(known.get("level"), prequential[:, 1])

    away = [*fresh.keys, *fresh.erased]
    start = with_kinds(with_recent(serving, config.recent_half_life_days), config.recent_half_life_days)

    def update_of(bundle: Bundle, change: Change | None) -> Update:
        # Users whose last event came before a change stand for tastes that are no more.
        replay = sampled_histories(bundle.histories, away, config.replay_users, rng, since=None if change is None else change.since)
        return Update(bundle, fresh, judged, replay, change, config, seed)

    def newest(update: Update, bundle: Bundle) -> tuple[np.ndarray, np.ndarray]:
        """Figures of the serving version and of the candidate on what this has not learnt."""
        held_out = arrival[judged] >= update.judged_from
        return prequential[held_out], score(bundle, sequences, judged[held_out])

    change, update = Change.of(known), None
    if has_fallen(known.get("level"), prequential[:, 1], config.proven_fall):
        told = judged[judged > sequences.indptr[sequences.rows[judged]]]  # an event after an empty history says nothing
        anew = outdated(start, sequences, arrival, told)
        begun = Change(int(sequences.times[arrival >= 0].min()), 0)
        bold = update_of(started_anew(start, anew), begun)
        unlearnt = told[arrival[told] >= bold.cut]
        encoders = [bundle.models["interest"] for bundle in (bold.older, start) if "interest" in bundle.models]
        # Without a proof other people came, not other tastes.
        if anew or (encoders and ranks_better(*(log_ranks(encoder, sequences, unlearnt) for encoder in encoders))):
            change, update, figures["anew"] = begun, bold, list(anew)
    if update is None:
        update = update_of(start, change)
    figures["change"] = None if change is None else change.after(fresh.num_events)

    # While a change is young nobody can say what must be kept; later those can whose last event came after it.
    since = None if change is None else change.since
    anchors = sampled_histories(serving.histories, away, 0 if update.young else config.anchor_users, rng, since=since)
    anchor_positions = anchors.last_positions()
    anchor = score(serving, anchors, anchor_positions)

    if 0 < update.judged_from < fresh.num_events:
        candidate = update.candidate()
        slices = {
            "new": newest(update, candidate),
            "anchor": (anchor, score(as_mixed(candidate, update.bundle), anchors, anchor_positions)),
        }
        held_out = judged[arrival[judged] >= update.judged_from]
        reason = verdict(candidate, slices, config, gate) or shifted(
            serving, candidate, {"new": (sequences, held_out), "anchor": (anchors, anchor_positions)}, config, gate
        )
        if reason:
            return Improvement({}, serving.fusion, False, reason, figures)
    final = update.final()
    slices = {"anchor": (anchor, score(as_mixed(final, update.bundle), anchors, anchor_positions))}
    reason = verdict(final, slices, config, gate) or shifted(serving, final, {"anchor": (anchors, anchor_positions)}, config, gate)
    if reason:
        return Improvement({}, serving.fusion, False, reason, figures)
    updated = {name: model.to_arrays() for name, model in final.models.items() if model is not serving.models.get(name)}
    dropped = tuple(name for name in serving.models if name not in final.models)
    return Improvement(updated, final.fusion, True, "", figures, dropped)
