"""What every model of the pipeline agrees on: queries in, scores out, arrays to disk.

Legend: B queries, N items of the catalogue, K candidates, S sources.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from scipy import sparse

from raysys.queries import Queries

NO_EVIDENCE = -1e9
"""Score of an item without a training interaction, whose vector is still random, and of what was never learnt to be told apart."""

Arrays = dict[str, np.ndarray]
Meta = dict[str, Any]


@dataclass(frozen=True)
class Candidates:
    """What retrieval hands to ranking: K items a query, best fused first.

    Attributes:
        items: (B, K) int32 item rows; -1 pads rows with fewer than K candidates.
        fused: (B, K) float32 log-probability of the fused sources; -inf at padding.
        log_probs: (B, K, S) float32 log-probability under each source alone.
        sources: S names, in the order of the last axis of `log_probs`.
    """

    items: np.ndarray
    fused: np.ndarray
    log_probs: np.ndarray
    sources: tuple[str, ...]

    def __getitem__(self, rows: slice) -> "Candidates":
        """Those of some queries."""
        return replace(self, items=self.items[rows], fused=self.fused[rows], log_probs=self.log_probs[rows])

    def take(self, rows: np.ndarray, columns: np.ndarray) -> "Candidates":
        """(b, k) of them: (b,) rows in any order, (b, k) columns of each."""
        at = (rows[:, None], columns)
        return replace(self, items=self.items[at], fused=self.fused[at], log_probs=self.log_probs[at])

    @classmethod
    def stack(cls, parts: Sequence["Candidates"]) -> "Candidates":
        """Those of one or more batches, one batch after the other."""
        items, fused, log_probs = (np.concatenate([getattr(part, name) for part in parts]) for name in ("items", "fused", "log_probs"))
        return cls(items, fused, log_probs, parts[0].sources)


@runtime_checkable
class Retriever(Protocol):
    """A retrieval source: scores the whole catalogue for a batch of queries."""

    name: str

    def scores(self, queries: Queries) -> np.ndarray:
        """(B, N) float32 unbounded scores, higher is better; rows of a query without evidence are constant."""
        ...

    def to_arrays(self) -> tuple[Arrays, Meta]:
        """Arrays for a safetensors file and JSON metadata, enough for `from_arrays`."""
        ...

    @classmethod
    def from_arrays(cls, arrays: Arrays, meta: Meta) -> "Retriever":
        """The model back from what `to_arrays` gave."""
        ...


@runtime_checkable
class VectorSource(Protocol):
    """A retriever whose scores are dot products of a vector a query and a vector an item; all 0 for an empty history."""

    item_vectors: np.ndarray
    """(N, D) float32."""

    @property
    def evidence(self) -> np.ndarray | None:
        """(N,) bool, items that it can tell apart at all, the others score NO_EVIDENCE; None for all."""
        ...

    @property
    def excludes_history(self) -> bool:
        """Whether items of the history score NO_EVIDENCE."""
        ...

    def user_vectors(self, queries: Queries) -> np.ndarray:
        """(B, D) float32."""
        ...


@runtime_checkable
class SparseSource(Protocol):
    """A retriever whose scores are sums of rows of a sparse matrix: 0 for most items."""

    def sums(self, queries: Queries) -> sparse.csr_array:
        """(B, N) CSR float32 scores; what is not stored is 0."""
        ...


SAMPLE_STRIDE = 8
"""One score in so many tells where about the k-th largest lies."""


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k largest values of each row, best first; ties by lower column.

    Args:
        scores: (B, N) float32.
        k: cut-off; N when larger.

    Returns:
        (B, min(k, N)) int64 columns.
    """
    k = min(k, scores.shape[1])
    found = np.empty((len(scores), k), np.int64)
    bounds = _bounds(scores, k)
    for row, values in enumerate(scores):
        columns = np.flatnonzero(values >= bounds[row])
        if len(columns) < k:  # the sample said too much, or there are values that are not numbers
            columns = np.arange(len(values))
        found[row] = columns[np.argsort(-values[columns], kind="stable")[:k]]
    return found


def _bounds(scores: np.ndarray, k: int) -> np.ndarray:
    """(B,) values that about k of a row's or some more reach, at least k in nearly every row."""
    expected = k / SAMPLE_STRIDE
    rank = math.ceil(expected + 3 * math.sqrt(expected)) + 1
    sample = scores[:, ::SAMPLE_STRIDE]
    if 2 * rank >= sample.shape[1]:
        return np.full(len(scores), -np.inf, scores.dtype)
    return np.partition(sample, sample.shape[1] - rank, axis=1)[:, -rank]
