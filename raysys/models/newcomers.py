"""Items that nobody has chosen yet: which known items they are like by content, and a place in the encoder from that.

Legend: N items, M of them new, D dimension of a model, C content dimension.
"""

import numpy as np
import torch

from raysys.models.interest import InterestRetriever

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
    if not len(cold) or not retriever.warm.any():
        return retriever
    mix = neighbour_weights(content, content[cold], retriever.warm)
    warm = retriever.warm.copy()
    warm[cold] = True
    moved = InterestRetriever(retriever.encoder, warm)
    with torch.no_grad():
        table = moved.encoder.items.weight
        table[cold] = torch.from_numpy(mix @ retriever.item_vectors) * table[: len(mix)].norm(dim=1).mean()
    return InterestRetriever(moved.encoder, warm)
