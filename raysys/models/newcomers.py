"""Items that nobody has chosen yet: which known items they are like by content, and a place in the encoder from that.

Legend: N items, M of them new, D dimension of a model, C content dimension.
"""

import numpy as np
import torch
from torch import Tensor

from raysys.models.base import top_k
from raysys.models.interest import InterestRetriever

AT_ONCE = 256
"""Items that are compared with the catalogue together."""
MAX_PRODUCTS = 2_000_000_000
"""Comparisons of content vectors at most; where there are more new items, the last ones stay without a place."""
NEIGHBOURS = 10
"""Known items nearest by content whose vectors make that of a new item."""


def nearest(
    catalogue: np.ndarray, vectors: np.ndarray, known: np.ndarray, leave_out: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The known items whose content is nearest.

    Args:
        catalogue: (N, C) float32 unit content vectors.
        vectors: (M, C) those that are compared with it.
        known: (N,) bool, items with events.
        leave_out: (M,) int64 one item of the catalogue for each of them that is not its neighbour, such as itself.

    Returns:
        (M, K) int64 items, and their (M, K) float32 weights: cosines as shares of 1, and all 0 where content says nothing. K is
        NEIGHBOURS, or N where that is less.
    """
    similar = np.where(known[None, :], vectors @ catalogue.T, 0.0).astype(np.float32)
    if leave_out is not None:
        similar[np.arange(len(vectors)), leave_out] = 0.0
    rows = top_k(similar, NEIGHBOURS)
    cosines = np.maximum(np.take_along_axis(similar, rows, 1), 0.0)
    total = cosines.sum(axis=1, keepdims=True)
    return rows, cosines / np.where(total > 0, total, 1.0)


def neighbour_weights(catalogue: np.ndarray | None, vectors: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which known items new ones are like.

    Args:
        catalogue: (N, C) float32 unit content vectors; None without content.
        vectors: (M, C) those of the new items.
        known: (N,) bool, items with events.

    Returns:
        (M, N) float32 rows that sum to 1; all known items alike where content says nothing.
    """
    flat = (known / max(1, known.sum())).astype(np.float32)
    if catalogue is None:
        return np.tile(flat, (len(vectors), 1))
    rows, shares = nearest(catalogue, vectors, known)
    weights = np.zeros((len(vectors), len(known)), np.float32)
    np.put_along_axis(weights, rows, shares, 1)
    weights[shares.sum(axis=1) == 0] = flat
    return weights


def stood_in(mean: Tensor, known: Tensor) -> Tensor:
    """(M, D) rows of an item table for items of which only the mean of their neighbours' vectors is known.

    Args:
        mean: (M, D) float32 of the neighbours' vectors.
        known: (K, D) rows of known items, whose mean length they get.
    """
    return known.norm(dim=1).mean() * torch.nn.functional.normalize(mean, dim=1)


def placed(retriever: InterestRetriever, content: np.ndarray) -> InterestRetriever:
    """The encoder's source with a vector for every item that has content and no events: the mean of its neighbours'.

    Args:
        retriever: with vectors that mean nothing where `warm` is False.
        content: (N, C) float32 unit content vectors, zero without content.
    """
    cold = np.flatnonzero(~retriever.warm & np.any(content != 0, axis=1))
    cold = cold[: MAX_PRODUCTS // max(1, len(content))]
    if not len(cold) or not retriever.warm.any():
        return retriever
    warm = retriever.warm.copy()
    warm[cold] = True
    encoder = InterestRetriever(retriever.encoder, warm).encoder
    with torch.no_grad():
        table = encoder.items.weight
        known = table[torch.from_numpy(np.flatnonzero(retriever.warm))]
        for first in range(0, len(cold), AT_ONCE):
            rows = cold[first : first + AT_ONCE]
            mean = torch.from_numpy(neighbour_weights(content, content[rows], retriever.warm) @ retriever.item_vectors)
            table[torch.from_numpy(rows)] = stood_in(mean, known)
    return InterestRetriever(encoder, warm)
