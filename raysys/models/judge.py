"""The judge: P(positive event | the user takes this item), from what the user thought of earlier items.

Dense features of `opinions.py` and of retrieval, target attention over the graded
history, and explicit crosses; two heads, liked or not and the grade itself, which
says more than its sign. Does not order candidates by what comes next: that is
`ranker.py`. An item alone gets the probability that it has in a list.

Legend: B queries, K candidates, T history positions, F dense features, V frozen item dimension, A width, S sources, M members.
Source: Zhou et al., "Deep Interest Network", KDD 2018 (target attention); Wang et al., "DCN V2", WWW 2021 (crosses).
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysys.models.base import Arrays, Candidates, Meta
from raysys.models.opinions import FEATURES, OpinionConfig, Opinions
from raysys.queries import Queries

LOG_PROB_FLOOR = -20.0
"""As for the ranker: how loudly a source says no is noise."""


@dataclass(frozen=True)
class JudgeConfig:
    """Shape and training of the judge."""

    width: int = 24
    """A, of projected items and of attention."""
    hidden: int = 64
    """Width of the hidden layer."""
    bins: int = 8
    """Pieces of each dense feature, by quantiles."""
    crosses: int = 2
    """Cross layers."""
    max_history: int = 50
    """T, last events attended to."""
    members: int = 3
    """Networks whose logits are averaged."""
    dropout: float = 0.2
    """On projected items and the hidden layer."""
    epochs: int = 4
    """Passes over the positions, at most; the best one on validation is kept."""
    lr: float = 2e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.01
    """Of AdamW."""
    batch_size: int = 512
    """Positions a step."""
    grade_weight: float = 0.3
    """Of the squared error of the grade beside the cross-entropy of liking."""
    folds: int = 5
    """Parts of the users; features of one come from opinions learnt on the others."""
    max_positions: int = 100_000
    """Positions that are learnt from, sampled with the seed when there are more."""
    opinions: OpinionConfig = OpinionConfig()
    """Offsets and factors of items."""
    examples: str | None = None
    """Folder (absolute, or a URI) for the examples that it learns from and is watched on, to train another model on; None for none."""


@dataclass(frozen=True)
class Examples:
    """What the networks look at, for B x K pairs of query and item.

    Attributes:
        dense: (B, K, F) float32, NaN where a feature is not known.
        items: (B, K) int64.
        history: (B, T) int64 item rows, left-aligned; padding has weight 0 in `real`.
        past_grades: (B, T) float32. past_liked: (B, T) bool. real: (B, T) bool.
    """

    dense: np.ndarray
    items: np.ndarray
    history: np.ndarray
    past_grades: np.ndarray
    past_liked: np.ndarray
    real: np.ndarray

    def __len__(self) -> int:
        return len(self.items)

    def take(self, rows: np.ndarray | slice) -> "Examples":
        """Some of the queries."""
        return Examples(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    @classmethod
    def stack(cls, parts: list["Examples"]) -> "Examples":
        """One after the other; histories are padded to one length."""
        longest = max(part.history.shape[1] for part in parts)

        def joined(name: str) -> np.ndarray:
            arrays = [getattr(part, name) for part in parts]
            if name not in ("dense", "items"):
                arrays = [np.pad(array, ((0, 0), (0, longest - array.shape[1]))) for array in arrays]
            return np.concatenate(arrays)

        return cls(*(joined(name) for name in cls.__dataclass_fields__))

    def to_arrays(self) -> Arrays:
        """By name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "Examples":
        """Back from `to_arrays`; further arrays are left out."""
        return cls(*(arrays[name] for name in cls.__dataclass_fields__))

    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of `JudgeNetwork.forward`."""
        return tuple(torch.from_numpy(np.ascontiguousarray(getattr(self, name))) for name in self.__dataclass_fields__)


class JudgeNetwork(nn.Module):
    """One member.

    Args:
        vector_dim: V. num_dense: F. config: shape.
    """

    mean: Tensor
    std: Tensor
    edges: Tensor

    def __init__(self, vector_dim: int, num_dense: int, config: JudgeConfig):
        super().__init__()
        width = config.width
        self.config = config
        self.register_buffer("mean", torch.zeros(num_dense))
        self.register_buffer("std", torch.ones(num_dense))
        self.register_buffer("edges", torch.linspace(0, 1, config.bins + 1).repeat(num_dense, 1))
        self.project = nn.Linear(vector_dim, width)
        self.event = nn.Linear(2, width)
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(3 * width, width)
        self.recency = nn.Parameter(torch.zeros(config.max_history))
        inputs = num_dense + 3 * width
        self.crosses = nn.ModuleList(nn.Linear(inputs, inputs) for _ in range(config.crosses))
        binned = num_dense * config.bins
        self.hidden = nn.Sequential(nn.Linear(inputs + binned, config.hidden), nn.GELU(), nn.Dropout(config.dropout))
        self.heads = nn.Linear(inputs + binned + config.hidden, 2)
        self.dropout = nn.Dropout(config.dropout)
        for name, parameter in self.crosses.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=0.01)

    def forward(
        self, tables: tuple[Tensor, Tensor], dense: Tensor, items: Tensor, history: Tensor, grades: Tensor, liked: Tensor, real: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, K) logits of liking and (B, K) grades, in standard deviations.

        Args:
            tables: frozen vectors of all items, V numbers an item together.
            dense: (B, K, F) with NaN where unknown. The others: see `Examples`.
        """
        rows, places = torch.unique(torch.cat([items.flatten(), history.flatten()]), return_inverse=True)
        projected = self.dropout(self.project(torch.cat([table[rows] for table in tables], dim=1)))
        # As embeddings: the backward of plain indexing adds up in an order that differs from run to run where there are several threads.
        candidate_BKA = F.embedding(places[: items.numel()], projected).view(*items.shape, -1)
        past_BTA = F.embedding(places[items.numel() :], projected).view(*history.shape, -1)
        event_BTA = self.event(torch.stack([grades, liked.float()], dim=2))
        T = history.shape[1]
        age_BT = (real.sum(dim=1, keepdim=True) - 1 - torch.arange(T)).clamp(min=0)
        logits = self.query(candidate_BKA) @ self.key(past_BTA + event_BTA).transpose(1, 2) / self.config.width**0.5
        logits = (logits + F.embedding(age_BT, self.recency[:, None])[:, None, :, 0]).masked_fill(~real[:, None, :], -1e9)
        value_BTA = self.value(torch.cat([past_BTA, past_BTA * grades[..., None], event_BTA], dim=2)) * real[..., None]
        attended_BKA = logits.softmax(dim=2) @ value_BTA
        known = torch.nan_to_num((dense - self.mean) / self.std, nan=0.0).clamp(-5, 5)
        x0 = torch.cat([known, candidate_BKA, attended_BKA, candidate_BKA * attended_BKA], dim=2)
        x = x0
        for cross in self.crosses:
            x = x + x0 * cross(x)
        bins = self.binned(dense)
        out = self.heads(torch.cat([x, bins, self.hidden(torch.cat([x0, bins], dim=2))], dim=2))
        return out[..., 0], out[..., 1]

    def binned(self, dense: Tensor) -> Tensor:
        """(B, K, F x bins) how far each feature reaches into each of its bins, in [0, 1]; 0 where unknown.

        Source: Gorishniy, Rubachev & Babenko, "On Embeddings for Numerical Features in Tabular Deep Learning", NeurIPS 2022.
        """
        low, high = self.edges[:, :-1], self.edges[:, 1:]
        reached = (dense[..., None] - low) / (high - low).clamp(min=1e-6)
        return torch.nan_to_num(reached, nan=0.0).clamp(0, 1).flatten(2)

    def standardise(self, dense: np.ndarray) -> None:
        """Take mean, spread and quantiles of the features from (B, K, F) examples."""
        flat = dense.reshape(-1, dense.shape[2]).astype(np.float64)
        known = np.isfinite(flat)
        count = np.maximum(known.sum(axis=0), 1)
        mean = np.where(known, flat, 0).sum(axis=0) / count
        variance = np.where(known, (flat - mean) ** 2, 0).sum(axis=0) / count
        self.mean.copy_(torch.from_numpy(mean))
        self.std.copy_(torch.from_numpy(np.sqrt(variance)).clamp(min=1e-3))
        for column in range(flat.shape[1]):
            if known[:, column].any():
                edges = np.quantile(flat[known[:, column], column], np.linspace(0, 1, len(self.edges[column])))
                self.edges[column] = torch.from_numpy(edges)


class Judge:
    """Opinions, networks, and the calibration of what they say together.

    Args:
        opinions: of all that may be learnt from.
        vectors, content: (N + more, D) and (N + more, C) float32 frozen vectors by item row, shared with the ranker; C may be 0.
        sources: S names of retrieval sources, in the order of the dense features.
        networks: M trained members.
        config: their shape.
        calibration: (slope, intercept) of the averaged logit; None while there is none.
    """

    label = "positive event, given that the user took the item"
    negatives = "logged non-positive events"

    def __init__(
        self,
        opinions: Opinions,
        vectors: np.ndarray,
        content: np.ndarray,
        sources: tuple[str, ...],
        networks: list[JudgeNetwork],
        config: JudgeConfig,
        calibration: tuple[float, float] | None = None,
    ):
        self.opinions, self.sources = opinions, tuple(sources)
        self.networks = [network.eval() for network in networks]  # once: it takes longer than a request's arithmetic
        self.config, self.calibration = config, calibration
        self.vectors, self.content = vectors, content
        self.tables = torch.from_numpy(vectors), torch.from_numpy(content)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """F names of the dense features."""
        return (*FEATURES, "fused", *(f"log_prob_{name}" for name in self.sources))

    def examples(self, queries: Queries, items: np.ndarray, retrieved: Candidates | None, *, opinions: Opinions | None = None) -> Examples:
        """Features of pairs of query and item.

        Args:
            queries: B histories.
            items: (B, K) item rows; what stands at padding does not matter.
            retrieved: the same items with what retrieval says; None where nobody may say anything, because retrieval has seen the answer.
            opinions: others than the judge's own, where those have seen the answer.
        """
        rows = np.maximum(items, 0).astype(np.int64)
        opinions = opinions or self.opinions
        dense = opinions.features(queries, rows, self.vectors, self.content)
        said = np.full((*rows.shape, 1 + len(self.sources)), np.nan, np.float32)
        if retrieved is not None:
            columns = [retrieved.sources.index(name) for name in self.sources]
            said[..., 0], said[..., 1:] = retrieved.fused, retrieved.log_probs[..., columns]
            said = np.maximum(said, LOG_PROB_FLOOR)
        grades, liked, history, real = opinions.graded(queries, self.config.max_history)
        return Examples(
            np.concatenate([dense, said], axis=2), rows, np.where(real, history, 0), np.where(real, grades, 0), liked & real, real
        )

    def logits(self, examples: Examples) -> np.ndarray:
        """(B, K) float32 mean logit of the members, before calibration."""
        with torch.inference_mode():
            tensors = examples.tensors()
            return torch.stack([network(self.tables, *tensors)[0] for network in self.networks]).mean(dim=0).numpy()

    def probabilities(self, queries: Queries, candidates: Candidates) -> np.ndarray:
        """(B, K) float32 calibrated P(positive | taken), NaN where not calibrated."""
        if self.calibration is None:
            return np.full(candidates.items.shape, np.nan, np.float32)
        slope, intercept = self.calibration
        logits = slope * self.logits(self.examples(queries, candidates.items, candidates)) + intercept
        return (1.0 / (1.0 + np.exp(-np.clip(logits, -30, 30)))).astype(np.float32)

    def with_opinions(self, opinions: Opinions) -> "Judge":
        """The same networks, which see opinions through features only, with newer ones."""
        return self._over(self.vectors, self.content, opinions=opinions)

    def grown(self, num_new: int, vectors: np.ndarray, content: np.ndarray) -> "Judge":
        """With rows for new items, over longer tables."""
        return self._over(vectors, content, opinions=self.opinions.grown(num_new))

    def _over(self, vectors: np.ndarray, content: np.ndarray, *, opinions: Opinions) -> "Judge":
        return Judge(opinions, vectors, content, self.sources, self.networks, self.config, self.calibration)

    def calibrated(self, calibration: tuple[float, float] | None) -> "Judge":
        """The same with (slope, intercept) of the logit."""
        return Judge(self.opinions, self.vectors, self.content, self.sources, self.networks, self.config, calibration)

    def to_arrays(self) -> tuple[Arrays, Meta]:
        """Weights and opinions; the frozen vectors are the ranker's to keep."""
        arrays, of_opinions = self.opinions.to_arrays()
        arrays = {f"opinions.{name}": array for name, array in arrays.items()}
        for member, network in enumerate(self.networks):
            arrays |= {f"member-{member}.{name}": tensor.detach().cpu().numpy() for name, tensor in network.state_dict().items()}
        meta = {"config": asdict(self.config), "sources": list(self.sources), "calibration": self.calibration, "opinions": of_opinions}
        return arrays, {**meta, "members": len(self.networks)}

    @classmethod
    def from_arrays(cls, arrays: Arrays, meta: Meta, vectors: np.ndarray, content: np.ndarray) -> "Judge":
        """The model back from `to_arrays`, over these frozen vectors."""

        def under(prefix: str) -> Arrays:
            return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

        config = JudgeConfig(**{**meta["config"], "opinions": OpinionConfig(**meta["config"]["opinions"])})
        networks = []
        for member in range(meta["members"]):
            weights = {name: torch.from_numpy(array.copy()) for name, array in under(f"member-{member}.").items()}
            network = JudgeNetwork(vectors.shape[1] + content.shape[1], len(weights["mean"]), config)
            network.load_state_dict(weights)
            networks.append(network)
        opinions = Opinions.from_arrays(under("opinions."), meta["opinions"])
        calibration = None if meta["calibration"] is None else tuple(meta["calibration"])
        return cls(opinions, vectors, content, tuple(meta["sources"]), networks, config, calibration)


def loss_of(network: JudgeNetwork, tables: tuple[Tensor, Tensor], examples: Examples, liked: Tensor, grades: Tensor) -> Tensor:
    """Cross-entropy of (B,) liked, and squared error of (B,) grades with the weight of the settings; K is 1."""
    logits, said = network(tables, *examples.tensors())
    cross_entropy = F.binary_cross_entropy_with_logits(logits[:, 0], liked)
    return cross_entropy + network.config.grade_weight * F.mse_loss(said[:, 0], grades)
