"""What goes with what these days: a co-visitation that forgets, which only the learner keeps.

It is not trained: in a bundle that nobody updates it would go stale within days and
mislead. The learner makes it in its first round, from the newest events of the
bundle's histories, and counts every later event; the mixture decides what it is worth.
"""

import dataclasses

import numpy as np
import pyarrow.compute as pc

from raysys.bundle import Bundle, Histories
from raysys.models.covisit import Covisitation, CovisitConfig
from raysys.online.feed import flat_sequences
from raysys.prepare.dataset import Sequences

RECENT = "recent"
"""Name of the source in a bundle."""
HALF_LIVES = 8
"""Older events than this many half-lives are not counted when it is made: they weigh less than 1/256."""


def with_recent(bundle: Bundle, half_life_days: float) -> Bundle:
    """The bundle with the source: its own where it has one of this half-life, else one made from its histories.

    Args:
        bundle: not changed. Weights and manifest stay, so a source that is new has no weight yet.
        half_life_days: a pair counts half after so many days of the data's own time; 0 for no such source.
    """
    if not is_wanted(bundle, RECENT, half_life_days):
        return bundle
    config = CovisitConfig(half_life_days=half_life_days)
    newest = newest_events(bundle.histories, half_life_days)
    source = Covisitation.fit(newest, bundle.items.num_rows, config, event_weights=event_weights(bundle))
    return dataclasses.replace(bundle, models={**bundle.models, RECENT: source})


def is_wanted(bundle: Bundle, name: str, half_life_days: float) -> bool:
    """Whether the learner has to make a source of its own that forgets: there is to be one, and the bundle has none of this half-life."""
    have = bundle.models.get(name)
    ordinal = bundle.manifest.get("time") == "ordinal"
    return half_life_days > 0 and not ordinal and (have is None or have.config.half_life_days != half_life_days)


def event_weights(bundle: Bundle) -> np.ndarray:
    """(T,) float32 weight by event code, as the bundle's co-visitation counts; empty, so that all weigh 1, without one."""
    trained = bundle.models.get("covisit")
    return np.zeros(0, np.float32) if trained is None else trained.event_weights


def newest_events(histories: Histories, half_life_days: float) -> Sequences:
    """What happened in the last HALF_LIVES half-lives before the newest event, by user."""
    table = histories.table.combine_chunks()
    lengths = pc.list_value_length(table["item_idx"]).to_numpy().astype(np.int64)
    items, events, times = (pc.list_flatten(table[name]).to_numpy() for name in ("item_idx", "event", "timestamp"))
    everything = flat_sequences(items, events, times, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    oldest = everything.times.max(initial=0) - HALF_LIVES * half_life_days * 86_400
    return everything.where(everything.times >= oldest)
