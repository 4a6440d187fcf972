"""Who may learn from what, and how an encoder is judged. Shared by `stages.py` and `tune.py`; no Ray here."""

import copy
from collections.abc import Callable

import numpy as np
import torch

from raysys.errors import SchemaError
from raysys.models.interest import InterestEncoder, InterestRetriever
from raysys.prepare.dataset import Prepared, Sequences
from raysys.queries import Queries
from raysys.schema import SPLIT_TRAIN, UNKNOWN_ITEM
from raysys.train.config import TrainConfig

MAX_HISTORY = 500
"""Events of a history that a query carries; no model looks further back."""
MAX_VALIDATION_QUERIES = 3000
"""Queries that early stopping looks at."""


class Parts:
    """Who may learn from what.

    Attributes:
        all: every event; histories of queries are cut from it.
        train: the training part.
        fit: the training part without each user's last positions.
        heldout: flat positions in `all` of those, where the ranker learns.
        choice: flat positions where settings are chosen: the validation part, or half the users' held-out positions without one.
    """

    def __init__(self, sequences: Sequences, settings: TrainConfig):
        self.all = sequences
        is_train = (sequences.split == SPLIT_TRAIN) & (sequences.items != UNKNOWN_ITEM)
        if is_train.sum() < 2:
            raise SchemaError(f"expected at least two training events, found {int(is_train.sum())}; prepare more data or another split")
        self.train = sequences.where(is_train)
        counts = np.diff(self.train.indptr)
        # About a tenth of each history, one event at least, and never more than it takes to feed the ranker.
        wanted = int(np.clip(np.ceil(settings.max_ranker_queries / max(1, (counts >= 2).sum())), 1, 10))
        held = np.where(counts >= 2, np.clip(np.round(0.1 * counts), 1, wanted), 0).astype(np.int64)
        from_end = np.repeat(counts, counts) - 1 - (np.arange(len(self.train.items)) - np.repeat(self.train.indptr[:-1], counts))
        is_held = from_end < np.repeat(held, counts)
        self.fit = self.train.where(~is_held)
        flat_train = np.flatnonzero(is_train)
        self.heldout = flat_train[is_held]
        valid = sequences.target_positions("valid")
        self.has_validation = len(valid) > 0
        if self.has_validation:
            self.choice = valid
        else:
            odd = sequences.rows[self.heldout] % 2 == 1
            self.choice, self.heldout = self.heldout[odd], self.heldout[~odd]


def new_encoder(prepared: Prepared, settings: TrainConfig) -> InterestEncoder:
    """An untrained encoder; the same settings and seed give the same start in every process."""
    torch.manual_seed(settings.seed)
    return InterestEncoder(prepared.num_items, len(prepared.events), settings.interest)


def validation(parts: Parts, settings: TrainConfig, num_items: int) -> Callable[[InterestEncoder], float]:
    """The figure that early stopping and tuning maximise: masked NDCG@10 of an encoder fitted on `parts.fit`.

    Judged on the validation part, or on the held-out positions where there is none.
    """
    positions = sample(parts.choice if parts.has_validation else parts.heldout, MAX_VALIDATION_QUERIES, settings.seed)
    queries = parts.all.queries_before(positions, max_events=MAX_HISTORY)
    targets = parts.all.items[positions]
    counts = np.bincount(parts.fit.items, minlength=num_items)

    def figure(encoder: InterestEncoder) -> float:
        # A copy, because a retriever lives on the CPU and would take an encoder off the GPU in the middle of its training.
        retriever = InterestRetriever.from_encoder(copy.deepcopy(encoder), counts)
        return ndcg_at_10(lambda rows: retriever.scores(queries[rows]), queries, targets)

    return figure


def sample(positions: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At most `count` of the positions, in order."""
    if len(positions) <= count:
        return positions
    return np.sort(np.random.default_rng(seed).choice(positions, count, replace=False))


def ndcg_at_10(scores: Callable[[slice], np.ndarray], queries: Queries, targets: np.ndarray, *, chunk: int = 512) -> float:
    """Masked full-catalogue NDCG@10 of one target a query; unknown targets are misses."""
    total = 0.0
    for rows in chunks(len(targets), chunk):
        values, target = scores(rows), targets[rows]
        mine = values[np.arange(len(target)), np.maximum(target, 0)]
        values[queries[rows].rows, queries[rows].items] = -np.inf
        ranks = (values > mine[:, None]).sum(axis=1)
        total += float(np.where((target >= 0) & (ranks < 10), 1.0 / np.log2(ranks + 2.0), 0.0).sum())
    return total / max(1, len(targets))


def chunks(count: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover `count` rows."""
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]
