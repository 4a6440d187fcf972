"""The running average of the weights that is validated and kept.

Kept beside the weights, as this rank holds them (cut by FSDP or by rows, or
whole). Rows of the item table that a sparse step does not touch stand still, so
their average is caught up with when it is next needed: exact, and a step costs
its rows instead of the table.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from raysys.train.parallel import local


class Average:
    """Average of some parameters and of the item table.

    Args:
        dense: parameters by name, without the table.
        table: (R, D) item rows.
        decay: a step; 0 keeps no average, the weights stand for themselves.
    """

    def __init__(self, dense: dict[str, Tensor], table: Tensor, decay: float):
        self.current, self.table, self.decay = dense, table, decay
        self.dense = {name: value.detach().clone() for name, value in dense.items()} if decay else dict(dense)
        self.rows = table.detach().clone() if decay else table
        self.log_decay = 0.0  # log of the product of all decays so far
        self.seen = torch.zeros(len(table), dtype=torch.float64, device=table.device) if decay else None

    @torch.no_grad()
    def before_step(self, touched: Tensor | None) -> None:
        """Catch up with rows before they move; call before the optimizer's step.

        Args:
            touched: (U,) int64 rows that the step will change; None for all.
        """
        if self.decay and touched is not None:
            self._catch_up(touched)

    @torch.no_grad()
    def after_step(self, step: int, touched: Tensor | None) -> None:
        """Move towards the weights; call after the optimizer's step number `step` (from 1)."""
        if not self.decay:
            return
        decay = min(self.decay, step / (step + 10))  # a young average follows faster
        names = list(self.current)
        torch._foreach_lerp_([local(self.dense[name]) for name in names], [local(self.current[name]) for name in names], 1 - decay)
        self.log_decay += math.log(decay)
        if touched is None:
            self.rows.lerp_(self.table, 1 - decay)
        else:
            assert self.seen is not None
            self.rows[touched] = self.rows[touched].lerp(self.table[touched], 1 - decay)
            self.seen[touched] = self.log_decay

    @torch.no_grad()
    def settle(self) -> None:
        """Catch up with all rows; before the average is read."""
        if self.decay and self.seen is not None and bool((self.seen != 0).any()):
            self._catch_up(slice(None))

    def _catch_up(self, rows: Tensor | slice) -> None:
        assert self.seen is not None
        share = (self.log_decay - self.seen[rows]).exp().to(self.rows.dtype)[:, None]
        self.rows[rows] = self.table[rows] + (self.rows[rows] - self.table[rows]) * share
        self.seen[rows] = self.log_decay

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model holds the average while the block runs."""
        if not self.decay:
            yield
            return
        self.settle()
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        pairs = [(self.rows, self.table), *((local(self.dense[name]), local(self.current[name])) for name in self.current)]
        for kept, live in pairs:
            held = live.detach().clone()
            live.copy_(kept)
            kept.copy_(held)
