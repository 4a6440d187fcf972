"""An item table cut row-wise over the workers: each holds a block of rows, their gradient and their optimizer state.

Looking up costs two all-to-all exchanges (ids there, vectors back), and one of
gradients in the backward pass. Gradients come out as the mean over ranks, which
is what DistributedDataParallel does with everything else.

Legend: N items, D dimension, R rows held here, W workers, U distinct ids asked for.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raysys.models.interest import InterestEncoder, initial_rows
from raysys.train.parallel import Parallel


class ShardedTable(nn.Module):
    """Rows [first, stop) of an item table; called like `nn.Embedding` with ids of all items.

    Args:
        num_items: N; id N pads and is a zero vector.
        dim: D.
        seed: of the untrained rows.
        parallel: which rows, and with whom to exchange.
    """

    def __init__(self, num_items: int, dim: int, seed: int, parallel: Parallel):
        super().__init__()
        self.num_items, self.parallel, self.sparse = num_items, parallel, False
        self.first, self.stop = parallel.rows(num_items)
        self.block = max(1, -(-num_items // parallel.world_size))
        self.weight = nn.Parameter(initial_rows(self.first, self.stop, dim, seed))

    def forward(self, ids: Tensor) -> Tensor:
        """(...,) int64 ids in [0, N] to (..., D) vectors; every rank must call, also without ids."""
        vectors = _Lookup.apply(self.weight, ids.reshape(-1), self)
        return vectors.view(*ids.shape, self.weight.shape[1])


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight_RD: Tensor, ids: Tensor, table: ShardedTable) -> Tensor:
        real = ids < table.num_items
        distinct_U, position = torch.unique(ids[real], return_inverse=True)
        # Sorted ids of contiguous blocks: what goes to one worker lies together.
        asked = torch.bincount(distinct_U // table.block, minlength=table.parallel.world_size)
        wanted = _exchange(asked, None, None)
        sizes = asked.tolist(), wanted.tolist()
        local = _exchange(distinct_U, *sizes) - table.first
        vectors_UD = _exchange(weight_RD[local], sizes[1], sizes[0])
        out = weight_RD.new_zeros(len(ids), weight_RD.shape[1])
        out[real] = vectors_UD[position]
        ctx.save_for_backward(real, position, local)
        ctx.sizes, ctx.table, ctx.shape = sizes, table, (len(distinct_U), weight_RD.shape)
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        real, position, local = ctx.saved_tensors
        (asked, wanted), (num_distinct, shape) = ctx.sizes, ctx.shape
        (grad,) = grads
        grad_UD = grad.new_zeros(num_distinct, shape[1]).index_add_(0, position, grad[real])
        mine = _exchange(grad_UD, asked, wanted) / ctx.table.parallel.world_size
        rows = torch.sparse_coo_tensor(local[None, :], mine, shape, check_invariants=False)
        return rows if ctx.table.sparse else rows.to_dense(), None, None


def _exchange(values: Tensor, sent: list[int] | None, received: list[int] | None) -> Tensor:
    """All-to-all along the first axis; equal parts where no sizes are given."""
    size = len(values) if received is None else sum(received)
    out = values.new_empty(size, *values.shape[1:])
    dist.all_to_all_single(out, values.contiguous(), received, sent)
    return out


def gathered(rows_RD: Tensor, num_items: int, parallel: Parallel) -> Tensor | None:
    """(N, D) whole table on rank 0's CPU, from the rows of all ranks; None on the others. Every rank must call."""
    if not parallel.shard_items or parallel.world_size == 1:
        return rows_RD.cpu() if parallel.rank == 0 else None
    if parallel.rank > 0:
        dist.send(rows_RD.cpu().contiguous(), 0)
        return None
    table = torch.empty(num_items, *rows_RD.shape[1:])
    table[: len(rows_RD)] = rows_RD.cpu()
    for rank in range(1, parallel.world_size):
        first, stop = Parallel(rank, parallel.world_size, shard_items=True).rows(num_items)
        dist.recv(table[first:stop], rank)
    return table


def first_row(encoder: InterestEncoder) -> int:
    """Item row that the first row of the encoder's table stands for."""
    return getattr(encoder.items, "first", 0)
