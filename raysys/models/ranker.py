"""The ranker: target attention over the history, crossed with what retrieval knows; two heads.

`relevance` orders the candidates (trained listwise); `like` is P(positive
event | item shown), calibrated. Holds frozen copies of the vectors it needs,
so that a ranking replica loads nothing else. Features do not depend on which
other candidates stand in the list: one item alone gets the same probability.

Legend: B queries, K candidates, S sources, T history positions, D item dimension, C content dimension, A attention width, F features.
Source: Zhou et al., "Deep Interest Network", KDD 2018 (target attention).
"""

from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from raysys.models.base import Arrays, Candidates, Meta
from raysys.models.interest import left_aligned
from raysys.queries import Queries

LOG_PROB_FLOOR = -20.0
"""Log-probabilities are cut here: below it a source says "no", how loudly is noise."""


@dataclass(frozen=True)
class RankerConfig:
    """Shape and training of the ranker."""

    attention_width: int = 16
    """A, width of the attention projections."""
    hidden: int = 48
    """Width of the hidden layer."""
    max_history: int = 20
    """T, last events attended to."""
    dropout: float = 0.1
    """On the hidden layer."""
    epochs: int = 4
    """Passes over the held-out positions."""
    lr: float = 2e-3
    """Learning rate of AdamW."""
    batch_size: int = 256
    """Queries a step."""
    negatives: int = 60
    """Candidates a query that a step looks at besides the target, half of them the best retrieved, half random."""
    calibration_share: float = 0.2
    """Share of the queries kept for calibration and early stopping."""


class RankerNetwork(nn.Module):
    """Attention, features, two heads.

    Args:
        item_vectors: (N + 1, D) frozen; row N is zero and stands for padding.
        content_vectors: (N + 1, C) frozen, C may be 0.
        popularity: (N + 1,) frozen log counts.
        num_sources: S.
        config: shape.
    """

    item_vectors: Tensor
    content_vectors: Tensor
    popularity: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, item_vectors: Tensor, content_vectors: Tensor, popularity: Tensor, num_sources: int, config: RankerConfig):
        super().__init__()
        dim, width = item_vectors.shape[1], config.attention_width
        self.config = config
        self.register_buffer("item_vectors", item_vectors)
        self.register_buffer("content_vectors", content_vectors)
        self.register_buffer("popularity", popularity)
        self.query = nn.Linear(dim, width)
        self.key = nn.Linear(dim, width)
        self.value = nn.Linear(dim, width)
        self.candidate = nn.Linear(dim, width)
        self.recency = nn.Parameter(torch.zeros(config.max_history))
        self.num_dense = num_sources + 7
        features = self.num_dense + 2 * width
        self.register_buffer("mean", torch.zeros(self.num_dense))
        self.register_buffer("std", torch.ones(self.num_dense))
        self.hidden = nn.Sequential(nn.Linear(features, config.hidden), nn.GELU(), nn.Dropout(config.dropout))
        self.relevance = nn.Linear(config.hidden, 1)
        self.like = nn.Linear(config.hidden, 1)
        nn.init.zeros_(self.relevance.weight)  # starts as retrieval order
        self.like_slope = nn.Parameter(torch.zeros(()))

    def dense(self, history_BT: Tensor, lengths_B: Tensor, items_BK: Tensor, fused_BK: Tensor, log_probs_BKS: Tensor) -> Tensor:
        """(B, K, S + 7) features that need no learning."""
        vectors_BTD, candidates_BKD = self.item_vectors[history_BT], self.item_vectors[items_BK]
        similar_BKT = candidates_BKD @ vectors_BTD.transpose(1, 2)
        count_B1 = lengths_B.clamp(min=1)[:, None].float()
        last = (lengths_B - 1).clamp(min=0)[:, None, None].expand(-1, items_BK.shape[1], 1)
        columns = [
            fused_BK.clamp(min=LOG_PROB_FLOOR),
            similar_BKT.sum(2) / count_B1,
            similar_BKT.amax(2),
            similar_BKT.gather(2, last)[..., 0],
            self.popularity[items_BK],
            torch.log1p(lengths_B.float())[:, None].expand(-1, items_BK.shape[1]),
        ]
        if self.content_vectors.shape[1]:
            columns.append((self.content_vectors[items_BK] @ self.content_vectors[history_BT].transpose(1, 2)).amax(2))
        else:
            columns.append(torch.zeros_like(fused_BK))
        return torch.cat([log_probs_BKS.clamp(min=LOG_PROB_FLOOR), torch.stack(columns, dim=2)], dim=2)

    def forward(
        self, history_BT: Tensor, lengths_B: Tensor, items_BK: Tensor, fused_BK: Tensor, log_probs_BKS: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, K) relevance and (B, K) like logits.

        Args:
            history_BT: (B, T) int64 left-aligned, padded with N; T >= 1.
            lengths_B: (B,) int64 real positions.
            items_BK: (B, K) int64, padded with N.
            fused_BK: (B, K) float32 log-probability of retrieval.
            log_probs_BKS: (B, K, S) float32.
        """
        T = history_BT.shape[1]
        vectors_BTD, candidates_BKD = self.item_vectors[history_BT], self.item_vectors[items_BK]
        logits_BKT = self.query(candidates_BKD) @ self.key(vectors_BTD).transpose(1, 2) / self.config.attention_width**0.5
        age_BT = (lengths_B[:, None] - 1 - torch.arange(T, device=history_BT.device)).clamp(min=0)
        logits_BKT = logits_BKT + self.recency[age_BT][:, None, :]
        real_BT = torch.arange(T, device=history_BT.device) < lengths_B[:, None]
        logits_BKT = logits_BKT.masked_fill(~real_BT[:, None, :], -1e9)
        attended_BKA = logits_BKT.softmax(dim=2) @ self.value(vectors_BTD)
        crossed_BKA = attended_BKA * self.candidate(candidates_BKD)
        dense = (self.dense(history_BT, lengths_B, items_BK, fused_BK, log_probs_BKS) - self.mean) / self.std
        hidden = self.hidden(torch.cat([dense, attended_BKA, crossed_BKA], dim=2))
        return self.relevance(hidden)[..., 0] + fused_BK, self.like(hidden)[..., 0] + self.like_slope * fused_BK

    def start_from_retrieval(self) -> None:
        """Let `like` begin as retrieval's own probability: right where it means "is the next item", not where it means "is liked"."""
        with torch.no_grad():
            self.like_slope.fill_(1.0)
            self.like.weight.zero_()
            self.like.bias.zero_()


class Ranker:
    """A trained ranker.

    Args:
        network: trained.
        sources: S names, in the order of `Candidates.log_probs`.
        calibration: (slope, intercept) of the like logit; None where it could not be calibrated, probabilities are then NaN.
        label: what `like` means.
        negatives: what it was told apart from.
    """

    name = "ranker"

    def __init__(
        self, network: RankerNetwork, sources: tuple[str, ...], *, calibration: tuple[float, float] | None, label: str, negatives: str
    ):
        self.network, self.sources, self.calibration = network.eval(), tuple(sources), calibration
        self.label, self.negatives = label, negatives

    def to(self, device: str) -> None:
        """Compute on this device of torch from now on."""
        self.network.to(device)

    def score(self, queries: Queries, candidates: Candidates) -> tuple[np.ndarray, np.ndarray]:
        """Relevance logits and calibrated probabilities.

        Returns:
            (B, K) float32 logits, -inf at padding; (B, K) float32 probabilities, NaN at padding, for empty histories
            (the ranker has not learnt from any) and where not calibrated.

        Raises:
            ValueError: the candidates lack a source that the ranker was trained with.
        """
        missing = set(self.sources) - set(candidates.sources)
        if missing:
            raise ValueError(f"ranker: expected candidates with sources {self.sources}, {sorted(missing)} are missing")
        columns = [candidates.sources.index(name) for name in self.sources]
        candidates = replace(candidates, log_probs=candidates.log_probs[:, :, columns], sources=self.sources)
        padding = candidates.items < 0
        with torch.inference_mode():
            device = self.network.popularity.device
            inputs = network_inputs(self.network, queries, candidates)
            relevance, like = (logits.cpu() for logits in self.network(*(tensor.to(device) for tensor in inputs)))
        logits = relevance.numpy()
        logits[padding] = -np.inf
        if self.calibration is None:
            return logits, np.full(logits.shape, np.nan, np.float32)
        slope, intercept = self.calibration
        probabilities = 1.0 / (1.0 + np.exp(-np.clip(slope * like.numpy() + intercept, -30, 30)))
        probabilities[padding | (queries.lengths == 0)[:, None]] = np.nan
        return logits, probabilities.astype(np.float32)

    def to_arrays(self) -> tuple[Arrays, Meta]:
        """Weights and frozen vectors, the latter in half precision."""
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in self.network.state_dict().items()}
        for name in ("item_vectors", "content_vectors"):
            arrays[name] = arrays[name].astype(np.float16)
        return arrays, {
            "config": asdict(self.network.config),
            "sources": list(self.sources),
            "calibration": self.calibration,
            "label": self.label,
            "negatives": self.negatives,
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays, meta: Meta) -> "Ranker":
        """The model back from `to_arrays`."""
        tensors = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
        frozen = (tensors["item_vectors"], tensors["content_vectors"], tensors["popularity"])
        network = RankerNetwork(*frozen, len(meta["sources"]), RankerConfig(**meta["config"]))
        network.load_state_dict(tensors)
        calibration = None if meta["calibration"] is None else tuple(meta["calibration"])
        return cls(network, tuple(meta["sources"]), calibration=calibration, label=meta["label"], negatives=meta["negatives"])


def network_inputs(network: RankerNetwork, queries: Queries, candidates: Candidates) -> tuple[Tensor, ...]:
    """(history, lengths, items, fused, log_probs) tensors; see `RankerNetwork.forward`."""
    num_items = len(network.popularity) - 1
    (history,), lengths = left_aligned(queries, network.config.max_history, (queries.items, num_items))
    if history.shape[1] == 0:
        history = np.full((len(queries), 1), num_items, np.int64)
    items = np.where(candidates.items < 0, num_items, candidates.items).astype(np.int64)
    fused = np.maximum(candidates.fused, LOG_PROB_FLOOR)
    log_probs = np.maximum(candidates.log_probs, LOG_PROB_FLOOR)
    return tuple(torch.from_numpy(array) for array in (history, lengths, items, fused, log_probs))
