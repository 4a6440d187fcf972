"""The textbook baseline: interest vector times item vector.

    h = mean of one-hot vectors of the history        (N,)
    u = softmax(W h)                                  (D,)  interest vector
    v = E[i]                                          (D,)  item vector
    r = u . v                                                score
    p = sigmoid(a r + b)                                     probability

trained with cross-entropy over the catalogue or with MSE = mean((r_hat - r)^2).
What every other source has to beat.

Legend: B queries, N items, D dimension.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse

from raysys.models.base import Arrays, Meta
from raysys.prepare.dataset import Sequences
from raysys.queries import Queries

MAX_SOFTMAX_ITEMS = 20_000
"""Items in the denominator of the training softmax; bounds time and memory of a step."""


@dataclass(frozen=True)
class DotProductConfig:
    """Shape and training of the baseline."""

    dim: int = 32
    """D, number of interests."""
    loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    """Over the catalogue, or squared error against 1 for the next item and 0 for sampled others."""
    steps: int = 400
    """Gradient steps."""
    batch_size: int = 512
    """Positions a step."""
    negatives: int = 8
    """Sampled other items a position, for mse."""
    lr: float = 0.05
    """Learning rate of Adam."""
    max_history: int = 50
    """Last events that make h."""


def interest_vector(history: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """u = softmax(W h).

    Args:
        history: (N,) float, h.
        weights: (D, N) float, W.
    """
    logits = weights @ history
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def mse(predicted: np.ndarray, observed: np.ndarray) -> float:
    """mean((r_hat - r)^2)."""
    return float(np.mean((np.asarray(predicted) - np.asarray(observed)) ** 2))


def cross_entropy(probabilities: np.ndarray, observed: np.ndarray) -> float:
    """-mean(y log p + (1 - y) log(1 - p)), in nats."""
    p, y = np.asarray(probabilities), np.asarray(observed)
    return float(-np.mean(y * np.log(p) + (1 - y) * np.log(1 - p)))


class DotProduct:
    """See the module (a Retriever).

    Args:
        weights: (D, N) float32, W.
        item_vectors: (N, D) float32, E.
        calibration: (a, b).
        config: settings.
    """

    name = "dot_product"
    evidence = None
    excludes_history = False

    def __init__(self, weights: np.ndarray, item_vectors: np.ndarray, calibration: tuple[float, float], config: DotProductConfig):
        self.weights, self.item_vectors = weights.astype(np.float32), item_vectors.astype(np.float32)
        self.calibration, self.config = calibration, config

    @classmethod
    def fit(cls, sequences: Sequences, num_items: int, config: DotProductConfig | None = None, *, seed: int = 0) -> "DotProduct":
        """Learn to tell the next item at random positions of the histories given (pass the training part)."""
        config = config or DotProductConfig()
        generator = torch.Generator().manual_seed(seed)
        rng = np.random.default_rng(seed)
        weights = torch.empty(num_items, config.dim).normal_(0, 0.1, generator=generator).requires_grad_()
        vectors = torch.empty(num_items, config.dim).normal_(0, 0.1, generator=generator).requires_grad_()
        scale = torch.tensor([1.0, -2.0], requires_grad=True)
        positions = np.flatnonzero(np.arange(len(sequences.items)) > sequences.indptr[:-1][sequences.rows])
        optimizer = torch.optim.Adam([weights, vectors, scale], lr=config.lr)
        for _ in range(config.steps if len(positions) else 0):
            batch = rng.choice(positions, min(config.batch_size, len(positions)), replace=False)
            query = sequences.queries_before(batch, max_events=config.max_history)
            # W h, with h the mean of one-hot rows: the mean of the rows of W's transpose that it picks.
            items, firsts = torch.from_numpy(query.items.astype(np.int64)), torch.from_numpy(query.indptr[:-1])
            interest = torch.softmax(F.embedding_bag(items, weights, firsts, mode="mean"), dim=1)
            target = torch.from_numpy(sequences.items[batch].astype(np.int64))
            if config.loss == "cross_entropy":
                loss = _catalogue_loss(interest, vectors, target, rng)
            else:
                others = torch.from_numpy(rng.integers(0, num_items, (len(batch), config.negatives)))
                rows = torch.cat([target[:, None], others], dim=1)
                score = (interest[:, None, :] * vectors[rows]).sum(dim=2)
                observed = torch.zeros_like(score)
                observed[:, 0] = 1.0
                loss = F.mse_loss(score, observed)
                loss = loss + F.binary_cross_entropy_with_logits(scale[0] * score.detach() + scale[1], observed)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        slope, intercept = scale.detach().tolist()
        return cls(weights.detach().numpy().T, vectors.detach().numpy(), (slope, intercept), config)

    def user_vectors(self, queries: Queries) -> np.ndarray:
        """(B, D) float32 interest vectors; uniform for an empty history."""
        history = _mean_one_hot(queries, len(self.item_vectors), self.config.max_history)
        logits = np.asarray(history @ self.weights.T)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)

    def scores(self, queries: Queries) -> np.ndarray:
        """(B, N) float32 u . v; zero for an empty history."""
        scores = self.user_vectors(queries) @ self.item_vectors.T
        scores[queries.lengths == 0] = 0.0
        return scores

    def probabilities(self, scores: Sequence[float] | np.ndarray) -> np.ndarray:
        """Sigmoid of calibrated scores (fitted with the mse loss; with cross-entropy the softmax is the probability)."""
        slope, intercept = self.calibration
        return 1.0 / (1.0 + np.exp(-(slope * np.asarray(scores) + intercept)))

    def to_arrays(self) -> tuple[Arrays, Meta]:
        """W and E."""
        arrays = {"weights": self.weights, "item_vectors": self.item_vectors}
        return arrays, {"calibration": list(self.calibration), "config": asdict(self.config)}

    @classmethod
    def from_arrays(cls, arrays: Arrays, meta: Meta) -> "DotProduct":
        """The model back from `to_arrays`."""
        return cls(arrays["weights"], arrays["item_vectors"], tuple(meta["calibration"]), DotProductConfig(**meta["config"]))


def _catalogue_loss(interest: torch.Tensor, vectors: torch.Tensor, target: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Cross-entropy of the next item over the catalogue; over a uniform sample of it and the target where it is large."""
    if len(vectors) <= MAX_SOFTMAX_ITEMS:
        return F.cross_entropy(interest @ vectors.T, target)
    others = torch.from_numpy(rng.integers(0, len(vectors), MAX_SOFTMAX_ITEMS))
    logits = (interest @ vectors[others].T).masked_fill(others[None, :] == target[:, None], -torch.inf)
    of_target = (interest * vectors[target]).sum(dim=1, keepdim=True)
    return F.cross_entropy(torch.cat([of_target, logits], dim=1), torch.zeros_like(target))


def _mean_one_hot(queries: Queries, num_items: int, max_history: int) -> sparse.csr_array:
    """(B, N) rows of h: 1 / length at each of the last items."""
    lengths = np.minimum(queries.lengths, max_history)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    take = np.arange(indptr[-1]) + np.repeat(queries.indptr[1:] - lengths - indptr[:-1], lengths)
    values = np.repeat(1.0 / np.maximum(lengths, 1), lengths).astype(np.float32)
    return sparse.csr_array((values, queries.items[take], indptr), shape=(len(queries), num_items))
