"""How the workers of a training share it: who averages gradients, who holds which rows. torch.distributed; no Ray.

    ddp    every worker holds the transformer; gradients are averaged
    fsdp   the transformer's parameters are cut over the workers too (FSDP2), for encoders that fill a GPU

With `shard_items` the item table is cut row-wise over the workers under either.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Parallel:
    """This process among those that train together.

    Attributes:
        rank: this worker.
        world_size: number of workers; more than one needs torch's default process group.
        strategy: of the transformer.
        shard_items: cut the item table over the workers.
    """

    rank: int = 0
    world_size: int = 1
    strategy: Literal["ddp", "fsdp"] = "ddp"
    shard_items: bool = False

    def rows(self, num_items: int) -> tuple[int, int]:
        """First and last-plus-one row of the item table that this worker holds: equal blocks, the last may be shorter."""
        if not self.shard_items:
            return 0, num_items
        size = -(-num_items // self.world_size)
        return min(self.rank * size, num_items), min((self.rank + 1) * size, num_items)

    def wrap(self, trainee: Any, table: nn.Parameter) -> nn.Module:
        """The module to call in training; `trainee.encoder` is the encoder inside.

        Args:
            trainee: the encoder with its loss, on its device.
            table: the item table's weight, which stays out of it where it is cut by rows.
        """
        if self.world_size == 1:
            return trainee
        if self.strategy == "fsdp":
            encoder = trainee.encoder
            mesh = init_device_mesh(table.device.type, (self.world_size,))
            for block in encoder.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(encoder, mesh=mesh, ignored_params={table})
            return trainee
        if self.shard_items:
            trainee._ddp_params_and_buffers_to_ignore = [name for name, value in trainee.named_parameters() if value is table]
        return DistributedDataParallel(trainee, device_ids=[table.device] if table.device.type == "cuda" else None)

    def accumulating(self, module: Any, last: bool) -> contextlib.AbstractContextManager:
        """Around the passes of one step: gradients travel in the last one only."""
        if isinstance(module, DistributedDataParallel) and not last:
            return module.no_sync()
        if self.world_size > 1 and self.strategy == "fsdp":
            module.encoder.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all workers, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def of_first(self, value: float, device: torch.device | str) -> float:
        """Rank 0's value on every rank: decisions must be the same everywhere, or the others wait in a collective for ever."""
        if self.world_size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=device)
        dist.broadcast(shared, src=0)
        return float(shared.item())

    def clip(self, dense: Iterable[Tensor], table: Tensor, limit: float) -> Tensor:
        """Scale all gradients so that their global norm is at most `limit`; returns the norm before.

        Args:
            dense: parameters of the transformer, the same on all ranks or cut by FSDP.
            table: the item table, whole or this rank's rows; its gradient may be sparse.
            limit: L2 norm.
        """
        gradients = [parameter.grad for parameter in dense if parameter.grad is not None]
        if gradients:
            total = nn.utils.get_total_norm(gradients)
            square = (total.full_tensor() if isinstance(total, DTensor) else total) ** 2
        else:
            square = torch.zeros((), device=table.device)
        rows = torch.zeros((), device=table.device)
        if table.grad is not None:
            if table.grad.is_sparse:
                table.grad = table.grad.coalesce()
            rows = (table.grad._values() if table.grad.is_sparse else table.grad).norm() ** 2
        norm = (square + (self.sum(rows) if self.shard_items else rows)) ** 0.5
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            local(gradient).mul_(scale)
        if table.grad is not None:
            (table.grad._values() if table.grad.is_sparse else table.grad).mul_(scale)
        return norm


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that FSDP has cut; the tensor itself otherwise. Shares memory with it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP has cut (every rank must call); the tensor itself otherwise."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(target: Tensor, value: Tensor) -> None:
    """Put a whole value into a tensor that FSDP may have cut."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None).to_local()
    local(target).copy_(value)
