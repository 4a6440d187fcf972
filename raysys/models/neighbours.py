"""What models share that are a sparse (N, N) matrix of history item to candidate: asking it with a faded history.

Legend: B queries, N items, E events of all queries, K items asked about.
"""

import numpy as np
from scipy import sparse

from raysys.queries import Queries


def faded_history(queries: Queries, weights: np.ndarray, *, decay: float, longest: int, num_items: int) -> sparse.csr_array:
    """(B, N) CSR float32 weight of each history item, faded by its place from the end.

    Args:
        queries: B histories.
        weights: (E,) float32 weight of each event; those of weight 0 take no place.
        decay: weight of an event relative to the one after it.
        longest: last events of a history that are looked at.
        num_items: N.
    """
    rows = queries.rows[weights > 0]
    items, weights = queries.items[weights > 0], weights[weights > 0]
    ends = np.cumsum(np.bincount(rows, minlength=len(queries)))
    from_end = ends[rows] - 1 - np.arange(len(rows))
    weights = weights * np.float32(decay) ** from_end.astype(np.float32)
    weights[from_end >= longest] = 0
    history = sparse.csr_array((weights, items, np.concatenate([[0], ends])), shape=(len(queries), num_items))
    history.sum_duplicates()
    history.eliminate_zeros()
    return history


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
