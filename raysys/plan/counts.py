"""Flops and bytes of one unit of work, counted from the code of the models. No times, no machines.

Legend: D width, T history, L mean inputs a window, N items, S negatives, W workers, P positions. A multiply-add is two flops.
`benchmarks/scale/calibrate.py` divides measured seconds by these counts; `planner.py` multiplies them again.
"""

from dataclasses import dataclass

FLOAT_BYTES = 4
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
TABLE_PASSES = {"adamw": 20, "rowwise-adagrad": 8, "sgd": 6}
"""Float32 reads and writes an entry of the item table a step: AdamW touches all rows (gradient 3, norm and clipping 3, update 7,
running average 3, normalised copy and its gradient 4), the sparse optimizers only the rows of the batch."""
OPTIMIZER_FLOATS = {"adamw": 2.0, "rowwise-adagrad": 0.0, "sgd": 0.0}
"""Float32 numbers of optimizer state an entry of the table; row-wise Adagrad keeps one a row, which is added apart."""
HISTORY_EVENTS, HISTORY_BYTES, KEY_BYTES = 200, 13, 16
"""Events of a user kept in a bundle, bytes of one (item int32, event int8, time int64), bytes of the user's key."""


@dataclass(frozen=True)
class Epoch:
    """Sequences of one epoch. windows: sequences; positions: targets over all of them; length: inputs a window."""

    windows: float
    positions: float

    @property
    def length(self) -> float:
        """L, mean inputs a window."""
        return self.positions / self.windows


def epoch_of(users: float, history: float, max_length: int) -> Epoch:
    """Windows and positions of `users` histories of `history` events each, as `train/batches.py` cuts them."""
    targets = max(history - 1.0, 1e-9)
    return Epoch(users * max(1.0, targets / max_length), users * targets)


def encoder_flops(dim: int, layers: int, length: float, ffn: int) -> float:
    """Flops of the forward pass at one position: (8 + 4f) D^2 of products and 2 L D of causal attention, a layer."""
    return layers * ((8 + 4 * ffn) * dim**2 + 2 * length * dim)


def loss_flops(dim: int, columns: float) -> float:
    """Flops of logits at one position over `columns` items, forward."""
    return 2 * dim * columns


def block_parameters(dim: int, layers: int, max_length: int, ffn: int) -> float:
    """Parameters besides the item table: layers, norms, positions."""
    return layers * ((4 + 2 * ffn) * dim**2 + (9 + ffn) * dim) + max_length * dim


def table_state_bytes(items: float, dim: int, dtype: str, optimizer: str, *, dense_gradient: bool, rows: float) -> dict[str, float]:
    """Bytes of the item table while it trains, by part; all of it, before sharding.

    Args:
        items: N.
        dim: D.
        dtype: of parameters.
        optimizer: of the table.
        dense_gradient: whether a step's gradient covers all rows (full softmax, or AdamW).
        rows: rows that a step touches, for a sparse gradient.
    """
    entries = items * dim
    return {
        "parameters": entries * DTYPE_BYTES[dtype],
        "running average and best": 2 * entries * DTYPE_BYTES[dtype],
        "gradients": (entries if dense_gradient else min(rows, items) * dim) * FLOAT_BYTES,
        "optimizer state": entries * OPTIMIZER_FLOATS[optimizer] * FLOAT_BYTES + (items * FLOAT_BYTES if "adagrad" in optimizer else 0),
    }


def table_bytes_moved(items: float, dim: int, optimizer: str, rows: float) -> float:
    """Bytes that a step moves to update the table, see TABLE_PASSES."""
    touched = items if optimizer == "adamw" else min(rows, items)
    return touched * dim * TABLE_PASSES[optimizer] * FLOAT_BYTES


def activation_bytes(positions: float, dim: int, layers: int, ffn: int, dtype: str) -> float:
    """Kept for the backward pass: (12 + 3f) D numbers a position and layer (norms, qkv, attention, residuals, GELU, dropout)."""
    return positions * layers * (12 + 3 * ffn) * dim * DTYPE_BYTES[dtype]


def all_reduce_bytes(size: float, workers: int) -> float:
    """Bytes that each worker sends to sum `size` bytes over all: a ring, 2 (W - 1) / W."""
    return 2 * (workers - 1) / workers * size


def all_to_all_bytes(rows: float, dim: int, workers: int, dtype: str) -> float:
    """Bytes that each worker sends to fetch `rows` vectors from the shards and to return their gradients."""
    return 2 * rows * dim * DTYPE_BYTES[dtype] * (workers - 1) / workers
