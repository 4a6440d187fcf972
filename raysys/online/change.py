"""A change of tastes: how it is proven, and what starts anew after it.

A fall of the hit rate alone proves nothing: on MovieLens-100k, whose tastes stand
still, it goes from .33 to .11 from one block of 500 events to the next, because other
people come. Two things prove a change after a fall. One is that a source which has
counted nothing but the first parts of a round predicts the rest of it better than
the same source with all that it has ever counted; such a source then starts anew. The other
is that an update which has learnt boldly from the older events of a round
predicts the newest ones better than the serving version. After a proven change
what came before it is no longer replayed.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from raysys.bundle import Bundle
from raysys.models.covisit import Covisitation
from raysys.models.popularity import Popularity
from raysys.online.recent import RECENT
from raysys.pipeline import seen_mask
from raysys.prepare.dataset import Sequences

COUNTING = ("covisit", "popularity")
"""Sources that may start anew; `recent` does where the first does."""
PARTS = 5
"""Parts in which a round is scored and then counted."""
LEVEL_KEPT = 0.9
"""Share of the hit rate once reached that a round which does not reach it still goes by."""


@dataclass(frozen=True)
class Change:
    """The last proven change of a lineage of versions."""

    since: int
    """Time of the first event that is taken to be after it, UTC epoch seconds."""
    events: int
    """Events learnt since, those of the present round not among them."""

    @classmethod
    def of(cls, known: Mapping[str, Any]) -> "Change | None":
        """Back from the figures of an earlier round."""
        found = known.get("change")
        return None if found is None else cls(**found)

    def after(self, num_events: int) -> dict[str, int]:
        """For the figures of a round that has learnt so many events more."""
        return asdict(dataclasses.replace(self, events=self.events + num_events))


def reached(level: float | None, hits: np.ndarray) -> float:
    """The hit rate that a lineage of versions has shown it can reach, after one more round; it fades, so that no level is for ever."""
    return max(float(hits.mean()) if len(hits) else 0.0, LEVEL_KEPT * (level or 0.0))


def has_fallen(level: float | None, hits: np.ndarray, fall: float) -> bool:
    """Whether new events are predicted so much worse than a lineage can that it is worth asking whether tastes have changed.

    Args:
        level: what has been reached before the round; None in the first.
        hits: (Q,) 0 or 1, recall of the serving version on the round's events.
        fall: relative fall, beyond two standard errors, that asks.
    """
    if level is None or not len(hits):
        return False
    rate = float(hits.mean())
    # The second term is the doubt that is left where no event was hit at all.
    error = np.sqrt((rate * (1 - rate) + 1 / len(hits)) / len(hits))
    return bool(rate + 2 * error < (1 - fall) * level)


def is_better(new: np.ndarray, old: np.ndarray) -> bool:
    """Whether a figure of the same events, (Q,) each, is larger beyond two standard errors of the difference."""
    gain = new - old
    return len(gain) > 1 and bool(gain.mean() > 2 * gain.std() / np.sqrt(len(gain)))


def outdated(bundle: Bundle, sequences: Sequences, arrival: np.ndarray, positions: np.ndarray) -> tuple[str, ...]:
    """The counting sources that would predict new events better had they counted nothing before them.

    Both sides count the events part by part, after they were scored on them, so the one without a past has at most the round.
    Their mean reciprocal ranks must differ by more than one standard error.

    Args:
        bundle: the serving version.
        sequences: histories with new events.
        arrival: (E,) place of a new event among all new ones in time order, -1 for others.
        positions: (V,) flat positions of new events, in that order; those without a history say nothing.
    """
    positions = positions[positions > sequences.indptr[sequences.rows[positions]]]
    if not len(positions):
        return ()
    names = [name for name in COUNTING if name in bundle.models]
    both = {**{name: bundle.models[name] for name in names}, **{f"{name}, anew": bundle.models[name].emptied() for name in names}}
    ranks: dict[str, list[np.ndarray]] = {name: [] for name in both}
    for part, models in counted_along(both, sequences, arrival, positions):
        queries = sequences.queries_before(part)
        allowed = seen_mask(queries, bundle.items.num_rows)
        for name, model in models.items():
            ranks[name].append(_reciprocal_ranks(model.scores(queries), sequences.items[part], allowed))
    found = []
    for name in names:
        gain = np.concatenate(ranks[f"{name}, anew"]) - np.concatenate(ranks[name])
        if gain.mean() > gain.std() / np.sqrt(len(gain)):
            found.append(name)
    return tuple(found)


def started_anew(bundle: Bundle, names: tuple[str, ...]) -> Bundle:
    """The bundle with the counts of these sources gone, of `recent` too, and without a ranker.

    A ranker has learnt how the old sources' scores go with what was liked, and does not learn here: its order and its probabilities
    would be wrong, and no probability is better than a wrong one. The next training brings one.
    """
    models = {name: model for name, model in bundle.models.items() if name != "ranker"}
    for name in {*names, RECENT} & models.keys():
        models[name] = models[name].emptied()
    return dataclasses.replace(bundle, models=models, fusion={**bundle.fusion, "ranker_weight": 0.0, "ranker_sources": []})


def counted_along(
    models: Mapping[str, Any], sequences: Sequences, arrival: np.ndarray, positions: np.ndarray
) -> Iterator[tuple[np.ndarray, Mapping[str, Any]]]:
    """A round's events in a few parts, each with the models as they are when everything before it has been counted."""
    counted = 0
    for part in np.array_split(positions, min(PARTS, len(positions))):
        before = int(arrival[part[0]])
        if before > counted:
            upto = arrival < before
            models, counted = counted_in(models, sequences.where(upto), arrival[upto] >= counted), before
        yield part, models


def counted_in(models: Mapping[str, Any], sequences: Sequences, new: np.ndarray) -> dict[str, Any]:
    """The models with new events in those that count.

    Args:
        models: by any names.
        sequences: histories of the users concerned, (E,) events.
        new: (E,) bool, the events to count.
    """
    counted = dict(models)
    for name, model in models.items():
        if isinstance(model, Covisitation):
            counted[name] = model.update(sequences, new)
        elif isinstance(model, Popularity):
            counted[name] = model.update(sequences.items[new], sequences.events[new], sequences.times[new])
    return counted


def _reciprocal_ranks(scores: np.ndarray, targets: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """(V,) float64; equals share their places, so a source without an opinion gains nothing by it."""
    own = scores[np.arange(len(targets)), targets][:, None]
    better = ((scores > own) & allowed).sum(axis=1)
    equal = ((scores == own) & allowed).sum(axis=1)
    return 1.0 / (1.0 + better + np.maximum(equal - 1, 0) / 2)
