"""One source asked for its best items, and for log-probabilities of given ones, without scoring the catalogue.

The softmax of a source is over the whole catalogue, so each kind knows how to
get its normaliser from a few items:

- vectors (encoder, content, dot product): exact over the head that an index
  finds, plus the rest of the catalogue as a fixed uniform sample sees it;
- sparse sums (co-visitation, linear): exact, since all items without a sum score 0;
- static (popularity): a constant.

The rest of the catalogue is what makes a normaliser wrong: its error is that of
a mean over the sample, and shifts all items of the source alike.

Legend: B queries, N items, D dimension, H head, S sample, U items asked about.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from raysys.index.items import ItemIndex
from raysys.models.base import NO_EVIDENCE, SparseSource, VectorSource
from raysys.models.fusion import log_softmax
from raysys.queries import Queries


@dataclass(frozen=True)
class May:
    """What may be answered to one query."""

    mask: np.ndarray | None
    """(N,) bool; None for all."""
    blocked: np.ndarray
    """Item rows that must not appear whatever the mask says."""
    few: np.ndarray | None
    """All rows of the mask, where they are few; None otherwise."""

    def kept(self, rows: np.ndarray) -> np.ndarray:
        """Those of the rows that may appear, in their order; -1 may not."""
        stay = rows >= 0
        if self.mask is not None:
            stay &= self.mask[rows]
        if len(self.blocked):
            stay &= ~np.isin(rows, self.blocked)
        return rows[stay]


class Asked(Protocol):
    """A batch of queries as one source sees them."""

    def best(self, at: int, count: int, may: May) -> np.ndarray:
        """Rows that may appear, the source's best at least `count` of them where there are; maybe more, in any order."""

    def log_probs(self, at: int, rows: np.ndarray) -> np.ndarray:
        """(U,) float32 log-probability of given items for query `at`."""


class Pool(Protocol):
    """A source that can be asked."""

    def ask(self, queries: Queries) -> Asked:
        """The queries, encoded, with their normalisers."""


class VectorPool:
    """A source of dot products, behind an index.

    Args:
        source: whose vectors the index holds (zeros for items without evidence).
        index: over all N rows.
        temperature: of its softmax.
        head: H, items that are searched for whatever may be shown.
        sample: (S,) int64 distinct rows in ascending order, drawn uniformly from those with evidence.
    """

    def __init__(self, source: VectorSource, index: ItemIndex, *, temperature: float, head: int, sample: np.ndarray):
        self.source, self.index, self.temperature = source, index, np.float32(temperature)
        self.evidence = source.evidence
        self.num_evident = len(source.item_vectors) if self.evidence is None else int(self.evidence.sum())
        self.head = min(head, len(source.item_vectors))
        self.sample, self.sample_vectors = sample, source.item_vectors[sample]

    def ask(self, queries: Queries) -> "AskedVectors":
        """Encode, search, estimate the normalisers."""
        users = np.ascontiguousarray(self.source.user_vectors(queries), np.float32)
        heads = self.index.search(users, self.head)[0]
        seen = [queries.items[queries.indptr[at] : queries.indptr[at + 1]] for at in range(len(queries))]
        return AskedVectors(self, users, heads, seen)

    def scores(self, user: np.ndarray, rows: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """(U,) float32 exact scores, as the source itself gives them for a history that is not empty."""
        scores = self.source.item_vectors[rows] @ user
        if self.evidence is not None:
            scores[~self.evidence[rows]] = NO_EVIDENCE
        if self.source.excludes_history:
            scores[np.isin(rows, seen)] = NO_EVIDENCE
        return scores

    def log_normaliser(self, user: np.ndarray, head: np.ndarray, sampled: np.ndarray, seen: np.ndarray) -> float:
        """Log of the sum of exp(score / temperature) over the catalogue.

        Args:
            user: (D,) float32.
            head: (H,) distinct rows, which hold the largest terms.
            sampled: (S,) float32 scores of the sample.
            seen: rows of the history.
        """
        scores = self.scores(user, head, seen)
        count, known = self.num_evident, head
        if self.source.excludes_history:
            known = np.union1d(head, seen)
            away = np.unique(seen)
            count -= len(away) if self.evidence is None else int(self.evidence[away].sum())
        rest = count - int((scores > NO_EVIDENCE).sum())
        place = np.searchsorted(self.sample, known)
        place = place[(place < len(self.sample)) & (self.sample[np.minimum(place, len(self.sample) - 1)] == known)]
        outside = np.delete(sampled, place)
        peak = max(scores.max(initial=NO_EVIDENCE), outside.max(initial=NO_EVIDENCE)) / self.temperature
        total = np.exp(scores / self.temperature - peak).sum()
        if len(outside):
            total += rest * np.exp(outside / self.temperature - peak).mean()
        return float(peak + np.log(total)) if total > 0 else 0.0


class AskedVectors:
    """See `Asked`.

    Args:
        pool: whose.
        users: (B, D) float32.
        heads: (B, H) int32 rows, best first, -1 padded.
        seen: B arrays of history rows.
    """

    def __init__(self, pool: VectorPool, users: np.ndarray, heads: np.ndarray, seen: list[np.ndarray]):
        self.pool, self.users, self.heads, self.seen = pool, users, heads, seen
        sampled_BS = users @ pool.sample_vectors.T
        self._normalisers = [
            pool.log_normaliser(user, head[head >= 0], sampled, history)
            for user, head, sampled, history in zip(users, heads, sampled_BS, seen, strict=True)
        ]

    def best(self, at: int, count: int, may: May) -> np.ndarray:
        """See `Asked`; the head where it holds enough, else another search."""
        if may.few is not None:
            return may.few
        kept = may.kept(self.heads[at])
        if len(kept) < count:
            blocked = (np.array([0, len(may.blocked)]), may.blocked)
            rows = self.pool.index.search(self.users[at : at + 1], count, allowed=may.mask, seen=blocked)[0][0]
            kept = np.union1d(kept, rows[rows >= 0])
        return kept

    def scores(self, at: int, rows: np.ndarray) -> np.ndarray:
        """(U,) float32 scores of given items."""
        if not len(self.seen[at]):
            return np.zeros(len(rows), np.float32)
        return self.pool.scores(self.users[at], rows, self.seen[at])

    def log_probs(self, at: int, rows: np.ndarray) -> np.ndarray:
        """See `Asked`."""
        if not len(self.seen[at]) or self.pool.num_evident == 0:
            return np.full(len(rows), -np.log(len(self.pool.source.item_vectors)), np.float32)
        return (self.scores(at, rows) / self.pool.temperature - self._normalisers[at]).astype(np.float32)


class SparsePool:
    """A source of sparse sums.

    Args:
        source: see `SparseSource`.
        temperature: of its softmax.
    """

    def __init__(self, source: SparseSource, *, temperature: float):
        self.source, self.temperature = source, np.float32(temperature)

    def ask(self, queries: Queries) -> "AskedSums":
        """Sum the rows of the histories."""
        return AskedSums(self.source.sums(queries), self.temperature)


class AskedSums:
    """See `Asked`.

    Args:
        sums: (B, N) CSR.
        temperature: of the softmax.
    """

    def __init__(self, sums, temperature: np.float32):
        sums.sort_indices()
        self._sums, self._temperature = sums, temperature

    def _row(self, at: int) -> tuple[np.ndarray, np.ndarray]:
        first, stop = self._sums.indptr[at], self._sums.indptr[at + 1]
        return self._sums.indices[first:stop], self._sums.data[first:stop]

    def best(self, at: int, count: int, may: May) -> np.ndarray:
        """See `Asked`; only items that the history speaks for."""
        if may.few is not None:
            return may.few
        rows, values = self._row(at)
        stay = values > 0
        if may.mask is not None:
            stay &= may.mask[rows]
        if len(may.blocked):
            stay &= ~np.isin(rows, may.blocked)
        rows, values = rows[stay], values[stay]
        return rows if len(rows) <= count else rows[np.argpartition(-values, count - 1)[:count]]

    def log_probs(self, at: int, rows: np.ndarray) -> np.ndarray:
        """See `Asked`."""
        known, values = self._row(at)
        scores = np.zeros(len(rows), np.float32)
        if len(known):
            place = np.minimum(np.searchsorted(known, rows), len(known) - 1)
            scores = np.where(known[place] == rows, values[place], 0).astype(np.float32)
        peak = max(float(values.max(initial=0.0)), 0.0) / self._temperature
        silent = self._sums.shape[1] - len(known)
        total = np.exp(values / self._temperature - peak).sum() + silent * np.exp(-peak)
        return (scores / self._temperature - peak - np.log(total)).astype(np.float32)


class StaticPool:
    """A source that says the same to everybody.

    Args:
        scores: (N,) float32.
        temperature: of its softmax.
    """

    def __init__(self, scores: np.ndarray, *, temperature: float):
        self.order = np.argsort(-scores, kind="stable")
        self.all_log_probs = log_softmax(scores[None, :], temperature)[0]

    def ask(self, queries: Queries) -> "StaticPool":
        """Itself."""
        return self

    def best(self, at: int, count: int, may: May) -> np.ndarray:
        """See `Asked`; reads down its order until there are enough."""
        if may.few is not None:
            return may.few
        stop = count + len(may.blocked)
        while len(kept := may.kept(self.order[:stop])) < count and stop < len(self.order):
            stop *= 4
        return kept[:count]

    def log_probs(self, at: int, rows: np.ndarray) -> np.ndarray:
        """See `Asked`."""
        return self.all_log_probs[rows]
