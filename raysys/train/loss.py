"""Next-item losses over a catalogue, for states that are dense and targets that are rows.

Legend: P positions, N items, D dimension, S sampled negatives.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class _FullSoftmax(torch.autograd.Function):
    """Cross-entropy of `states @ vectors.T` without keeping a (P, N) matrix.

    Gradients are computed in the forward pass, chunk by chunk, while the logits
    are still in cache; on a CPU the (P, N) passes of plain cross-entropy, not
    its products, are what costs.
    """

    @staticmethod
    def forward(ctx, states_PD: Tensor, vectors_ND: Tensor, targets_P: Tensor, chunk: int) -> Tensor:
        need_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_states, grad_vectors = torch.empty_like(states_PD), torch.zeros_like(vectors_ND)
        total = states_PD.new_zeros(())
        for start in range(0, len(states_PD), chunk):
            rows = slice(start, start + chunk)
            states, targets = states_PD[rows], targets_P[rows]
            logits = states @ vectors_ND.T
            picked = logits.gather(1, targets[:, None])
            peak = logits.max(dim=1, keepdim=True).values
            exponentials = logits.sub_(peak).exp_()
            mass = exponentials.sum(dim=1, keepdim=True)
            total += (peak + mass.log() - picked).sum()
            if need_grad:
                probabilities = exponentials.div_(mass)
                probabilities.scatter_add_(1, targets[:, None], torch.full_like(picked, -1.0))
                torch.mm(probabilities, vectors_ND, out=grad_states[rows])
                grad_vectors.addmm_(probabilities.T, states)
        ctx.save_for_backward(grad_states, grad_vectors)
        return total

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad_output,) = grad_outputs
        grad_states, grad_vectors = ctx.saved_tensors
        return grad_states * grad_output, grad_vectors * grad_output, None, None


def full_softmax_loss(states_PD: Tensor, vectors_ND: Tensor, targets_P: Tensor, *, chunk: int = 256) -> Tensor:
    """Summed cross-entropy over the whole catalogue, in nats.

    Args:
        states_PD: (P, D) float32.
        vectors_ND: (N, D) float32.
        targets_P: (P,) int64 rows of the next items.
        chunk: positions a block; memory is `chunk * N` floats.
    """
    return _FullSoftmax.apply(states_PD, vectors_ND, targets_P, chunk)


def sampled_softmax_loss(
    states_PD: Tensor, vectors_ND: Tensor, targets_P: Tensor, negatives_S: Tensor, log_q_N: Tensor | None = None
) -> Tensor:
    """Summed cross-entropy over the target and shared sampled negatives, in nats.

    Each position's own target is removed from its negatives (an accidental hit).
    With `log_q_N`, logits are corrected by the log of the sampling probability,
    so that the expectation of the gradient approaches that of the full softmax.

    Args:
        states_PD: (P, D) float32.
        vectors_ND: (N, D) float32.
        targets_P: (P,) int64.
        negatives_S: (S,) int64 rows, drawn once for all positions.
        log_q_N: (N,) float32 log sampling probability an item; None where it is uniform.

    Source:
        Yi et al., "Sampling-bias-corrected neural modeling", RecSys 2019 (logQ).
    """
    positive = (states_PD * vectors_ND[targets_P]).sum(dim=1, keepdim=True)
    negative = states_PD @ vectors_ND[negatives_S].T
    if log_q_N is not None:
        positive = positive - log_q_N[targets_P][:, None]
        negative = negative - log_q_N[negatives_S]
    negative = negative.masked_fill(negatives_S[None, :] == targets_P[:, None], float("-inf"))
    logits = torch.cat([positive, negative], dim=1)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device), reduction="sum")
