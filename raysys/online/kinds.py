"""What kind of item follows which these days: a source that only the learner keeps, where items have content.

Made in the learner's first round, like `recent`: content vectors are sorted into
kinds, and the newest events of the bundle's histories are counted. How many kinds
there are is not asked of the content but of the events: as many as foretell the
last of them best.
"""

import dataclasses

import numpy as np
from sklearn.cluster import KMeans

from raysys.bundle import Bundle
from raysys.models.kinds import Kinds, KindsConfig
from raysys.online.recent import event_weights, is_wanted, newest_events
from raysys.prepare.dataset import Sequences

KINDS = "kinds"
"""Name of the source in a bundle."""
NUM_KINDS = (8, 16, 32, 64)
"""Numbers of kinds that are tried."""
SORTED_ITEMS = 20_000
"""Items whose content makes the kinds, at most; the others join the nearest."""
FORETOLD = 0.2
"""Newest share of the events that chooses the number of kinds."""
MAX_FORETOLD = 5000
"""Events that choose it, at most."""
AT_ONCE = 65_536
"""Items that are compared with all kinds together."""
SCORED_AT_ONCE = 250
"""Events whose every next item is scored together."""


def with_kinds(bundle: Bundle, half_life_days: float, *, seed: int = 0) -> Bundle:
    """The bundle with the source: its own where it has one of this half-life, else one made from its content and histories.

    Args:
        bundle: not changed. Weights and manifest stay, so a source that is new has no weight yet.
        half_life_days: what followed what counts half after so many days of the data's own time; 0 for no such source.
        seed: of the sorting.

    Returns:
        The bundle itself where time is ordinal, no item has content, or there are fewer items than the fewest kinds.
    """
    if not is_wanted(bundle, KINDS, half_life_days):
        return bundle
    vectors = bundle.content_vectors
    if vectors is None or int(vectors.any(axis=1).sum()) <= NUM_KINDS[0]:
        return bundle
    newest, counts = newest_events(bundle.histories, half_life_days), bundle.items["num_train"].to_numpy()
    config, weights = KindsConfig(half_life_days=half_life_days), event_weights(bundle)
    tried = [Kinds.of(kinds, counts, config, event_weights=weights) for kinds in _sortings(vectors, counts, seed)]
    chosen = max(tried, key=lambda model: _foretells(model, newest)) if len(newest.items) else tried[0]
    source = _followed(chosen, newest, np.ones(len(newest.items), bool))
    return dataclasses.replace(bundle, models={**bundle.models, KINDS: source})


def _sortings(vectors: np.ndarray, counts: np.ndarray, seed: int) -> list[np.ndarray]:
    """(N,) kinds of all items for each number of kinds; items without content are a kind of their own, the last."""
    filled = np.flatnonzero(vectors.any(axis=1))
    rng = np.random.default_rng(seed)
    sample = np.sort(rng.choice(filled, min(SORTED_ITEMS, len(filled)), replace=False))
    found = []
    for number in NUM_KINDS:
        if number >= len(sample):
            break
        centres = KMeans(number, n_init=3, random_state=seed).fit(vectors[sample], sample_weight=counts[sample] + 1.0).cluster_centers_
        kinds = np.full(len(vectors), number, np.int32)
        halves = (centres**2).sum(axis=1) / 2
        for rows in np.array_split(filled, max(1, len(filled) // AT_ONCE)):
            kinds[rows] = (vectors[rows] @ centres.T - halves).argmax(axis=1)
        found.append(kinds)
    return found


def _followed(model: Kinds, newest: Sequences, counted: np.ndarray) -> Kinds:
    """The model with what followed what counted; the events themselves are in the items' counts already."""
    return dataclasses.replace(model.update(newest, counted), item_counts=model.item_counts)


def _foretells(model: Kinds, newest: Sequences) -> float:
    """Mean log-probability of the last events when those before them have been counted, nats."""
    latest = np.zeros(len(newest.items), bool)
    latest[np.argsort(newest.times, kind="stable")[-max(1, min(MAX_FORETOLD, int(FORETOLD * len(newest.items)))) :]] = True
    before = _followed(model, newest, ~latest)
    positions = np.flatnonzero(latest & (newest.items >= 0))
    positions = positions[positions > newest.indptr[newest.rows[positions]]]
    if not len(positions):
        return 0.0
    parts = np.array_split(positions, max(1, len(positions) // SCORED_AT_ONCE))
    scores = [before.scores(newest.queries_before(part))[np.arange(len(part)), newest.items[part]] for part in parts]
    return float(np.concatenate(scores).mean())
