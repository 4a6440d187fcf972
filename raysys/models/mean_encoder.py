"""Several encoders as one teacher: the mean of their logits.

Encoders that differ in nothing but their seed err in different places; their mean orders better than any of them, at the price of all.
A student is taught to keep what it can of that at the price of one.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn

from raysys.models.interest import InterestEncoder
from raysys.queries import Queries


class MeanEncoder(nn.Module):
    """M encoders over the same items, side by side: the product of its states and item vectors is the mean of their logits.

    Args:
        encoders: M of them, with the same items, event types, `max_length` and `exclude_seen`; widths and depths may differ.
    """

    def __init__(self, encoders: list[InterestEncoder]):
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self._each = tuple(encoders)  # the same, as what they are
        first = encoders[0]
        self.num_items, self.num_event_types, self.items = first.num_items, first.num_event_types, first.items
        self.config = dataclasses.replace(first.config, dim=sum(encoder.config.dim for encoder in encoders))

    def forward(self, items_BT: Tensor, events_BT: Tensor, gaps_BT: Tensor, waits_BT: Tensor) -> Tensor:
        """(B, T, sum of D) float32 states; see `InterestEncoder.forward`."""
        return torch.cat([encoder(items_BT, events_BT, gaps_BT, waits_BT) for encoder in self._each], dim=-1)

    def last_states(self, items_BT: Tensor, events_BT: Tensor, gaps_BT: Tensor, waits_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """(B, sum of D) float32; see `InterestEncoder.last_states`."""
        return torch.cat([encoder.last_states(items_BT, events_BT, gaps_BT, waits_BT, lengths_B) for encoder in self._each], dim=-1)

    def codes(self, queries: Queries) -> tuple[np.ndarray | None, ...]:
        """What any of them looks at; see `InterestEncoder.codes`."""
        columns = zip(*(encoder.codes(queries) for encoder in self._each), strict=True)
        return tuple(next((codes for codes in column if codes is not None), None) for column in columns)

    def item_vectors(self, rows: Tensor | None = None) -> Tensor:
        """(..., sum of D) float32, each encoder's divided by M; see `InterestEncoder.item_vectors`."""
        return torch.cat([encoder.item_vectors(rows) for encoder in self._each], dim=-1) / len(self._each)
