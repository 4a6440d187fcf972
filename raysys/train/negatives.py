"""Which items a sampled loss tells the target apart from, and how likely each was to be drawn.

Legend: N items, S negatives of a step.
"""

from typing import Literal

import numpy as np

Sampling = Literal["uniform", "log_uniform", "mixed"]


class Negatives:
    """Draws of shared negatives, with replacement.

    `log_uniform` draws the item of popularity rank r (0-based) with probability log((r + 2) / (r + 1)) / log(N + 1), nearly Zipf's law;
    `mixed` takes half of the draws from each.

    Args:
        sampling: which distribution.
        counts: (N,) training events by item; ranks follow from them, ties by row.

    Source: log-uniform candidates as in Jean et al., "On Using Very Large Target Vocabulary for Neural Machine Translation", ACL 2015;
    mixed ones as in Yang et al., "Mixed Negative Sampling for Learning Two-tower Neural Networks in Recommendations", WWW 2020.
    """

    def __init__(self, sampling: Sampling, counts: np.ndarray):
        self.sampling, self.num_items = sampling, len(counts)
        self._by_rank = np.argsort(-counts, kind="stable")
        ranks = np.empty(self.num_items)
        ranks[self._by_rank] = np.arange(self.num_items)
        zipf = np.log1p(1.0 / (ranks + 1)) / np.log(self.num_items + 1)
        share = {"uniform": 0.0, "log_uniform": 1.0, "mixed": 0.5}[sampling]
        self.log_probs = np.log(share * zipf + (1 - share) / self.num_items).astype(np.float32)
        """(N,) float32 log-probability of each item in one draw."""

    def draw(self, size: int, rng: np.random.Generator) -> np.ndarray:
        """(S,) int64 item rows."""
        if self.sampling == "uniform":
            return rng.integers(0, self.num_items, size)
        # Inverse of the cumulative distribution log(r + 1) / log(N + 1).
        ranks = np.exp(rng.random(size) * np.log(self.num_items + 1)).astype(np.int64) - 1
        drawn = self._by_rank[ranks.clip(0, self.num_items - 1)]
        if self.sampling == "mixed":
            half = size // 2
            drawn[:half] = rng.integers(0, self.num_items, half)
        return drawn

    def log_expected(self, rows: np.ndarray, size: int) -> np.ndarray:
        """(n,) float32 log of how often each of the rows is expected among `size` draws."""
        return self.log_probs[rows] + np.float32(np.log(size))
