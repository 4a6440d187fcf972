"""Who may learn from what, and how an encoder is judged. Shared by `stages.py` and `tune.py`; no Ray here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raysys.errors import SchemaError
from raysys.models.interest import NO_EVIDENCE, InterestEncoder, user_states
from raysys.prepare.dataset import Prepared, Sequences
from raysys.queries import Queries
from raysys.schema import SPLIT_TRAIN, UNKNOWN_ITEM
from raysys.train.config import TrainConfig
from raysys.train.parallel import Parallel
from raysys.train.table import first_row

MAX_HISTORY = 500
"""Events of a history that a query carries; no model looks further back."""
MAX_VALIDATION_QUERIES = 3000
"""Queries that early stopping looks at."""


class Parts:
    """Who may learn from what, in all sequences or in a fragment of them.

    Args:
        sequences: every event of some users.
        settings: of the training.
        held: `held_out` of all users; None where these are all.
        has_validation: whether the data has a validation part; None where these are all sequences.

    Attributes:
        all: every event; histories of queries are cut from it.
        train: the training part.
        fit: the training part without each user's last positions.
        heldout: flat positions in `all` of those, where the ranker learns.
        choice: flat positions where settings are chosen: the validation part, or half the users' held-out positions without one.
    """

    def __init__(self, sequences: Sequences, settings: TrainConfig, *, held: int | None = None, has_validation: bool | None = None):
        self.all = sequences
        is_train = (sequences.split == SPLIT_TRAIN) & (sequences.items != UNKNOWN_ITEM)
        if held is None and is_train.sum() < 2:
            raise SchemaError(f"expected at least two training events, found {int(is_train.sum())}; prepare more data or another split")
        self.train = sequences.where(is_train)
        counts = np.diff(self.train.indptr)
        wanted = held_out(int((counts >= 2).sum()), settings) if held is None else held
        from_end = np.repeat(counts, counts) - 1 - (np.arange(len(self.train.items)) - np.repeat(self.train.indptr[:-1], counts))
        is_held = from_end < np.repeat(held_counts(counts, wanted), counts)
        self.fit = self.train.where(~is_held)
        flat_train = np.flatnonzero(is_train)
        self.heldout = flat_train[is_held]
        valid = sequences.target_positions("valid")
        self.has_validation = len(valid) > 0 if has_validation is None else has_validation
        if self.has_validation:
            self.choice = valid
        else:
            odd = sequences.user_idx[sequences.rows[self.heldout]] % 2 == 1
            self.choice, self.heldout = self.heldout[odd], self.heldout[~odd]

    @property
    def upto_valid(self) -> Sequences:
        """Everything before the test part that has a row in the catalogue."""
        everything = self.all.upto("valid")
        return everything.where(everything.items != UNKNOWN_ITEM)

    def of(self, stage: str) -> Sequences:
        """What the encoder learns from in a stage of `stages.py`."""
        return {"fit": self.fit, "refit": self.train}[stage] if stage != "last refit" else self.upto_valid


def held_out(num_users: int, settings: TrainConfig) -> int:
    """Events of a user that are held out for the ranker at most, where so many users have two training events."""
    # About a tenth of each history, one event at least, and never more than it takes to feed the ranker.
    return int(np.clip(np.ceil(settings.max_ranker_queries / max(1, num_users)), 1, 10))


def held_counts(lengths: np.ndarray, held: int) -> np.ndarray:
    """(U,) events that are held out of histories of these lengths."""
    return np.where(lengths >= 2, np.clip(np.round(0.1 * lengths), 1, held), 0).astype(np.int64)


def new_encoder(prepared: Prepared, settings: TrainConfig, table: Callable[[int], nn.Module] | None = None) -> InterestEncoder:
    """An untrained encoder; the same settings and seed give the same start in every process, however its table is cut."""
    torch.manual_seed(settings.seed)
    return InterestEncoder(prepared.num_items, len(prepared.events), settings.interest, table)


@dataclass(frozen=True)
class Judged:
    """What an encoder that was fitted on `Parts.fit` is judged by.

    Attributes:
        queries: Q histories. targets: (Q,) items that follow.
        warm: (N,) bool, items that the fit has seen.
    """

    queries: Queries
    targets: np.ndarray
    warm: np.ndarray

    @classmethod
    def of(cls, parts: Parts, settings: TrainConfig, num_items: int) -> "Judged":
        """The validation part, or the held-out positions where there is none; a sample of them."""
        positions = sample(parts.choice if parts.has_validation else parts.heldout, MAX_VALIDATION_QUERIES, settings.seed)
        queries = parts.all.queries_before(positions, max_events=MAX_HISTORY)
        return cls(queries, parts.all.items[positions], np.bincount(parts.fit.items, minlength=num_items) > 0)


def validation(judged: Judged, parallel: Parallel | None = None) -> Callable[[InterestEncoder], float]:
    """The figure that early stopping and tuning maximise: masked full-catalogue NDCG@10; unknown targets are misses.

    Every rank calls it with its encoder. Where the item table is cut by rows, each scores its own rows for all queries;
    where it is whole, each takes its share of the queries.
    """
    parallel = parallel or Parallel()
    parts = chunks(len(judged.targets), 512)
    if not parallel.shard_items:
        parts = parts[parallel.rank :: parallel.world_size]

    def across(values: Tensor, op: Any) -> Tensor:
        if parallel.shard_items and parallel.world_size > 1:
            torch.distributed.all_reduce(values, op=op)
        return values

    @torch.no_grad()
    def figure(encoder: InterestEncoder) -> float:
        vectors_RD = encoder.item_vectors()
        device, first = vectors_RD.device, first_row(encoder)
        cold = torch.from_numpy(~judged.warm[first : first + len(vectors_RD)]).to(device)
        total = torch.zeros(1, dtype=torch.float64, device=device)
        for rows in parts:
            query, target = judged.queries[rows], torch.from_numpy(judged.targets[rows].astype(np.int64)).to(device) - first
            scores = user_states(encoder, query) @ vectors_RD.T
            scores[:, cold] = NO_EVIDENCE
            here = (target >= 0) & (target < len(vectors_RD))
            known = torch.from_numpy(judged.targets[rows] != UNKNOWN_ITEM).to(device)
            mine = scores.gather(1, torch.where(here, target, 0)[:, None])[:, 0] if len(vectors_RD) else scores.new_zeros(len(target))
            mine = across(torch.where(here, mine, float("-inf")), torch.distributed.ReduceOp.MAX)
            items = query.items.astype(np.int64) - first
            seen = (items >= 0) & (items < len(vectors_RD))
            scores[query.rows[seen], items[seen]] = float("-inf")
            ranks = across((scores > mine[:, None]).sum(dim=1), torch.distributed.ReduceOp.SUM)
            total += torch.where(known & (ranks < 10), 1.0 / torch.log2(ranks.double() + 2.0), 0.0).sum()
        if not parallel.shard_items:
            parallel.sum(total)
        return float(total.item()) / max(1, len(judged.targets))

    return figure


def sample(positions: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At most `count` of the positions, in order."""
    if len(positions) <= count:
        return positions
    return np.sort(np.random.default_rng(seed).choice(positions, count, replace=False))


def chunks(count: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover `count` rows."""
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]
