"""Retrieval that looks at a pool of items a query instead of the whole catalogue.

Each source names its best allowed items; the union is scored under every source
and fused, as the dense way does with all items. An item that no source has among
its best is not seen; it could hardly be among the best of their mixture.

Legend: B queries, N items, K candidates, S sources, U items of a union, C content dimension.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from raysys.models.base import Candidates, top_k
from raysys.models.fusion import Fusion
from raysys.pools.sources import AskedVectors, May, Pool, VectorPool
from raysys.queries import Queries


@dataclass(frozen=True)
class Pools:
    """The sources of a pipeline over a large catalogue.

    Attributes:
        pools: by source name; popularity is one of them, so that there is something to say about every item.
        fusion: the mixture.
        content: of the content vectors, whether they are a source or not; None without.
        num_items: N.
        size: items each source puts into a pool, at least.
        few: so many allowed items or fewer are all looked at.
    """

    pools: Mapping[str, Pool]
    fusion: Fusion
    content: VectorPool | None
    num_items: int
    size: int
    few: int
    width: int
    """Scores of one source that a query takes at once: those of the sample and of the head."""

    def retrieve(
        self, queries: Queries, k: int, *, allowed: np.ndarray | None, blocked: tuple[np.ndarray, np.ndarray] | None, closest: int
    ) -> tuple[Candidates, np.ndarray | None, np.ndarray | None]:
        """The k best by the mixture.

        Args:
            queries: B histories.
            k: candidates a query.
            allowed: (N,) or (B, N) bool; all when None.
            blocked: (indptr (B+1,), rows) that must not appear.
            closest: best content scores wanted of each query, 0 for none.

        Returns:
            Candidates (-1 padded to min(k, N)), content profiles (B, C) and (B, closest) their best scores among what may appear,
            descending, -1 padded; None, None without content, or where none are wanted.
        """
        asked, empty = {name: pool.ask(queries) for name, pool in self.pools.items()}, queries.lengths == 0
        near = None
        if self.content is not None and closest:
            known = asked.get("content")
            near = known if isinstance(known, AskedVectors) else self.content.ask(queries)
        shape = (len(queries), min(k, self.num_items))
        found = Candidates(
            np.full(shape, -1, np.int32),
            np.full(shape, -np.inf, np.float32),
            np.full((*shape, len(asked)), -np.inf, np.float32),
            tuple(asked),
        )
        affinity = np.full((len(queries), closest), -1.0, np.float32)
        alike = self._may(allowed, np.zeros(0, np.int32)) if allowed is None or allowed.ndim == 1 else None
        for at in range(len(queries)):
            away = np.zeros(0, np.int32) if blocked is None else blocked[1][blocked[0][at] : blocked[0][at + 1]]
            may = self._may(allowed[at], away) if alike is None else May(alike.mask, away, alike.few)  # type: ignore[index]
            rows, best = self._union(asked, near, at, max(k, self.size // 2), may)
            log_probs = np.stack([one.log_probs(at, rows) for one in asked.values()])
            fused = self.fusion.fuse(dict(zip(asked, log_probs[:, None, :], strict=True)), empty=empty[at : at + 1])[0]
            order = top_k(fused[None, :], k)[0]
            found.items[at, : len(order)], found.fused[at, : len(order)] = rows[order], fused[order]
            found.log_probs[at, : len(order)] = log_probs[:, order].T
            if near is not None:
                scores = np.sort(near.scores(at, best))[::-1][:closest]
                affinity[at, : len(scores)] = scores
        return (found, None, None) if near is None else (found, near.users, affinity)

    def log_probs(self, queries: Queries, items: np.ndarray) -> dict[str, np.ndarray]:
        """(B, K) float32 log-probability of given (B, K) items under each source."""
        asked = {name: pool.ask(queries) for name, pool in self.pools.items()}
        return {name: np.stack([one.log_probs(at, rows) for at, rows in enumerate(items)]) for name, one in asked.items()}

    def _may(self, mask: np.ndarray | None, blocked: np.ndarray) -> May:
        count = self.num_items if mask is None else int(np.count_nonzero(mask))
        if mask is None or count == self.num_items:
            return May(None, blocked, None)
        return May(mask, blocked, np.flatnonzero(mask) if count <= self.few else None)

    def _union(self, asked: Mapping, near: AskedVectors | None, at: int, count: int, may: May) -> tuple[np.ndarray, np.ndarray]:
        """(U,) ascending rows to look at, and those among which the best by content are."""
        if may.few is not None:
            rows = np.setdiff1d(may.few, may.blocked, assume_unique=False)
            return rows, rows
        best = {name: one.best(at, count, may) for name, one in asked.items()}
        by_content = best["content"] if "content" in best else near.best(at, count, may) if near is not None else np.zeros(0, np.int64)
        return np.unique(np.concatenate(list(best.values()))).astype(np.int64), by_content
