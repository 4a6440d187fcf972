"""Id dropout: in each step some items do without their own vectors and take the mean of those nearest by content.

An item that nobody has chosen gets such a place when the model is finished (`models/newcomers.py`). An encoder that meets such places
while it learns, in histories and among the answers, knows what to make of them.

Source: Volkovs et al., "DropoutNet: Addressing Cold Start in Recommender Systems", NeurIPS 2017, which drops the preference vector of a
random part of the items and leaves the content.

Legend: N items, R rows of the table (N and padding), K neighbours, D dimension, C content dimension.
"""

import numpy as np
import torch
from torch import Tensor

from raysys.models.interest import InterestEncoder
from raysys.models.newcomers import AT_ONCE, nearest, stood_in


class StandIns:
    """Who stands in for whom.

    Args:
        content: (N, C) float32 unit content vectors, zero without content.
        known: (N,) bool, items with training events; only these stand in, and are stood in for.
    """

    def __init__(self, content: np.ndarray, known: np.ndarray):
        parts = [
            nearest(content, content[rows], known, leave_out=rows)
            for rows in np.split(np.arange(len(content)), range(AT_ONCE, len(content), AT_ONCE))
        ]
        rows, weights = (np.concatenate(part) for part in zip(*parts, strict=True))
        self.items = torch.from_numpy(np.flatnonzero(known & (weights.sum(axis=1) > 0)))
        self.rows, self.weights = torch.from_numpy(rows)[self.items], torch.from_numpy(weights)[self.items]

    def table(self, encoder: InterestEncoder, share: float) -> Tensor:
        """(R, D) float32: the item table with a random part of the items stood in for; gradients reach those who stand in.

        Args:
            encoder: with its whole table.
            share: of the items that have somebody, by torch's generator.
        """
        weight = encoder.items.weight
        drawn = torch.nonzero(torch.rand(len(self.items)) < share)[:, 0]
        rows, weights = self.rows[drawn].to(weight.device), self.weights[drawn].to(weight.device)
        mean = (encoder.item_vectors(rows) * weights[:, :, None]).sum(dim=1)
        return weight.index_copy(0, self.items[drawn].to(weight.device), stood_in(mean, weight[self.items.to(weight.device)].detach()))
