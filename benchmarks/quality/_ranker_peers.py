"""The peers of the ranker benchmark: DIN, DCN-v2 and gradient-boosted trees, on the examples that the ranker learns from.

All get the same positions and the same information: dense features (retrieval's scores among them), items and graded histories
as rows, frozen vectors of items. The networks learn an embedding of the item besides; the trees take the dense features as they
are, missing ones too. Settings come from a small grid, epochs and iterations from validation, as the ranker's own do.

Legend: B positions, T history, E embedding, F dense features.
Source: Zhou et al., "Deep Interest Network", KDD 2018; Wang et al., "DCN V2", WWW 2021 (parallel structure).
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from raysys.models.judge import Examples
from raysys.train.judge import Judged

EMBEDDING = 16
BATCH = 512
EPOCHS = 6


@dataclass(frozen=True)
class Setting:
    """One point of the grid of a network."""

    lr: float
    dropout: float
    weight_decay: float


GRID = [Setting(1e-3, 0.2, 1e-5), Setting(1e-3, 0.4, 1e-3), Setting(3e-3, 0.4, 1e-2)]
TREES = [
    {"learning_rate": 0.1, "max_leaf_nodes": 31},
    {"learning_rate": 0.05, "max_leaf_nodes": 15, "l2_regularization": 5.0, "min_samples_leaf": 50},
]
MAX_TREES = 400


class Embedded(nn.Module):
    """What both networks begin with: items as vectors, standardised dense features.

    Args:
        tables: frozen vectors of items. num_dense: F.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, tables: tuple[Tensor, ...], num_dense: int):
        super().__init__()
        self.tables = tables
        self.ids = nn.Embedding(len(tables[0]), EMBEDDING)
        nn.init.normal_(self.ids.weight, std=0.01)
        self.frozen = nn.Linear(sum(table.shape[1] for table in tables), EMBEDDING)
        self.register_buffer("mean", torch.zeros(num_dense))
        self.register_buffer("std", torch.ones(num_dense))

    def item(self, rows: Tensor) -> Tensor:
        """(..., 2 E)."""
        unique, places = torch.unique(rows, return_inverse=True)
        vectors = torch.cat([self.ids(unique), self.frozen(torch.cat([table[unique] for table in self.tables], dim=1))], dim=1)
        return vectors[places]

    def known(self, dense_BF: Tensor) -> Tensor:
        """(B, F) standardised, 0 where missing."""
        return torch.nan_to_num((dense_BF - self.mean) / self.std, nan=0.0).clamp(-5, 5)

    def standardise(self, dense: np.ndarray) -> None:
        """From (B, F) examples."""
        self.mean.copy_(torch.from_numpy(np.nanmean(dense, axis=0)))
        self.std.copy_(torch.from_numpy(np.maximum(np.nanstd(dense, axis=0), 1e-3)))


class Din(nn.Module):
    """Deep Interest Network: an activation unit weighs each event of the history by candidate and event, without a softmax."""

    def __init__(self, tables: tuple[Tensor, ...], num_dense: int, dropout: float):
        super().__init__()
        self.embedded = Embedded(tables, num_dense)
        width = 2 * EMBEDDING + 2
        self.unit = nn.Sequential(nn.Linear(2 * EMBEDDING + width + 2 * EMBEDDING, 36), nn.PReLU(), nn.Linear(36, 1))
        self.top = nn.Sequential(
            *(nn.Linear(num_dense + 2 * EMBEDDING + width, 80), nn.PReLU(), nn.Dropout(dropout)),
            *(nn.Linear(80, 40), nn.PReLU(), nn.Dropout(dropout), nn.Linear(40, 1)),
        )

    def forward(self, dense: Tensor, items: Tensor, history: Tensor, grades: Tensor, liked: Tensor, real: Tensor) -> Tensor:
        """(B,) logits."""
        candidate = self.embedded.item(items[:, 0])
        vectors = self.embedded.item(history)
        past = torch.cat([vectors, grades[..., None], liked[..., None].float()], dim=2)
        wide = candidate[:, None, :].expand(-1, past.shape[1], -1)
        weight = self.unit(torch.cat([wide, past, wide * vectors], dim=2))[..., 0] * real
        pooled = (weight[:, None, :] @ past)[:, 0] / history.shape[1] ** 0.5
        return self.top(torch.cat([self.embedded.known(dense[:, 0]), candidate, pooled], dim=1))[:, 0]


class DcnV2(nn.Module):
    """DCN-v2: three cross layers beside a deep network; the history enters as its mean, liked and graded."""

    def __init__(self, tables: tuple[Tensor, ...], num_dense: int, dropout: float):
        super().__init__()
        self.embedded = Embedded(tables, num_dense)
        inputs = num_dense + 3 * 2 * EMBEDDING
        self.crosses = nn.ModuleList(nn.Linear(inputs, inputs) for _ in range(3))
        self.deep = nn.Sequential(
            *(nn.Linear(inputs, 128), nn.ReLU(), nn.Dropout(dropout), nn.Linear(128, 64), nn.ReLU(), nn.Dropout(dropout))
        )
        self.top = nn.Linear(inputs + 64, 1)

    def forward(self, dense: Tensor, items: Tensor, history: Tensor, grades: Tensor, liked: Tensor, real: Tensor) -> Tensor:
        """(B,) logits."""
        past = self.embedded.item(history) * real[..., None]
        count = real.sum(dim=1, keepdim=True).clamp(min=1)
        means = [(past * weight[..., None]).sum(dim=1) / count for weight in (liked.float(), grades)]
        x0 = torch.cat([self.embedded.known(dense[:, 0]), self.embedded.item(items[:, 0]), *means], dim=1)
        x = x0
        for cross in self.crosses:
            x = x0 * cross(x) + x
        return self.top(torch.cat([x, self.deep(x0)], dim=1))[:, 0]


def network_scores(
    kind: type[nn.Module],
    setting: Setting,
    tables: tuple[Tensor, ...],
    learnt: Judged,
    watched: Judged,
    asked: list[Examples],
    *,
    seed: int,
) -> tuple[float, list[np.ndarray]]:
    """Best AUC on what is watched, and the logits of that epoch for each of `asked`."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    network = kind(tables, learnt.examples.dense.shape[2], setting.dropout)
    network.embedded.standardise(learnt.examples.dense[:, 0])
    optimizer = torch.optim.AdamW(network.parameters(), lr=setting.lr, weight_decay=setting.weight_decay)
    steps = -(-len(learnt) // BATCH)
    best, state = -np.inf, None
    for _ in range(EPOCHS):
        network.train()
        for rows in np.array_split(rng.permutation(len(learnt)), steps):
            examples, liked, _ = learnt.batch(rows)
            loss = F.binary_cross_entropy_with_logits(network(*examples.tensors()), liked)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        found = roc_auc_score(watched.liked, logits_of(network, watched.examples))
        if found > best:
            best, state = found, {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.load_state_dict(state)
    return best, [logits_of(network, examples) for examples in asked]


def logits_of(network: nn.Module, examples: Examples) -> np.ndarray:
    """(B,) float32."""
    network.eval()
    with torch.inference_mode():
        parts = [network(*examples.take(slice(first, first + 2048)).tensors()).numpy() for first in range(0, len(examples), 2048)]
    return np.concatenate(parts)


def tree_scores(setting: dict, learnt: Judged, watched: Judged, asked: list[Examples], *, seed: int) -> tuple[float, list[np.ndarray]]:
    """The same of gradient-boosted trees, stopped after the number of trees that is best on what is watched."""
    model = HistGradientBoostingClassifier(max_iter=MAX_TREES, early_stopping=False, random_state=seed, **setting)
    model.fit(learnt.examples.dense[:, 0], learnt.liked)
    found = [roc_auc_score(watched.liked, score) for score in _staged(model, watched.examples)]
    count = int(np.argmax(found)) + 1
    return max(found), [next(score for at, score in enumerate(_staged(model, examples), 1) if at == count) for examples in asked]


def _staged(model: HistGradientBoostingClassifier, examples: Examples):
    for scores in model.staged_decision_function(examples.dense[:, 0]):
        yield scores.reshape(-1)


def chosen(name: str, tables: tuple[Tensor, ...], learnt: Judged, watched: Judged, asked: list[Examples], *, seed: int) -> dict:
    """A peer at the setting that is best on what is watched: {"setting", "watched_auc", "logits"}."""
    found = []
    for setting in TREES if name == "HistGradientBoosting" else GRID:
        if isinstance(setting, Setting):
            kind = {"DIN": Din, "DCN-v2": DcnV2}[name]
            auc, logits = network_scores(kind, setting, tables, learnt, watched, asked, seed=seed)
            found.append({"setting": dataclasses.asdict(setting), "watched_auc": auc, "logits": logits})
        else:
            auc, logits = tree_scores(setting, learnt, watched, asked, seed=seed)
            found.append({"setting": setting, "watched_auc": auc, "logits": logits})
    return max(found, key=lambda one: one["watched_auc"])


PEERS = ("DIN", "DCN-v2", "HistGradientBoosting")
