"""Optimizers of the encoder, and what they leave in a checkpoint by name, so that another number of workers can go on.

The transformer learns with AdamW. The item table has an optimizer of its own,
because its state is cut with its rows, and because for large catalogues a step
should cost what its rows cost, not what the table costs:

    adamw            all rows every step; state 2 D numbers a row
    lazy_adamw       AdamW of the rows that a step touches; state 2 D numbers a row
    rowwise_adagrad  one number a row (Gupta et al., FBGEMM/DLRM practice); the least memory

Legend: R rows of the table held here, D dimension, U rows that a step touches.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from raysys.train.parallel import fill, whole

TableOptimizerName = Literal["adamw", "lazy_adamw", "rowwise_adagrad"]
BETAS, EPS = (0.9, 0.98), 1e-8
FINAL_LR = 0.05
"""Learning rate at the end of training, as a share of its peak."""


def dense_optimizer(module: nn.Module, table: Tensor, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW of everything but the item table; only matrices decay."""
    parameters = [parameter for parameter in module.parameters() if parameter is not table]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    others = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)


def table_optimizer(name: TableOptimizerName, table: nn.Parameter, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer of the item table; see the top of this file."""
    if name == "adamw":
        return torch.optim.AdamW([table], lr=lr, betas=BETAS, weight_decay=weight_decay, fused=True)
    return (LazyAdamW if name == "lazy_adamw" else RowwiseAdagrad)([table], lr=lr, weight_decay=weight_decay)


class RowwiseAdagrad(torch.optim.Optimizer):
    """Adagrad with one accumulator a row: the sum of the mean squares of its gradients.

    Args:
        params: tables, (R, D).
        lr: of every row; it falls with the root of the accumulator.
        weight_decay: of a row, whenever it is touched.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        for group in self.param_groups:
            for table in group["params"]:
                self.state[table]["sum"] = torch.zeros(len(table), device=table.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the rows that have a gradient."""
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is None:
                    continue
                rows, grad = touched(table)
                total = self.state[table]["sum"][rows] + grad.square().mean(dim=1)
                self.state[table]["sum"][rows] = total
                values = table[rows] * (1 - group["lr"] * group["weight_decay"])
                table[rows] = values - group["lr"] * grad / (total.sqrt() + EPS)[:, None]


class LazyAdamW(torch.optim.Optimizer):
    """AdamW whose moments and decay move only in rows that a step touches, each with a step count of its own.

    Args:
        params: tables, (R, D).
        lr: see AdamW.
        weight_decay: of a row, whenever it is touched.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        for group in self.param_groups:
            for table in group["params"]:
                state = self.state[table]
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
                state["steps"] = torch.zeros(len(table), device=table.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the rows that have a gradient."""
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is None:
                    continue
                (rows, grad), state = touched(table), self.state[table]
                steps = state["steps"][rows] + 1
                mean = state["exp_avg"][rows].lerp_(grad, 1 - BETAS[0])
                square = state["exp_avg_sq"][rows].lerp_(grad.square(), 1 - BETAS[1])
                state["steps"][rows], state["exp_avg"][rows], state["exp_avg_sq"][rows] = steps, mean, square
                correction_1, correction_2 = 1 - BETAS[0] ** steps, 1 - BETAS[1] ** steps
                update = mean / correction_1[:, None] / ((square / correction_2[:, None]).sqrt() + EPS)
                table[rows] = table[rows] * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * update


def touched(table: Tensor) -> tuple[Tensor, Tensor]:
    """(U,) int64 rows with a gradient and their (U, D) gradients; all rows of a dense one."""
    assert table.grad is not None
    if not table.grad.is_sparse:
        return torch.arange(len(table), device=table.device), table.grad
    grad = table.grad.coalesce()
    return grad._indices()[0], grad._values()


def schedule(step: int, warmup_steps: int, total: int) -> float:
    """Learning rate as a share of its peak: linear warm-up, then half a cosine down to FINAL_LR."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total - warmup_steps))
    return FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress))


def dense_state(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """Moments by parameter name, whole even where FSDP has cut them; every rank must call."""
    return {f"{name}/{key}": whole(value) for parameter, name in names.items() for key, value in optimizer.state.get(parameter, {}).items()}


def load_dense_state(optimizer: torch.optim.Optimizer, names: dict[Tensor, str], saved: dict[str, Tensor]) -> None:
    """Moments of `dense_state`, cut as the parameters are now."""
    for parameter, name in names.items():
        keys = [key.removeprefix(f"{name}/") for key in saved if key.startswith(f"{name}/")]
        state = {}
        for key in keys:
            value = saved[f"{name}/{key}"]
            state[key] = value.clone() if value.ndim == 0 else torch.zeros_like(parameter, requires_grad=False)
            if value.ndim:
                fill(state[key], value)
        if state:
            optimizer.state[parameter] = state


def table_state(optimizer: torch.optim.Optimizer, table: nn.Parameter) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State of the table: what has a value for each row, and the few numbers that all rows share."""
    state = optimizer.state.get(table, {})
    return {k: v for k, v in state.items() if v.ndim}, {k: v for k, v in state.items() if not v.ndim}


def load_table_state(optimizer: torch.optim.Optimizer, table: nn.Parameter, rows: dict[str, Tensor], shared: dict[str, Tensor]) -> None:
    """State of `table_state`, for the rows that this worker holds now."""
    if rows:
        optimizer.state[table] = {**{k: v.to(table.device) for k, v in rows.items()}, **{k: v.clone() for k, v in shared.items()}}
