"""What models share that are a sparse (N, N) matrix of history item to candidate: asking it with a faded history.

Legend: B queries, N items, E events of all queries, e those that count, K items asked about.
"""

import numba
import numpy as np
from scipy import sparse

from raysys.queries import Queries

FadedEvents = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Items (e,) int32 and weights (e,) float32, and where each history begins in them, (B + 1,) int64."""


def faded_events(queries: Queries, weights: np.ndarray, *, decay: float, longest: int) -> FadedEvents:
    """Events of the histories that count, each faded by its place from the end.

    Args:
        queries: B histories.
        weights: (E,) float32 weight of each event; those of weight 0 take no place.
        decay: weight of an event relative to the one after it.
        longest: last events of a history that are looked at.

    """
    counted = weights > 0
    rows, items, weights = queries.rows[counted], queries.items[counted], weights[counted]
    ends = np.cumsum(np.bincount(rows, minlength=len(queries)))
    from_end = ends[rows] - 1 - np.arange(len(rows))
    weights = weights * np.float32(decay) ** from_end.astype(np.float32)
    weights[from_end >= longest] = 0
    return items, weights, np.concatenate([[0], ends])


def history_of(events: FadedEvents, num_items: int) -> sparse.csr_array:
    """(B, N) CSR float32 weight of each history item."""
    items, weights, indptr = events
    history = sparse.csr_array((weights, items, indptr), shape=(len(indptr) - 1, num_items))
    history.sum_duplicates()
    history.eliminate_zeros()
    return history


def summed_rows(events: FadedEvents, matrix: sparse.csr_array) -> np.ndarray:
    """(B, N) float32 sum over each history of its items' rows of an (N, N) matrix, times their weights.

    Args:
        events: of the histories.
        matrix: CSR float32.
    """
    items, weights, indptr = events
    sums = np.zeros((len(indptr) - 1, matrix.shape[1]), np.float32)
    _add_rows(sums, items, weights, indptr, matrix.indptr, matrix.indices, matrix.data)
    return sums


@numba.njit(nogil=True, cache=True)
def _add_rows(sums, items, weights, starts, indptr, indices, data):  # pragma: no cover - compiled
    # A product of two sparse matrices finds out first what its result will hold; where that is spelt out anyway it is not needed.
    for row in range(sums.shape[0]):
        into = sums[row]
        for event in range(starts[row], starts[row + 1]):
            weight = weights[event]
            if weight == 0:
                continue
            for at in range(indptr[items[event]], indptr[items[event] + 1]):
                into[indices[at]] += weight * data[at]


def strongest(history: sparse.csr_array, matrix: sparse.csr_array, items: np.ndarray) -> np.ndarray:
    """The history item that contributed most to each item's sum.

    Args:
        history: (1, N).
        matrix: (N, N).
        items: (K,) item rows.

    Returns:
        (K,) int32 item rows of the history, -1 where no history item speaks for the item.
    """
    entries = history.tocoo()
    if entries.nnz == 0:
        return np.full(len(items), -1, np.int32)
    shares = matrix[entries.col][:, items].toarray() * entries.data[:, None]
    return np.where(shares.max(axis=0) > 0, entries.col[shares.argmax(axis=0)], -1).astype(np.int32)
