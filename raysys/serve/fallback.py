"""Answers without the model replicas: what follows the user's last items, then what is popular.

The ingress holds both itself, so they answer when every other process of the service is gone.

Legend: N bundle items, F followers kept an item, H events of a history.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from raysys.models.covisit import Covisitation
from raysys.queries import Queries
from raysys.serve.catalogue import Catalogue
from raysys.serve.request import Ranked

BLOCK = 20_000
"""Items whose followers are cut to F at a time; bounds the memory of making the table."""


@dataclass(frozen=True)
class Followers:
    """The strongest followers of each item by co-visitation: 8 F bytes an item, and a lookup that costs the same in any catalogue.

    Attributes:
        items: (N, F) int32 item rows, -1 where there are fewer.
        weights: (N, F) float32 similarity, 0 there.
        event_weights: (T,) float32 weight by event code; codes beyond it weigh 1.
        decay: weight of a history item relative to the one after it.
        longest: last events of a history that are looked up.
    """

    items: np.ndarray
    weights: np.ndarray
    event_weights: np.ndarray
    decay: float
    longest: int

    @classmethod
    def of(cls, model: Covisitation, width: int) -> "Followers":
        """Cut a co-visitation model to `width` followers an item."""
        matrix, num_items = model.matrix, model.num_items
        items, weights = np.full((num_items, width), -1, np.int32), np.zeros((num_items, width), np.float32)
        for first in range(0, num_items, BLOCK):
            block = matrix[first : first + BLOCK]
            rows = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))
            order = np.lexsort((-block.data, rows))
            rank = np.arange(len(rows)) - block.indptr[rows]
            kept = rank < width
            items[first + rows[kept], rank[kept]] = block.indices[order][kept]
            weights[first + rows[kept], rank[kept]] = block.data[order][kept]
        return cls(items, weights, model.event_weights, model.config.session_decay, model.config.max_history)

    def next_items(self, query: Queries) -> tuple[np.ndarray, np.ndarray]:
        """Items that follow a history, best first.

        Args:
            query: B = 1.

        Returns:
            (n,) int64 item rows and (n,) float64 scores, descending; empty for a history without followers.
        """
        weights = np.ones(len(query.items))
        known = query.events < len(self.event_weights)
        weights[known] = self.event_weights[query.events[known]]
        history, weights = query.items[weights > 0][-self.longest :], weights[weights > 0][-self.longest :]
        weights = weights * self.decay ** np.arange(len(history) - 1, -1, -1)
        found, place = np.unique(self.items[history], return_inverse=True)
        scores = np.bincount(place.ravel(), (self.weights[history] * weights[:, None]).ravel(), minlength=len(found))
        order = np.argsort(-scores, kind="stable")
        order = order[(found[order] >= 0) & (scores[order] > 0)]
        return found[order].astype(np.int64), scores[order]


def fallback(
    catalogue: Catalogue,
    n: int,
    *,
    following: tuple[np.ndarray, np.ndarray] | None,
    popular: Iterable[str],
    blocked: set[str],
    wanted: set[str] | None,
    rules: dict[str, Any],
) -> Ranked:
    """The best n items without any model replica.

    Args:
        catalogue: what may be shown.
        n: items at most.
        following: what `Followers.next_items` gave; they come first.
        popular: item ids that fill the rest, best first.
        blocked: never shown.
        wanted: only these, when given.
        rules: the request's filter.

    Raises:
        SchemaError: the filter is not understood.
    """
    compiled = catalogue.compile(rules)
    rows, scores = following if following is not None else (np.zeros(0, np.int64), np.zeros(0))
    ranked = Ranked("popularity")
    followers = {catalogue.item_ids[row]: round(float(score), 6) for row, score in zip(rows, scores, strict=True)}
    taken: set[str] = set()
    for item_id in itertools.chain(followers, popular):
        if len(ranked.item_ids) == n:
            break
        if item_id in taken or item_id in blocked or (wanted is not None and item_id not in wanted) or not catalogue.showable(item_id):
            continue
        if compiled and not catalogue.matches(item_id, compiled):
            continue
        taken.add(item_id)
        score = followers.get(item_id)
        ranked.append(item_id, catalogue.index.get(item_id, -1), "popularity" if score is None else "covisit", score)
        if score is not None:
            ranked.by = "covisit"
    return ranked
