"""The losses of `loss.py` over an item table that is cut over the workers.

Every rank sees the states of all positions and scores them against its own
rows; what travels is (P, D) states and (P,) sums, never a row of the table.

The value on each rank is the global sum divided by the number of ranks, so the
sum over ranks is the loss. Gradients of the rows are complete on their owner;
gradients of states come out times the number of ranks, because whoever averages
the transformer's gradients divides by it.

Legend: P positions of all ranks, R rows held here, D dimension, S sampled negatives held here.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from raysys.train.loss import chunk_of, negative_logits
from raysys.train.parallel import Parallel


def sharded_softmax_loss(
    states: Tensor,
    vectors_RD: Tensor,
    targets: Tensor,
    *,
    first: int,
    parallel: Parallel,
    chunk: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Cross-entropy over the whole catalogue, by a logsumexp over the shards.

    Args:
        states: (p, D) float32 of this rank's positions; p may differ by rank.
        vectors_RD: (R, D) float32 item vectors of this rank.
        targets: (p,) int64 items of the whole catalogue.
        first: item of this rank's first row.
        parallel: the ranks.
        chunk: positions a block, memory is `chunk * R` numbers; None for `loss.chunk_of`.
        dtype: of products and probabilities.
    """
    states_PD, targets_P = _Gather.apply(states, parallel), _gather(targets, parallel)[0]
    chunk = chunk or chunk_of(len(vectors_RD), states.device)
    return _Softmax.apply(states_PD, vectors_RD, targets_P - first, chunk, dtype) / parallel.world_size


def sharded_sampled_loss(
    states: Tensor,
    targets: Tensor,
    negatives_S: Tensor,
    log_expected: Tensor | float,
    *,
    vectors_of: Callable[[Tensor], Tensor],
    first: int,
    stop: int,
    parallel: Parallel,
) -> Tensor:
    """Cross-entropy over the target and sampled negatives, each scored by the worker that has its row.

    Args:
        states: (p, D) float32 of this rank's positions.
        targets: (p,) int64.
        negatives_S: (S,) int64 those of the shared draw that lie in [first, stop).
        log_expected: scalar or (S,) log of how often a negative is expected in the whole draw.
        vectors_of: (n,) int64 local rows to (n, D) float32 vectors.
        first: item of this rank's first row.
        stop: item after its last row.
        parallel: the ranks.
    """
    states_PD, targets_P = _Gather.apply(states, parallel), _gather(targets, parallel)[0]
    owned = (targets_P >= first) & (targets_P < stop)
    mine = (states_PD[owned] * vectors_of(targets_P[owned] - first)).sum(dim=1)
    positive = _Sum.apply(states_PD.new_zeros(len(targets_P)).masked_scatter(owned, mine))
    logits = negative_logits(states_PD, vectors_of(negatives_S - first), targets_P, negatives_S, log_expected)
    highest = positive.detach().clone()
    if logits.shape[1]:
        highest = torch.maximum(highest, logits.detach().amax(dim=1))
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    normaliser = (positive - highest).exp() + _Sum.apply((logits - highest[:, None]).exp().sum(dim=1))
    return (normaliser.log() + highest - positive).sum() / parallel.world_size


class _Softmax(torch.autograd.Function):
    """As `_FullSoftmax` of loss.py: gradients are made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx, states_PD: Tensor, vectors_RD: Tensor, local_P: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
        vectors, states = vectors_RD.to(dtype), states_PD.to(dtype)
        grad_states, grad_vectors = torch.empty_like(states_PD), torch.zeros_like(vectors_RD)
        normaliser_P = states_PD.new_empty(len(states_PD))
        for start in range(0, len(states_PD), chunk):
            rows = slice(start, start + chunk)
            logits = (states[rows] @ vectors.T).float()
            normaliser_P[rows] = _log_sum_exp_over_ranks(torch.logsumexp(logits, dim=1))
            probabilities = logits.sub_(normaliser_P[rows, None]).exp_().to(dtype)
            grad_states[rows] = (probabilities @ vectors).float()
            grad_vectors += (probabilities.T @ states[rows]).float()
        owned = ((local_P >= 0) & (local_P < len(vectors_RD))).nonzero()[:, 0]
        target_P = states_PD.new_zeros(len(states_PD))
        target_P[owned] = (states_PD[owned] * vectors_RD[local_P[owned]]).sum(dim=1)
        dist.all_reduce(target_P)
        grad_states.index_add_(0, owned, vectors_RD[local_P[owned]], alpha=-1)
        grad_vectors.index_add_(0, local_P[owned], states_PD[owned], alpha=-1)
        ctx.save_for_backward(grad_states, grad_vectors)
        return (normaliser_P - target_P).sum()

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (grad_output,) = grad_outputs
        grad_states, grad_vectors = ctx.saved_tensors
        return grad_states * grad_output, grad_vectors * grad_output, None, None, None


def _log_sum_exp_over_ranks(values: Tensor) -> Tensor:
    highest = values.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    total = (values - highest).exp_()
    dist.all_reduce(total)
    return total.log_().add_(highest)


class _Sum(torch.autograd.Function):
    """Sum over ranks; every rank goes on to the same loss, so the gradient passes through."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        return grads[0]


class _Gather(torch.autograd.Function):
    """Rows of all ranks, one rank after the other; differing lengths are padded on the way."""

    @staticmethod
    def forward(ctx, values: Tensor, parallel: Parallel) -> Tensor:
        gathered, ctx.first = _gather(values, parallel)
        ctx.length, ctx.parallel = len(values), parallel
        return gathered

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total[ctx.first : ctx.first + ctx.length] * ctx.parallel.world_size, None


def _gather(values: Tensor, parallel: Parallel) -> tuple[Tensor, int]:
    """(P, ...) rows of all ranks, and where this rank's begin."""
    lengths = values.new_zeros(parallel.world_size, dtype=torch.int64)
    lengths[parallel.rank] = len(values)
    dist.all_reduce(lengths)
    sizes = lengths.tolist()
    padded = values.new_zeros(max(sizes), *values.shape[1:])
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]), sum(sizes[: parallel.rank])
