"""A change of tastes: how it is proven, and what starts anew after it.

A fall of the hit rate alone proves nothing: on MovieLens-100k, whose tastes stand
still, it goes from .33 to .11 from one block of 500 events to the next, because other
people come. What proves a change after a fall is a source that would do better
without its past: a counting one that has counted nothing but the first parts of the
round, or an encoder that was bent boldly towards the round's older events,
ranks what was done next better than the same source as it is. Counts proven
wrong start anew, and what came before the change is no longer replayed.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from raysys.bundle import Bundle
from raysys.models.base import Retriever
from raysys.models.covisit import Covisitation
from raysys.models.kinds import Kinds
from raysys.models.popularity import Popularity
from raysys.online.kinds import KINDS
from raysys.online.recent import RECENT
from raysys.pipeline import seen_mask
from raysys.prepare.dataset import Sequences

COUNTING = ("covisit", "popularity", KINDS)
"""Sources that may prove a change by what they say without their past."""
AT_ONCE = 250
"""Events scored together, about."""
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


def ranks_better(new: np.ndarray, old: np.ndarray) -> bool:
    """Whether log ranks of the same targets, (Q,) each, are lower beyond two standard errors of the difference."""
    gain = old - new
    return len(gain) > 1 and bool(gain.mean() > 2 * gain.std() / np.sqrt(len(gain)))


def outdated(bundle: Bundle, sequences: Sequences, arrival: np.ndarray, positions: np.ndarray) -> tuple[str, ...]:
    """The counting sources that would predict new events better had they counted nothing before them.

    Both sides count the events part by part, after they were scored on them, so the one without a past has at most the round.

    Args:
        bundle: the serving version.
        sequences: histories with new events.
        arrival: (E,) place of a new event among all new ones in time order, -1 for others.
        positions: (V,) flat positions of new events, in that order.
    """
    names = [name for name in COUNTING if name in bundle.models]
    both = {**{name: bundle.models[name] for name in names}, **{f"{name}, anew": bundle.models[name].emptied() for name in names}}
    ranks: dict[str, list[np.ndarray]] = {name: [] for name in both}
    for part, models in counted_along(both, sequences, arrival, positions):
        for name, model in models.items():
            ranks[name].append(log_ranks(model, sequences, part))
    return tuple(name for name in names if ranks_better(np.concatenate(ranks[f"{name}, anew"]), np.concatenate(ranks[name])))


def log_ranks(model: Retriever, sequences: Sequences, positions: np.ndarray) -> np.ndarray:
    """(V,) float64 logarithm of the place that a source alone gives each event's item among those not seen before.

    It says more of a few events than hits do: most are no hits. Equals share their places, so a source without an opinion gains nothing.
    """
    found = [np.zeros(0)]
    for part in np.array_split(positions, max(1, len(positions) // AT_ONCE)):
        queries, targets = sequences.queries_before(part), sequences.items[part]
        scores = model.scores(queries)
        allowed = seen_mask(queries, scores.shape[1])
        own = scores[np.arange(len(part)), targets][:, None]
        better, equal = (((scores > own) & allowed).sum(axis=1), ((scores == own) & allowed).sum(axis=1))
        found.append(np.log(1.0 + better + np.maximum(equal - 1, 0) / 2))
    return np.concatenate(found)


def started_anew(bundle: Bundle, names: tuple[str, ...]) -> Bundle:
    """The bundle with the counts of these sources gone, of those that only the learner keeps too, and without a ranker.

    A ranker has learnt how the old sources' scores go with what was liked, and does not learn here: its order and its probabilities
    would be wrong, and no probability is better than a wrong one. The next training brings one.
    """
    models = {name: model for name, model in bundle.models.items() if name != "ranker"}
    for name in {*names, RECENT, KINDS} & models.keys():
        models[name] = models[name].emptied()
    return dataclasses.replace(bundle, models=models, fusion={**bundle.fusion, "ranker_weight": 0.0, "ranker_sources": []})


def counted_along(
    models: Mapping[str, Any], sequences: Sequences, arrival: np.ndarray, positions: np.ndarray, *, counted: int = 0
) -> Iterator[tuple[np.ndarray, Mapping[str, Any]]]:
    """A round's events in a few parts, each with the models as they are when everything before it has been counted.

    Args:
        models: by any names.
        sequences: histories with new events.
        arrival: (E,) place of a new event among all new ones in time order, -1 for others.
        positions: (V,) flat positions of new events, in that order.
        counted: so many of the new events are in the models already.
    """
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
        if isinstance(model, (Covisitation, Kinds)):
            counted[name] = model.update(sequences, new)
        elif isinstance(model, Popularity):
            counted[name] = model.update(sequences.items[new], sequences.events[new], sequences.times[new])
    return counted
