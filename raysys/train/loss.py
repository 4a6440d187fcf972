"""Next-item losses over a catalogue, for states that are dense and targets that are rows.

Legend: P positions, N items, D dimension, S sampled negatives, T history.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class _FullSoftmax(torch.autograd.Function):
    """Cross-entropy of `states @ vectors.T` without keeping a (P, N) matrix.

    Gradients are computed in the forward pass, chunk by chunk, while the logits
    are still in cache: on a CPU the (P, N) passes of plain cross-entropy, not
    its products, are what costs. The target's -1 is applied to the (P, D)
    results instead of the (P, N) probabilities, which saves another pass and
    keeps it exact in bfloat16.
    """

    @staticmethod
    def forward(
        ctx, states_PD: Tensor, vectors_ND: Tensor, targets_P: Tensor, seen: Callable | None, chunk: int, dtype: torch.dtype
    ) -> Tensor:
        vectors, states = vectors_ND.to(dtype), states_PD.to(dtype)
        grad_states, grad_vectors = torch.empty_like(states_PD), torch.zeros_like(vectors_ND)
        need_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        total = states_PD.new_zeros(())
        for start in range(0, len(states_PD), chunk):
            rows = slice(start, start + chunk)
            logits = states[rows] @ vectors.T
            if seen is not None:
                wanted = targets_P[rows, None]
                kept = logits.gather(1, wanted)
                logits.scatter_(1, seen(rows), float("-inf")).scatter_(1, wanted, kept)
            probabilities = torch.softmax(logits, dim=1)
            picked = probabilities.gather(1, targets_P[rows, None]).float()
            total -= picked.clamp_min(torch.finfo(torch.float32).tiny).log().sum()
            if need_grad:
                grad_states[rows] = probabilities @ vectors
                grad_vectors += probabilities.T @ states[rows]
        if need_grad:
            grad_states -= vectors_ND[targets_P]
            grad_vectors.index_add_(0, targets_P, states_PD, alpha=-1)
        ctx.save_for_backward(grad_states, grad_vectors)
        return total

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        (grad_output,) = grad_outputs
        grad_states, grad_vectors = ctx.saved_tensors
        return grad_states * grad_output, grad_vectors * grad_output, None, None, None, None


def full_softmax_loss(
    states_PD: Tensor,
    vectors_ND: Tensor,
    targets_P: Tensor,
    *,
    seen: Callable[[slice], Tensor] | None = None,
    chunk: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Summed cross-entropy over the whole catalogue, in nats.

    Args:
        states_PD: (P, D) float32.
        vectors_ND: (N, D) float32.
        targets_P: (P,) int64 rows of the next items.
        seen: positions p -> (p, T) int64 rows that are left out of their softmax, unless they are the target; repeats are fine.
        chunk: positions a block, memory is `chunk * N` numbers; None for `chunk_of`.
        dtype: of logits and probabilities; sums and results stay float32. bfloat16 is
            4 times as fast on a CPU that has it and puts .2% of noise on the gradient.
    """
    return _FullSoftmax.apply(states_PD, vectors_ND, targets_P, seen, chunk or chunk_of(len(vectors_ND), states_PD.device), dtype)


class _DistilledSoftmax(torch.autograd.Function):
    """As `_FullSoftmax`, towards a mixture of the target and a teacher's distribution."""

    @staticmethod
    def forward(
        ctx,
        states_PD: Tensor,
        vectors_ND: Tensor,
        targets_P: Tensor,
        teacher_PD: Tensor,
        teacher_ND: Tensor,
        share: float,
        seen: Callable | None,
        chunk: int,
        dtype: torch.dtype,
    ) -> Tensor:
        vectors, states, told, taught = (tensor.to(dtype) for tensor in (vectors_ND, states_PD, teacher_ND, teacher_PD))
        grad_states, grad_vectors = torch.empty_like(states_PD), torch.zeros_like(vectors_ND)
        total = states_PD.new_zeros(())
        for start in range(0, len(states_PD), chunk):
            rows = slice(start, start + chunk)
            logits, wanted = states[rows] @ vectors.T, taught[rows] @ told.T
            if seen is not None:
                hidden, target = seen(rows), targets_P[rows, None]
                for scores in (logits, wanted):
                    kept = scores.gather(1, target)
                    scores.scatter_(1, hidden, float("-inf")).scatter_(1, target, kept)
            log_probs = torch.log_softmax(logits.float(), dim=1)
            goal = torch.softmax(wanted.float(), dim=1).mul_(share)
            goal.scatter_add_(1, targets_P[rows, None], goal.new_full((len(goal), 1), 1.0 - share))
            total -= (goal * log_probs.clamp_min(-100.0)).sum()  # a left-out item has no goal and a log-probability of -inf
            missing = log_probs.exp_().sub_(goal).to(dtype)
            grad_states[rows] = (missing @ vectors).float()
            grad_vectors += (missing.T @ states[rows]).float()
        ctx.save_for_backward(grad_states, grad_vectors)
        return total

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        grad_states, grad_vectors = ctx.saved_tensors
        return grad_states * grad_output, grad_vectors * grad_output, *[None] * 7


def distilled_softmax_loss(
    states_PD: Tensor,
    vectors_ND: Tensor,
    targets_P: Tensor,
    *,
    teacher_states_PD: Tensor,
    teacher_vectors_ND: Tensor,
    share: float,
    seen: Callable[[slice], Tensor] | None = None,
    chunk: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Summed cross-entropy to `share` of a teacher's distribution and the rest of the target, in nats.

    Args:
        states_PD: (P, D) float32. vectors_ND: (N, D) float32. targets_P: (P,) int64.
        teacher_states_PD: (P, E) float32 of the same positions, without gradient. teacher_vectors_ND: (N, E) float32.
        share: in [0, 1]; 0 is `full_softmax_loss`.
        seen: as for `full_softmax_loss`; hidden from both.
        chunk: likewise.
        dtype: of the products.
    """
    chunk = chunk or chunk_of(len(vectors_ND), states_PD.device)
    return _DistilledSoftmax.apply(states_PD, vectors_ND, targets_P, teacher_states_PD, teacher_vectors_ND, share, seen, chunk, dtype)


def chunk_of(columns: int, device: torch.device) -> int:
    """Positions a block of a full softmax over so many columns.

    On a CPU the block's logits have to stay in its cache: at 12,000 columns 128 positions took .7 of the time of 256 or 512, at 2,000
    columns 512 were the fastest. Logits and probabilities of 128 positions over 80,000 columns no longer fit into 32 MB, fewer do. A GPU
    needs large products and has the memory.
    """
    if device.type == "cuda":
        return 4096
    widest = 2**23 // max(1, columns)
    return min(512, max(2**20 // max(1, columns), min(128, widest), 64))


class _SampledSoftmax(torch.autograd.Function):
    """As `_FullSoftmax`, over the target and shared negatives."""

    @staticmethod
    def forward(
        ctx,
        states: Tensor,
        positive: Tensor,
        negative: Tensor,
        targets: Tensor,
        negatives: Tensor,
        log_expected: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        vectors, chunk = negative.to(dtype), chunk_of(len(negative), states.device)
        grad_states, grad_positive, grad_negative = torch.empty_like(states), torch.empty_like(positive), torch.zeros_like(negative)
        of_target = (states * positive).sum(dim=1, keepdim=True)
        total = states.new_zeros(())
        for start in range(0, len(states), chunk):
            rows = slice(start, start + chunk)
            mine = states[rows].to(dtype)
            logits = torch.cat([of_target[rows], (mine @ vectors.T).float() - log_expected], dim=1)
            logits[:, 1:].masked_fill_(negatives[None, :] == targets[rows, None], float("-inf"))
            probabilities = torch.log_softmax(logits, dim=1)
            total -= probabilities[:, 0].sum()
            probabilities.exp_()
            missing = probabilities[:, :1] - 1
            others = probabilities[:, 1:].to(dtype)
            grad_states[rows] = (others @ vectors).float() + missing * positive[rows]
            grad_positive[rows] = missing * states[rows]
            grad_negative += (others.T @ mine).float()
        ctx.save_for_backward(grad_states, grad_positive, grad_negative)
        return total

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None, None]:
        (grad_output,) = grad_outputs
        grad_states, grad_positive, grad_negative = ctx.saved_tensors
        return grad_states * grad_output, grad_positive * grad_output, grad_negative * grad_output, None, None, None, None


def sampled_softmax_loss(
    states_PD: Tensor,
    positive_PD: Tensor,
    negative_SD: Tensor,
    targets_P: Tensor,
    negatives_S: Tensor,
    log_expected: Tensor | float,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Summed cross-entropy over the target and shared sampled negatives, in nats.

    Each negative stands for the `1 / (S q)` items it was drawn for (logQ
    correction), so the loss tends to the full softmax as S grows; a position's
    own target is removed from its negatives (an accidental hit).

    Args:
        states_PD: (P, D) float32.
        positive_PD: (P, D) float32 vectors of the targets.
        negative_SD: (S, D) float32 vectors of the negatives.
        targets_P: (P,) int64.
        negatives_S: (S,) int64 rows, drawn with replacement once for all positions.
        log_expected: scalar or (S,) float32, log of how often each negative is expected among the S draws, `log(S q)`.
        dtype: of products with the negatives; see `full_softmax_loss`.

    Source:
        Bengio & Senecal, "Adaptive importance sampling to accelerate training of a neural probabilistic language model",
        IEEE TNN 2008; Yi et al., "Sampling-bias-corrected neural modeling", RecSys 2019.
    """
    expected = torch.as_tensor(log_expected, dtype=torch.float32, device=states_PD.device)
    return _SampledSoftmax.apply(states_PD, positive_PD, negative_SD, targets_P, negatives_S, expected, dtype)


def gbce_loss(
    states_PD: Tensor, positive_PD: Tensor, negative_SD: Tensor, targets_P: Tensor, negatives_S: Tensor, num_items: int, calibration: float
) -> Tensor:
    """Summed generalised binary cross-entropy over the target and shared uniform negatives, in nats.

    The positive probability is raised to a power beta that undoes the overconfidence of sampling few negatives.

    Args:
        states_PD: (P, D) float32. positive_PD: (P, D) float32 vectors of the targets. negative_SD: (S, D) float32.
        targets_P: (P,) int64. negatives_S: (S,) int64; a position's own target is removed from its negatives.
        num_items: N.
        calibration: t in [0, 1]; 0 is plain binary cross-entropy, 1 fully calibrated.

    Source:
        Petrov & Macdonald, "gSASRec: Reducing Overconfidence in Sequential Recommendation Trained with Negative Sampling", RecSys 2023.
    """
    rate = min(1.0, len(negatives_S) / max(1, num_items - 1))
    beta = rate * (calibration * (1.0 - 1.0 / rate) + 1.0 / rate)
    positive = -torch.nn.functional.logsigmoid((states_PD * positive_PD).sum(dim=1)) * beta
    negative = torch.nn.functional.softplus(negative_logits(states_PD, negative_SD, targets_P, negatives_S, 0.0))
    return positive.sum() + negative.sum()


def negative_logits(states_PD: Tensor, negative_SD: Tensor, targets_P: Tensor, negatives_S: Tensor, log_expected: Tensor | float) -> Tensor:
    """(P, S) logits of shared negatives with logQ correction, -inf at accidental hits; see `sampled_softmax_loss`."""
    logits = states_PD @ negative_SD.T - log_expected
    return logits.masked_fill(negatives_S[None, :] == targets_P[:, None], float("-inf"))


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """Bfloat16 where the device computes with it, float32 elsewhere (emulation is slower than float32)."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if supported() else torch.float32
