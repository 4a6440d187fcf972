"""How an encoder is judged while it is trained. No Ray here, but many workers may judge together."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysys.models.interest import NO_EVIDENCE, InterestEncoder, user_states
from raysys.schema import UNKNOWN_ITEM
from raysys.train.evidence import Evidence
from raysys.train.parallel import Parallel
from raysys.train.parts import chunks
from raysys.train.table import first_row

MAX_VALIDATION_QUERIES = 3000
"""Queries that early stopping looks at."""


def validation(evidence: Evidence, parallel: Parallel | None = None) -> Callable[[InterestEncoder], float]:
    """The figure that early stopping and tuning maximise: masked full-catalogue NDCG@10; unknown targets are misses.

    It is of a sample of the validation part, or of the held-out positions where there is none, and for encoders fitted on `Parts.fit`.

    Every rank calls it with its encoder. Where the item table is cut by rows, each scores its own rows for all queries;
    where it is whole, each takes its share of the queries.
    """
    parallel = parallel or Parallel()
    held = evidence.held("choice" if evidence.has_validation else "heldout", MAX_VALIDATION_QUERIES)
    warm = evidence.item_counts > 0
    parts = chunks(len(held), 512)
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
        cold = torch.from_numpy(~warm[first : first + len(vectors_RD)]).to(device)
        total = torch.zeros(1, dtype=torch.float64, device=device)
        for rows in parts:
            query, target = held.queries[rows], torch.from_numpy(held.targets[rows]).to(device) - first
            scores = user_states(encoder, query) @ vectors_RD.T
            scores[:, cold] = NO_EVIDENCE
            here = (target >= 0) & (target < len(vectors_RD))
            known = torch.from_numpy(held.targets[rows] != UNKNOWN_ITEM).to(device)
            mine = scores.gather(1, torch.where(here, target, 0)[:, None])[:, 0] if len(vectors_RD) else scores.new_zeros(len(target))
            mine = across(torch.where(here, mine, float("-inf")), torch.distributed.ReduceOp.MAX)
            items = query.items.astype(np.int64) - first
            seen = (items >= 0) & (items < len(vectors_RD))
            scores[query.rows[seen], items[seen]] = float("-inf")
            ranks = across((scores > mine[:, None]).sum(dim=1), torch.distributed.ReduceOp.SUM)
            total += torch.where(known & (ranks < 10), 1.0 / torch.log2(ranks.double() + 2.0), 0.0).sum()
        if not parallel.shard_items:
            parallel.sum(total)
        return float(total.item()) / max(1, len(held))

    return figure
