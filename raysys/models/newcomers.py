"""Items that nobody has chosen yet: which known items they are like by content, and a place in the encoder from that.

Legend: N items, M of them new, D dimension of a model, C content dimension.
"""

import numpy as np
import torch

from raysys.models.interest import InterestRetriever

AT_ONCE = 256
"""New items that are compared with the catalogue together."""
MAX_PRODUCTS = 2_000_000_000
"""Comparisons of content vectors at most; where there are more new items, the last ones stay without a place."""
NEIGHBOURS = 10
"""Known items nearest by content whose vectors make that of a new item."""


def neighbour_weights(catalogue: np.ndarray | None, vectors: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which known items new ones are like.

    Args:
        catalogue: (N, C) float32 unit content vectors; None without content.
        vectors: (M, C) those of the new items.
        known: (N,) bool, items with events.

    Returns:
        (M, N) float32 rows that sum to 1; all known items alike where content says nothing.
    """
    flat = known / max(1, known.sum())
    weights = np.tile(flat.astype(np.float32), (len(vectors), 1))
    if catalogue is None:
        return weights
    similar = np.where(known[None, :], vectors @ catalogue.T, -1.0)
    for row, scores in enumerate(similar):
        nearest = np.argsort(-scores, kind="stable")[:NEIGHBOURS]
        nearest = nearest[scores[nearest] > 0]
        if len(nearest):
            weights[row] = 0
            weights[row, nearest] = scores[nearest] / scores[nearest].sum()
    return weights


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
        length = table[torch.from_numpy(np.flatnonzero(retriever.warm))].norm(dim=1).mean()
        for first in range(0, len(cold), AT_ONCE):
            rows = cold[first : first + AT_ONCE]
            mean = torch.from_numpy(neighbour_weights(content, content[rows], retriever.warm) @ retriever.item_vectors)
            table[torch.from_numpy(rows)] = length * torch.nn.functional.normalize(mean, dim=1)
    return InterestRetriever(encoder, warm)
