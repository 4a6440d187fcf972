"""Training of the interest encoder: next item at every position. No Ray here.

Runs alone or as one of several ranks: with `wrap` the module is put under
DistributedDataParallel, each rank takes its share of every global batch, and
the loss is scaled so that N ranks with B/N sequences equal one with B.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from raysys.models.interest import InterestEncoder
from raysys.prepare.dataset import Sequences
from raysys.train.batches import batches, num_windows
from raysys.train.loss import fast_dtype, full_softmax_loss, sampled_softmax_loss

FINAL_LR = 0.05
"""Learning rate at the end of training, as a share of its peak."""


@dataclass(frozen=True)
class EncoderTrainConfig:
    """How the encoder learns."""

    epochs: int = 20
    """Passes over the training sequences at most; the learning rate falls over all of them."""
    batch_size: int = 256
    """Sequences a step, over all workers."""
    lr: float = 4e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.1
    """AdamW decay of all matrices, dimensionless."""
    warmup_steps: int = 100
    """Steps of linear rise to `lr`; a cosine down to 5% of it follows."""
    ema: float = 0.99
    """Decay a step of the running average of the weights, which is what is validated and kept; 0 for the weights themselves."""
    loss: Literal["softmax", "sampled"] = "softmax"
    """Cross-entropy over the whole catalogue, or over the target and shared negatives."""
    num_negatives: int = 1024
    """Uniform negatives a step for the sampled loss."""
    patience: int = 3
    """Validations without a better figure before stopping."""
    validate_every: int = 2
    """Epochs between validations."""
    clip_norm: float = 1.0
    """Gradient norm is cut to this."""


@dataclass
class TrainResult:
    """What a training came to.

    Attributes:
        history: one dict an epoch: epoch, loss (nats a position), validation (or None), seconds.
        best_epoch: epoch whose weights the encoder now has.
        best_validation: its validation figure, None without validation.
    """

    history: list[dict] = field(default_factory=list)
    best_epoch: int = 0
    best_validation: float | None = None


class _Trainee(nn.Module):
    """Encoder and loss in one module, so that DistributedDataParallel sees every parameter used."""

    def __init__(self, encoder: InterestEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, items: Tensor, events: Tensor, targets: Tensor, negatives: Tensor | None) -> Tensor:
        real = targets >= 0
        states = self.encoder(items, events)[real]
        if negatives is not None:
            return sampled_softmax_loss(states, self.encoder.item_vectors(), targets[real], negatives)
        return full_softmax_loss(states, self.encoder.item_vectors(), targets[real], dtype=fast_dtype(states.device))


def train_encoder(
    encoder: InterestEncoder,
    sequences: Sequences,
    config: EncoderTrainConfig,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[dict], None] | None = None,
    resume: dict | None = None,
    deadline: float | None = None,
    validate: Callable[[InterestEncoder], float] | None = None,
) -> TrainResult:
    """Train in place; the encoder ends with the weights of its best validation.

    Args:
        encoder: changed in place.
        sequences: the part to learn from, nothing else.
        config: see `EncoderTrainConfig`.
        seed: of order, windows, negatives and dropout.
        rank: this worker.
        world_size: number of workers.
        wrap: puts the module under DistributedDataParallel; None for one process.
        device: where the encoder runs.
        on_epoch: called after each epoch with the state `resume` takes; it holds live tensors, so save it before returning.
        resume: a state from `on_epoch`; training goes on as if it had not stopped.
        deadline: `time.time()` by which to end; the learning rate falls over the epochs that fit (at least one is run),
            so a result under a deadline depends on the speed of the machine.
        validate: figure to maximise, called on every rank (rank 0's answer decides); None keeps the last weights.
    """
    encoder.to(device)
    trainee = _Trainee(encoder)
    module = wrap(trainee) if wrap is not None else trainee
    optimizer = _optimizer(module, config)
    kept = copy.deepcopy(encoder).eval() if config.ema else encoder
    result, best, stale, step = TrainResult(), None, 0, 0
    if resume is not None:
        encoder.load_state_dict(resume["model"])
        kept.load_state_dict(resume["kept"])
        optimizer.load_state_dict(resume["optimizer"])
        result = TrainResult(list(resume["history"]), resume["best_epoch"], resume["best_validation"])
        best, stale, step = resume["best"], resume["stale"], resume["step"]
    steps_per_epoch = max(1, math.ceil(num_windows(sequences, encoder.config.max_length) / config.batch_size))
    for epoch in range(len(result.history) + 1, config.epochs + 1):
        # Decisions to stop must be the same on every rank, or the others wait in a collective for ever.
        epochs_left = int(_agreed(_epochs_that_fit(config.epochs - epoch + 1, result.history, deadline), world_size, device))
        if epochs_left == 0 or stale >= config.patience:
            break
        started = time.time()
        torch.manual_seed((seed * 100_003 + epoch) * 1009 + rank)  # dropout differs by rank
        shared = np.random.default_rng([seed, epoch])
        module.train()
        loss_sum, num_targets = torch.zeros((), device=device), 0
        for batch in batches(
            sequences,
            max_length=encoder.config.max_length,
            batch_size=config.batch_size,
            padding=encoder.num_items,
            rng=shared,
            rank=rank,
            world_size=world_size,
        ):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * _schedule(step, config, (epoch - 1 + epochs_left) * steps_per_epoch)
            negatives = None
            if config.loss == "sampled":
                negatives = torch.from_numpy(shared.integers(0, encoder.num_items, config.num_negatives)).to(device)
            tensors = (torch.from_numpy(array).to(device) for array in (batch.items, batch.events, batch.targets))
            total = module(*tensors, negatives)
            optimizer.zero_grad(set_to_none=True)
            # DistributedDataParallel averages over ranks; times world_size that is the sum over all targets of the global batch.
            (total * (world_size / batch.num_targets)).backward()
            nn.utils.clip_grad_norm_(module.parameters(), config.clip_norm)
            optimizer.step()
            step += 1
            if kept is not encoder:
                _average(kept, encoder, min(config.ema, step / (step + 10)))
            loss_sum += total.detach()
            num_targets += batch.num_targets
        entry: dict[str, Any] = {"epoch": epoch, "loss": float(loss_sum) * world_size / max(1, num_targets), "validation": None}
        if validate is not None and (epoch % config.validate_every == 0 or epochs_left == 1):
            kept.eval()
            entry["validation"] = figure = _agreed(float(validate(kept)), world_size, device)
            if result.best_validation is None or figure > result.best_validation:
                result.best_validation, result.best_epoch, stale = figure, epoch, 0
                best = copy.deepcopy(kept.state_dict())
            else:
                stale += 1
        entry["seconds"] = round(time.time() - started, 2)
        result.history.append(entry)
        if on_epoch is not None:
            on_epoch(
                {
                    "model": encoder.state_dict(),
                    "kept": kept.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "history": result.history,
                    "best_epoch": result.best_epoch,
                    "best_validation": result.best_validation,
                    "best": best,
                    "stale": stale,
                    "step": step,
                }
            )
    encoder.load_state_dict(kept.state_dict() if best is None else best)
    if best is None and result.history:
        result.best_epoch = result.history[-1]["epoch"]
    encoder.eval()
    return result


def _optimizer(module: nn.Module, config: EncoderTrainConfig) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in module.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in module.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)


def _schedule(step: int, config: EncoderTrainConfig, total: int) -> float:
    """Learning rate as a share of its peak: linear warm-up, then half a cosine down to FINAL_LR."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, total - config.warmup_steps))
    return FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def _average(kept: nn.Module, current: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(kept.parameters()), list(current.parameters()), 1 - decay)


def _epochs_that_fit(wanted: int, history: list[dict], deadline: float | None) -> float:
    if deadline is None or not history:
        return wanted
    return max(0, min(wanted, int((deadline - time.time()) / np.median([entry["seconds"] for entry in history]))))


def _agreed(value: float, world_size: int, device: torch.device | str) -> float:
    """Rank 0's value on every rank."""
    if world_size == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    torch.distributed.broadcast(shared, src=0)
    return float(shared.item())
