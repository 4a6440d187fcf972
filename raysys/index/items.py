"""The index that serving asks: a base on disk, shared by the processes of a node, and what changed since in this one.

The base never changes while it is open. Inserted vectors stand in a small
float32 segment that is searched exactly; deleted and replaced rows of the base
are masked. A search works on one snapshot of the three, so it needs no lock and
sees an insert whole or not at all; the next search after `insert` returned sees it.

Knows vectors and rows; not users, not models, not files (`files.py`).

Legend: B queries, N items of the base, M changed items, D dimension, k results.
"""

import threading
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from raysys.errors import SchemaError, StateError
from raysys.index.exact import exact_top_k
from raysys.index.vectors import Vectors


class Base(Protocol):
    """What never changes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D)."""

    def top_k(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(B, k) rows and float32 scores, -1 and -inf padded, of (N,) bool allowed items; fewer than k only where fewer are allowed."""


class ExactBase:
    """Every item is scored."""

    def __init__(self, vectors: Vectors):
        self.vectors = vectors

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D)."""
        return self.vectors.shape

    def top_k(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As `Base`."""
        return exact_top_k(queries, self.vectors, k, allowed=allowed)


@dataclass(frozen=True)
class _Live:
    """One state of what changed; replaced as a whole."""

    rows: np.ndarray
    """(M,) int64 rows of fresh vectors."""
    vectors: np.ndarray
    """(M, D) float32."""
    hidden: np.ndarray | None
    """(N,) bool, base rows that no longer count; None while all do."""


class ItemIndex:
    """Top-k by dot product over a base and live changes.

    Args:
        base: exact or approximate, N items.
        max_fresh: most inserted items; each is searched exactly.
    """

    def __init__(self, base: Base, *, max_fresh: int):
        self.base, self.max_fresh = base, max_fresh
        self._live = _Live(np.zeros(0, np.int64), np.zeros((0, base.shape[1]), np.float32), None)
        self._changing = threading.Lock()

    @property
    def num_fresh(self) -> int:
        """Items inserted since the base was built."""
        return len(self._live.rows)

    def __len__(self) -> int:
        live = self._live
        return self.base.shape[0] + len(live.rows) - (0 if live.hidden is None else int(live.hidden.sum()))

    def insert(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Add items, or give known ones another vector; visible to the next search.

        Args:
            rows: (M,) distinct row numbers, of any size below 2**31.
            vectors: (M, D) finite float32.

        Raises:
            SchemaError: shapes, rows or values do not fit.
            StateError: more than `max_fresh` items would be waiting for the next build.
        """
        rows, vectors = np.atleast_1d(np.asarray(rows, np.int64)), np.atleast_2d(np.asarray(vectors, np.float32))
        if vectors.shape != (len(rows), self.base.shape[1]) or not np.isfinite(vectors).all():
            raise SchemaError(f"insert: expected ({len(rows)}, {self.base.shape[1]}) finite vectors, one a row, got shape {vectors.shape}")
        if len(np.unique(rows)) < len(rows) or (len(rows) and (rows.min() < 0 or rows.max() >= 2**31)):
            raise SchemaError("insert: expected distinct rows in [0, 2**31)")
        with self._changing:
            live = self._without(rows)
            if len(live.rows) + len(rows) > self.max_fresh:
                raise StateError(
                    f"insert: {len(live.rows):,} items are waiting for the next build of the index and {len(rows):,} more came, "
                    f"expected at most max_fresh={self.max_fresh:,}; publish a bundle that holds them, or raise max_fresh"
                )
            self._live = _Live(np.concatenate([live.rows, rows]), np.concatenate([live.vectors, vectors]), live.hidden)

    def delete(self, rows: np.ndarray) -> None:
        """Remove items; gone from the next search. Unknown rows are no error."""
        with self._changing:
            self._live = self._without(np.atleast_1d(np.asarray(rows, np.int64)))

    def _without(self, rows: np.ndarray) -> _Live:
        live = self._live
        stay = ~np.isin(live.rows, rows)
        hidden, in_base = live.hidden, rows[(rows >= 0) & (rows < self.base.shape[0])]
        if len(in_base):
            hidden = np.zeros(self.base.shape[0], bool) if hidden is None else hidden.copy()
            hidden[in_base] = True
        return _Live(live.rows[stay], live.vectors[stay], hidden)

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        allowed: np.ndarray | None = None,
        seen: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k items of largest dot product that may appear.

        Args:
            queries: (B, D) float32.
            k: cut-off.
            allowed: (R,) bool, or (B, R) for a filter a query (searched one by one); rows from R on are not allowed. All when None.
            seen: (indptr (B+1,), rows): items left out of each query's list.

        Returns:
            (B, k) int32 rows, best first and ties by lower row, -1 where fewer than k may appear; (B, k) float32 scores, -inf there.

        Raises:
            SchemaError: shapes do not fit, or k < 1.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.base.shape[1] or k < 1:
            raise SchemaError(f"search: expected queries (B, {self.base.shape[1]}) and k >= 1, got {queries.shape} and k={k}")
        if allowed is not None and (allowed.ndim not in (1, 2) or (allowed.ndim == 2 and len(allowed) != len(queries))):
            raise SchemaError(f"search: expected allowed (R,) or ({len(queries)}, R), got {allowed.shape}")
        live = self._live
        if allowed is None or allowed.ndim == 1:
            return self._search(live, queries, k, allowed, seen)
        rows, scores = np.full((len(queries), k), -1, np.int32), np.full((len(queries), k), -np.inf, np.float32)
        for one in range(len(queries)):
            part = None if seen is None else (np.array([0, seen[0][one + 1] - seen[0][one]]), seen[1][seen[0][one] : seen[0][one + 1]])
            rows[one], scores[one] = (found[0] for found in self._search(live, queries[one : one + 1], k, allowed[one], part))
        return rows, scores

    def _search(
        self, live: _Live, queries: np.ndarray, k: int, allowed: np.ndarray | None, seen: tuple[np.ndarray, np.ndarray] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        # Of the k + m best, seen items take at most m places.
        most_seen = 0 if seen is None or len(queries) == 0 else int(np.diff(seen[0]).max())
        wanted = max(1, min(k + most_seen, self.base.shape[0] + len(live.rows)))
        rows, scores = self.base.top_k(queries, wanted, self._mask(live, allowed))
        if len(live.rows):
            mask = None if allowed is None else _look_up(allowed, live.rows)
            fresh, fresh_scores = exact_top_k(queries, live.vectors, min(wanted, len(live.rows)), allowed=mask)
            rows = np.hstack([rows, np.where(fresh >= 0, live.rows[fresh], -1)])
            scores = np.hstack([scores, fresh_scores])
        if most_seen:
            scores = np.where(_contains(seen, rows), -np.inf, scores)
        return _best(rows, scores, k)

    def _mask(self, live: _Live, allowed: np.ndarray | None) -> np.ndarray | None:
        """(N,) bool of the base's rows that may appear; None when all may."""
        if allowed is None:
            return None if live.hidden is None else ~live.hidden
        mask = np.zeros(self.base.shape[0], bool)
        mask[: len(allowed)] = allowed[: len(mask)]
        return mask if live.hidden is None else mask & ~live.hidden


def _look_up(allowed: np.ndarray, rows: np.ndarray) -> np.ndarray:
    inside = rows < len(allowed)
    inside[inside] = allowed[rows[inside]]
    return inside


def _contains(seen: tuple[np.ndarray, np.ndarray] | None, rows: np.ndarray) -> np.ndarray:
    """(B, K) bool: which of each query's rows are among its seen ones."""
    assert seen is not None
    owner = np.repeat(np.arange(len(rows), dtype=np.int64), np.diff(seen[0]))
    keys = (owner << 32) | np.asarray(seen[1], np.int64)
    return np.isin((np.arange(len(rows), dtype=np.int64)[:, None] << 32) | np.maximum(rows, 0), keys) & (rows >= 0)


def _best(rows: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    # Full and sorted without ties, as a plain search gives it.
    if rows.shape[1] == k and (scores[:, 1:] < scores[:, :-1]).all() and (scores[:, -1] > -np.inf).all():
        return rows.astype(np.int32), scores
    order = np.lexsort((rows, -scores), axis=-1)[:, :k]
    rows, scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
    rows = np.where(scores > -np.inf, rows, -1)
    missing = ((0, 0), (0, k - rows.shape[1]))
    return (
        np.pad(rows, missing, constant_values=-1).astype(np.int32),
        np.pad(scores, missing, constant_values=-np.inf).astype(np.float32),
    )
