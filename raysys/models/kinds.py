"""Kinds: which kind of item follows which, for items that content has sorted into kinds; tells within a few hundred events.

A co-visitation needs a pair of items to come again before it knows it. Between a few
dozen kinds the same events say as much as there is to say, so this is the first
source to see that tastes have changed; and an item that nobody has chosen yet has
its kind's place from the start.

    P(item | history) = sum over events w(event) P(kind of item | kind of event) * share of the item in its kind

with w falling from the last event back. Scores are logarithms of it. The idea is that
of class-based n-gram models (Brown et al. 1992, Computational Linguistics 18:4).

Legend: B queries, N items, G kinds, E events.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np

from raysys.models.base import Arrays, Meta
from raysys.models.counting import fade, weights_of
from raysys.models.neighbours import faded_events
from raysys.prepare.dataset import Sequences
from raysys.queries import Queries

LEAST = 1e-9
"""Least probability whose logarithm is taken."""


@dataclass(frozen=True)
class KindsConfig:
    """How what follows what is counted and asked."""

    half_life_days: float | None = 4.0
    """What followed what counts half after so many days before the newest event; None counts all alike."""
    history_decay: float = 0.3
    """Weight of a history event relative to the one after it, in [0, 1): mostly the last one tells what kind comes next."""
    max_history: int = 10
    """Last events of a history that are looked at, in events."""
    prior: float = 5.0
    """Events that the frequencies of the kinds count for in what follows one of them."""
    smoothing: float = 0.5
    """Added to the count of every item, so that one without events has a share of its kind."""

    def __post_init__(self) -> None:
        if not 0 <= self.history_decay < 1:
            raise ValueError(f"history_decay: expected a number in [0, 1), got {self.history_decay}")
        if self.half_life_days is not None and self.half_life_days <= 0:
            raise ValueError(f"half_life_days: expected a positive number or none, got {self.half_life_days}")
        if self.max_history < 1 or self.prior <= 0 or self.smoothing <= 0:
            raise ValueError(f"max_history, prior and smoothing: expected positive numbers, got {self}")


@dataclass(frozen=True)
class Kinds:
    """First-order transitions between kinds, and shares within them (a Retriever, a VectorSource).

    Attributes:
        kinds: (N,) int32 in [0, G), the kind of each item.
        item_counts: (N,) float32 weight of all events of each item; does not fade, since items stay what they are.
        transitions: (G, G) float32 [g, h], faded weight of events of kind h straight after one of kind g.
        arrivals: (G,) float32 faded weight of events by kind.
        config: settings.
        event_weights: (T,) float32 weight by event code; codes beyond it weigh 1, events of weight 0 are left out.
        watermark: newest event counted, UTC epoch seconds.
    """

    kinds: np.ndarray
    item_counts: np.ndarray
    transitions: np.ndarray
    arrivals: np.ndarray
    config: KindsConfig
    event_weights: np.ndarray
    watermark: int = 0

    name = "kinds"
    evidence = None
    excludes_history = False

    @classmethod
    def of(
        cls,
        kinds: np.ndarray,
        item_counts: np.ndarray,
        config: KindsConfig | None = None,
        *,
        event_weights: Sequence[float] | np.ndarray = (),
    ) -> "Kinds":
        """A model that has counted nothing yet but how often each item was chosen.

        Args:
            kinds: (N,) kind of each item, from 0 on.
            item_counts: (N,) weight of its events so far.
            config: settings; defaults when None.
            event_weights: weight by event code.
        """
        count = int(kinds.max(initial=-1)) + 1
        weights = np.asarray(event_weights, np.float32)
        empty = np.zeros((count, count), np.float32), np.zeros(count, np.float32)
        return cls(kinds.astype(np.int32), item_counts.astype(np.float32), *empty, config or KindsConfig(), weights)

    def emptied(self) -> "Kinds":
        """A model that knows the items and their shares, and has seen nothing follow anything."""
        return replace(self, transitions=np.zeros_like(self.transitions), arrivals=np.zeros_like(self.arrivals), watermark=0)

    def grown(self, mix: np.ndarray) -> "Kinds":
        """With M new items at the end, each of the kind that most of its neighbours by content have; (M, N) weights of these."""
        found = (mix @ self.item_vectors[:, :-1]).argmax(axis=1)
        kinds = np.concatenate([self.kinds, found.astype(np.int32)])
        return replace(self, kinds=kinds, item_counts=np.concatenate([self.item_counts, np.zeros(len(mix), np.float32)]))

    def update(self, sequences: Sequences, new: np.ndarray) -> "Kinds":
        """The model with new events counted, as if all had been counted at once (up to float order).

        Args:
            sequences: histories of the users concerned, at least the event before each new one included.
            new: (E,) bool, the events that are not counted yet.
        """
        weights = weights_of(sequences.events, self.event_weights)
        used = (weights > 0) & (sequences.items >= 0)
        rows, kinds, weights, new = sequences.rows[used], self.kinds[sequences.items[used]], weights[used], new[used]
        times = sequences.times[used]
        watermark = max(self.watermark, int(times[new].max(initial=0)))
        faded = weights * fade(watermark - times, self.config.half_life_days)
        follows = np.flatnonzero(new[1:] & (rows[1:] == rows[:-1])) + 1
        kept = fade(watermark - self.watermark, self.config.half_life_days) if self.watermark else 1.0
        transitions, arrivals, item_counts = self.transitions * kept, self.arrivals * kept, self.item_counts.copy()
        np.add.at(transitions, (kinds[follows - 1], kinds[follows]), faded[follows])
        np.add.at(arrivals, kinds[new], faded[new])
        np.add.at(item_counts, sequences.items[used][new], weights[new])
        return replace(
            self,
            transitions=transitions.astype(np.float32),
            arrivals=arrivals.astype(np.float32),
            item_counts=item_counts,
            watermark=watermark,
        )

    def scores(self, queries: Queries) -> np.ndarray:
        """(B, N) float32 log-probability of each item as the next; 0 for all after an empty history."""
        vectors = self.user_vectors(queries)
        # The product with `item_vectors`, which are nearly all zeros.
        return vectors[:, self.kinds] + vectors[:, -1:] * self._log_shares

    def user_vectors(self, queries: Queries) -> np.ndarray:
        """(B, G + 1) float32: log-probability of each kind, and 1; all 0 after an empty history."""
        found = np.ones((len(queries), len(self.arrivals) + 1), np.float32)
        found[:, :-1] = np.log(np.maximum(self._next_kinds(queries), LEAST))
        found[queries.lengths == 0] = 0.0
        return found

    @cached_property
    def item_vectors(self) -> np.ndarray:
        """(N, G + 1) float32: one at the item's kind, and the logarithm of its share of it."""
        found = np.zeros((len(self.kinds), len(self.arrivals) + 1), np.float32)
        found[np.arange(len(self.kinds)), self.kinds] = 1.0
        found[:, -1] = self._log_shares
        return found

    def contributions(self, query: Queries, items: np.ndarray) -> np.ndarray:
        """The history item that contributed most to each item's score.

        Args:
            query: B = 1.
            items: (K,) item rows.

        Returns:
            (K,) int32 item rows of the history, -1 where there is none.
        """
        history, weights, _ = self._history(query)
        if not len(history):
            return np.full(len(items), -1, np.int32)
        shares = weights[:, None] * self._following[self.kinds[history]][:, self.kinds[items]]
        return history[shares.argmax(axis=0)].astype(np.int32)

    def to_arrays(self) -> tuple[Arrays, Meta]:
        """All counts."""
        names = ("kinds", "item_counts", "transitions", "arrivals", "event_weights")
        return {name: getattr(self, name) for name in names}, {"config": asdict(self.config), "watermark": self.watermark}

    @classmethod
    def from_arrays(cls, arrays: Arrays, meta: Meta) -> "Kinds":
        """The model back from `to_arrays`."""
        return cls(**arrays, config=KindsConfig(**meta["config"]), watermark=meta["watermark"])

    @cached_property
    def _often(self) -> np.ndarray:
        """(G,) float64 P(kind), sums to 1."""
        return (self.arrivals + 1.0) / (self.arrivals + 1.0).sum(dtype=np.float64)

    @cached_property
    def _following(self) -> np.ndarray:
        """(G, G) float64 P(next kind | kind); rows sum to 1."""
        counts = self.transitions + self.config.prior * self._often
        return counts / counts.sum(axis=1, keepdims=True)

    @cached_property
    def _log_shares(self) -> np.ndarray:
        """(N,) float32 log share of each item in its kind."""
        counts = self.item_counts + np.float64(self.config.smoothing)
        return np.log(counts / np.bincount(self.kinds, weights=counts)[self.kinds]).astype(np.float32)

    def _history(self, queries: Queries) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # A decay of 0 leaves the last event, which 0 to the power of 0 counts.
        weights = weights_of(queries.events, self.event_weights)
        return faded_events(queries, weights, decay=self.config.history_decay, longest=self.config.max_history)

    def _next_kinds(self, queries: Queries) -> np.ndarray:
        """(B, G) float64 P(next kind | history), rows sum to 1; frequencies of the kinds where no event counts."""
        items, weights, indptr = self._history(queries)
        found = np.zeros((len(queries), len(self.arrivals)))
        row_of = np.repeat(np.arange(len(queries)), np.diff(indptr))
        counted = weights > 0
        np.add.at(found, row_of[counted], weights[counted, None] * self._following[self.kinds[items[counted]]])
        total = found.sum(axis=1, keepdims=True)
        return np.where(total > 0, found / np.where(total > 0, total, 1.0), self._often)
