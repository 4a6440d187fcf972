"""The ranker: target attention over the history, crossed with what retrieval knows; relevance and a probability.

`relevance` orders the candidates (trained listwise). The probability comes from
the judge where events tell liked items from others (`judge.py`); else from the
head `next`, P(the item is the next one | retrieved). Holds frozen copies of the
vectors it needs, so that a ranking replica loads nothing else. Features do not
depend on which other candidates stand in the list: one item alone gets the same probability.

Legend: B queries, K candidates, S sources, T history positions, D item dimension, C content dimension, A attention width, F features.
Source: Zhou et al., "Deep Interest Network", KDD 2018 (target attention).
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysys.models.base import Arrays, Candidates, Meta
from raysys.models.interest import left_aligned
from raysys.models.judge import LOG_PROB_FLOOR, Judge
from raysys.prepare.dataset import Sequences
from raysys.queries import Queries

LABEL = "the user's next event, given a retrieved item"
NEGATIVES = "other retrieved candidates"
FROZEN = ("item_vectors", "content_vectors", "popularity")
OTHER_DENSE = 7
"""Features that need no learning beside those of the sources."""
JUDGE = "judge/"
"""Prefix of the arrays of the judge."""


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
    """Share of the queries kept for early stopping, and for the calibration of `next`."""


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
        self.num_dense = num_sources + OTHER_DENSE
        features = self.num_dense + 2 * width
        self.register_buffer("mean", torch.zeros(self.num_dense))
        self.register_buffer("std", torch.ones(self.num_dense))
        self.hidden = nn.Sequential(nn.Linear(features, config.hidden), nn.GELU(), nn.Dropout(config.dropout))
        self.relevance = nn.Linear(config.hidden, 1)
        self.next = nn.Linear(config.hidden, 1)
        for head in (self.relevance, self.next):  # both start as retrieval's own order and probability
            nn.init.zeros_(head.weight)
        nn.init.zeros_(self.next.bias)
        self.next_slope = nn.Parameter(torch.ones(()))

    def dense(self, history_BT: Tensor, lengths_B: Tensor, items_BK: Tensor, fused_BK: Tensor, log_probs_BKS: Tensor) -> Tensor:
        """(B, K, S + 7) features that need no learning."""
        similar_BKT = F.embedding(items_BK, self.item_vectors) @ F.embedding(history_BT, self.item_vectors).transpose(1, 2)
        return self._dense(similar_BKT, history_BT, lengths_B, items_BK, fused_BK, log_probs_BKS)

    def _dense(
        self, similar_BKT: Tensor, history_BT: Tensor, lengths_B: Tensor, items_BK: Tensor, fused_BK: Tensor, log_probs_BKS: Tensor
    ) -> Tensor:
        count_B1 = lengths_B.clamp(min=1)[:, None].float()
        last = (lengths_B - 1).clamp(min=0)[:, None, None].expand(-1, items_BK.shape[1], 1)
        columns = [
            fused_BK.clamp(min=LOG_PROB_FLOOR),
            similar_BKT.sum(2) / count_B1,
            similar_BKT.amax(2).clamp(min=0),  # as the zeros of padding have it, which another history of the batch brings or not
            similar_BKT.gather(2, last)[..., 0],
            torch.take(self.popularity, items_BK),
            torch.log1p(lengths_B.float())[:, None].expand(-1, items_BK.shape[1]),
        ]
        if self.content_vectors.shape[1]:
            content_BKC, past_BTC = F.embedding(items_BK, self.content_vectors), F.embedding(history_BT, self.content_vectors)
            columns.append((content_BKC @ past_BTC.transpose(1, 2)).amax(2).clamp(min=0))
        else:
            columns.append(torch.zeros_like(fused_BK))
        return torch.cat([log_probs_BKS.clamp(min=LOG_PROB_FLOOR), torch.stack(columns, dim=2)], dim=2)

    def forward(
        self, history_BT: Tensor, lengths_B: Tensor, items_BK: Tensor, fused_BK: Tensor, log_probs_BKS: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, K) relevance and (B, K) logits of being the next item.

        Args:
            history_BT: (B, T) int64 left-aligned, padded with N; T >= 1.
            lengths_B: (B,) int64 real positions.
            items_BK: (B, K) int64, padded with N.
            fused_BK: (B, K) float32 log-probability of retrieval.
            log_probs_BKS: (B, K, S) float32.
        """
        T = history_BT.shape[1]
        vectors_BTD, candidates_BKD = F.embedding(history_BT, self.item_vectors), F.embedding(items_BK, self.item_vectors)
        logits_BKT = self.query(candidates_BKD) @ self.key(vectors_BTD).transpose(1, 2) / self.config.attention_width**0.5
        age_BT = (lengths_B[:, None] - 1 - torch.arange(T, device=history_BT.device)).clamp(min=0)
        # Not plain indexing, which adds up its gradient in any order.
        logits_BKT = logits_BKT + F.embedding(age_BT, self.recency[:, None])[:, None, :, 0]
        real_BT = torch.arange(T, device=history_BT.device) < lengths_B[:, None]
        logits_BKT = logits_BKT.masked_fill(~real_BT[:, None, :], -1e9)
        attended_BKA = logits_BKT.softmax(dim=2) @ self.value(vectors_BTD)
        crossed_BKA = attended_BKA * self.candidate(candidates_BKD)
        similar_BKT = candidates_BKD @ vectors_BTD.transpose(1, 2)
        dense = (self._dense(similar_BKT, history_BT, lengths_B, items_BK, fused_BK, log_probs_BKS) - self.mean) / self.std
        hidden = self.hidden(torch.cat([dense, attended_BKA, crossed_BKA], dim=2))
        return self.relevance(hidden)[..., 0] + fused_BK, self.next(hidden)[..., 0] + self.next_slope * fused_BK


class Ranker:
    """A trained ranker.

    Args:
        network: trained.
        sources: S names, in the order of `Candidates.log_probs`.
        calibration: (slope, intercept) of the `next` logit; None where it could not be calibrated, probabilities are then NaN.
        judge: gives the probabilities instead, over the tables of the network; None where no event tells what is liked.

    Attributes:
        logits: what computes in place of the network, such as a `FrozenRanker`, from what `network_inputs` gives; None for the network.
    """

    name = "ranker"

    def __init__(
        self, network: RankerNetwork, sources: tuple[str, ...], *, calibration: tuple[float, float] | None, judge: Judge | None = None
    ):
        self.network, self.sources, self.calibration, self.judge = network.eval(), tuple(sources), calibration, judge
        self.logits: Callable[..., tuple[np.ndarray, np.ndarray]] | None = None

    @property
    def label(self) -> str:
        """What the probability is of."""
        return LABEL if self.judge is None else self.judge.label

    @property
    def negatives(self) -> str:
        """What it was told apart from."""
        return NEGATIVES if self.judge is None else self.judge.negatives

    def to(self, device: str) -> None:
        """Compute on this device of torch from now on."""
        self.network.to(device)
        self.logits = None

    def score(self, queries: Queries, candidates: Candidates) -> tuple[np.ndarray, np.ndarray]:
        """Relevance logits, and probabilities of being the next item.

        Returns:
            (B, K) float32 logits, -inf at padding; (B, K) float32 probabilities, NaN at padding, for empty histories
            (the ranker has not learnt from any), where not calibrated and where there is a judge, who is asked by `judged`.

        Raises:
            ValueError: the candidates lack a source that the ranker was trained with.
        """
        missing = set(self.sources) - set(candidates.sources)
        if missing:
            raise ValueError(f"ranker: expected candidates with sources {self.sources}, {sorted(missing)} are missing")
        columns = [candidates.sources.index(name) for name in self.sources]
        candidates = replace(candidates, log_probs=candidates.log_probs[:, :, columns], sources=self.sources)
        padding = candidates.items < 0
        logits, following = (self.logits or self._by_network)(*network_inputs(self.network, queries, candidates))
        logits[padding] = -np.inf
        if self.calibration is None:
            probabilities: np.ndarray = np.full(logits.shape, np.nan, np.float32)
        else:
            slope, intercept = self.calibration
            probabilities = 1.0 / (1.0 + np.exp(-np.clip(slope * following + intercept, -30, 30)))
        probabilities[padding | (queries.lengths == 0)[:, None]] = np.nan
        return logits, probabilities.astype(np.float32)

    @torch.inference_mode()
    def _by_network(self, *inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        device = self.network.popularity.device
        relevance, following = self.network(*(torch.from_numpy(array).to(device) for array in inputs))
        return relevance.cpu().numpy(), following.cpu().numpy()

    def judged(self, queries: Queries, candidates: Candidates) -> np.ndarray:
        """(B, K) float32 calibrated P(positive event | taken) by the judge, NaN at padding and for empty histories."""
        assert self.judge is not None
        probabilities = self.judge.probabilities(queries, candidates)
        probabilities[(candidates.items < 0) | (queries.lengths == 0)[:, None]] = np.nan
        return probabilities

    def judged_by(self, judge: Judge | None) -> "Ranker":
        """The same with another judge."""
        return Ranker(self.network, self.sources, calibration=self.calibration, judge=judge)

    def counted(self, sequences: Sequences, new: np.ndarray) -> "Ranker":
        """With more events in its counts by item; weights stay as trained.

        Args:
            sequences: histories with the new events in their place.
            new: (E,) bool.
        """
        network = copy.deepcopy(self.network)
        counts = np.bincount(sequences.items[new], minlength=len(network.popularity)).astype(np.float32)
        network.popularity = torch.log1p(torch.expm1(network.popularity) + torch.from_numpy(counts))
        judge = self.judge
        if judge is not None:
            judge = judge.with_opinions(judge.opinions.update(sequences, new))
        return Ranker(network, self.sources, calibration=self.calibration, judge=judge)

    def without(self, sources: Iterable[str]) -> "Ranker":
        """As if some sources always said the same: what they say is left out of the features, which stand at their mean there.

        Raises:
            ValueError: there is a judge, who looks at all of them.
        """
        if self.judge is not None:
            raise ValueError("expected a ranker without a judge, which looks at every source")
        gone = set(sources)
        kept = [at for at, name in enumerate(self.sources) if name not in gone]
        old = self.network
        network = RankerNetwork(old.item_vectors, old.content_vectors, old.popularity, len(kept), old.config)
        state, others = old.state_dict(), range(len(self.sources), len(self.sources) + OTHER_DENSE)
        for name in ("mean", "std"):
            state[name] = state[name][[*kept, *others]]
        weight = state["hidden.0.weight"]
        state["hidden.0.weight"] = weight[:, [*kept, *range(len(self.sources), weight.shape[1])]]
        network.load_state_dict(state)
        return Ranker(network, tuple(self.sources[at] for at in kept), calibration=self.calibration)

    def grown(self, mix: np.ndarray, content: np.ndarray) -> "Ranker":
        """With rows for M new items; the row of padding stays the last.

        Args:
            mix: (M, N) float32 what known items a new one is like; rows sum to 1.
            content: (M, C) content vectors; a ranker of a bundle without content has width 0.
        """
        old = self.network
        fresh = torch.from_numpy(content[:, : old.content_vectors.shape[1]])
        vectors, content_vectors, popularity = (
            torch.cat([table[:-1], added, table[-1:]])
            for table, added in (
                (old.item_vectors, torch.from_numpy(mix) @ old.item_vectors[:-1]),
                (old.content_vectors, fresh),
                (old.popularity, torch.zeros(len(mix))),
            )
        )
        network = RankerNetwork(vectors, content_vectors, popularity, len(self.sources), old.config)
        tables = dict(zip(FROZEN, (vectors, content_vectors, popularity), strict=True))
        network.load_state_dict({**old.state_dict(), **tables})
        judge = self.judge
        if judge is not None:
            judge = judge.grown(len(mix), network.item_vectors.numpy(), network.content_vectors.numpy())
        return Ranker(network, self.sources, calibration=self.calibration, judge=judge)

    def to_arrays(self) -> tuple[Arrays, Meta]:
        """Weights and frozen vectors, the latter in half precision."""
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in self.network.state_dict().items()}
        for name in ("item_vectors", "content_vectors"):
            arrays[name] = arrays[name].astype(np.float16)
        meta: Meta = {"config": asdict(self.network.config), "sources": list(self.sources), "calibration": self.calibration, "judge": None}
        if self.judge is not None:
            of_judge, meta["judge"] = self.judge.to_arrays()
            arrays |= {f"{JUDGE}{name}": array for name, array in of_judge.items()}
        return arrays, {**meta, "label": self.label, "negatives": self.negatives}

    @classmethod
    def from_arrays(cls, arrays: Arrays, meta: Meta) -> "Ranker":
        """The model back from `to_arrays`."""
        own = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items() if not name.startswith(JUDGE)}
        vectors, content, popularity = (own[name] for name in FROZEN)
        network = RankerNetwork(vectors, content, popularity, len(meta["sources"]), RankerConfig(**meta["config"]))
        network.load_state_dict(own)
        calibration = None if meta["calibration"] is None else tuple(meta["calibration"])
        judge = None
        if meta["judge"] is not None:
            of_judge = {name.removeprefix(JUDGE): array for name, array in arrays.items() if name.startswith(JUDGE)}
            judge = Judge.from_arrays(of_judge, meta["judge"], network.item_vectors.numpy(), network.content_vectors.numpy())
        return cls(network, tuple(meta["sources"]), calibration=calibration, judge=judge)


def network_inputs(network: RankerNetwork, queries: Queries, candidates: Candidates) -> tuple[np.ndarray, ...]:
    """(history, lengths, items, fused, log_probs); see `RankerNetwork.forward`."""
    num_items = len(network.popularity) - 1
    (history,), lengths = left_aligned(queries, network.config.max_history, (queries.items, num_items))
    if history.shape[1] == 0:
        history = np.full((len(queries), 1), num_items, np.int64)
    items = np.where(candidates.items < 0, num_items, candidates.items).astype(np.int64)
    fused = np.maximum(candidates.fused, LOG_PROB_FLOOR)
    log_probs = np.maximum(candidates.log_probs, LOG_PROB_FLOOR)
    return history, lengths, items, fused, log_probs
