"""Training of the interest encoder: next item at every position. No Ray here.

Runs alone or as one of several ranks (`parallel.py`). Each rank takes its share
of every global batch, and the loss is scaled so that N ranks with B/N sequences
take the steps of one with B. A checkpoint may be taken after any step; training
goes on from it as if it had not stopped, also on another number of ranks.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from raysys.models.interest import InterestEncoder
from raysys.models.mean_encoder import MeanEncoder
from raysys.train.average import Average
from raysys.train.batches import Batch, Cut, Pool, Source
from raysys.train.id_dropout import StandIns
from raysys.train.loss import distilled_softmax_loss, fast_dtype, full_softmax_loss, gbce_loss, sampled_softmax_loss
from raysys.train.negatives import Negatives, Sampling
from raysys.train.optimizers import (
    TableOptimizerName,
    dense_optimizer,
    dense_state,
    load_dense_state,
    load_table_state,
    schedule,
    table_optimizer,
    table_state,
    touched,
)
from raysys.train.parallel import Parallel, fill, local, whole
from raysys.train.sharded_loss import sharded_sampled_loss, sharded_softmax_loss
from raysys.train.table import ShardedTable


@dataclass(frozen=True)
class EncoderTrainConfig:
    """How the encoder learns."""

    epochs: int = 20
    """Passes over the training sequences at most; the learning rate falls over all of them."""
    batch_size: int = 256
    """Sequences a step, over all workers."""
    accumulate: int = 1
    """Parts in which a worker computes its share of a step, one after the other; more needs less memory for the same gradient."""
    lr: float = 4e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.1
    """AdamW decay of all matrices, dimensionless."""
    table_optimizer: TableOptimizerName = "adamw"
    """Of the item table; lazy_adamw and rowwise_adagrad change only the rows that a step touches (with the sampled loss)."""
    table_lr: float | None = None
    """Peak learning rate of the item table; None is `lr`."""
    warmup_steps: int = 100
    """Steps of linear rise to `lr`; a cosine down to 5% of it follows."""
    ema: float = 0.99
    """Decay a step of the running average of the weights, which is what is validated and kept; 0 for the weights themselves."""
    dropout_epochs: int = 0
    """Epochs over which dropout rises evenly to `interest.dropout`: early ones learn fast, late ones are kept from overfitting. 0 has all
    of it from the start."""
    id_dropout: float = 0.0
    """Share of the items that in each step do without their own vectors and take the mean of those nearest by content, as items that
    nobody has chosen do in the end. Needs texts, the full softmax and a whole table."""
    repeat_short: bool = False
    """Repeat short histories in the room that long ones need, so that they are learnt from more often and at more places (repeated
    padding). A copy sees the ones before it, so not with `interest.exclude_seen`."""
    loss: Literal["softmax", "sampled", "gbce"] = "softmax"
    """Cross-entropy over the whole catalogue, or over the target and shared negatives; or gSASRec's binary cross-entropy over those,
    which wants `interest.temperature` 0."""
    num_negatives: int = 1024
    """Negatives a step, for the losses that draw some."""
    negatives: Sampling = "uniform"
    """How they are drawn: evenly, by popularity rank (log_uniform), or half of each (mixed); the sampled loss corrects for it."""
    gbce_calibration: float = 0.75
    """Of the gbce loss, t in [0, 1]: 0 is plain binary cross-entropy, 1 takes away all overconfidence."""
    patience: int = 3
    """Validations without a better figure before stopping."""
    validate_every: int = 2
    """Epochs between validations."""
    clip_norm: float = 1.0
    """Global gradient norm is cut to this."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16 everywhere, nowhere, or where it was measured to pay: on GPUs, and on a CPU with AVX512-BF16 in the full softmax alone."""
    compile: bool = False
    """Compile the blocks with torch.compile (needs a C++ compiler); off for small models on CPUs: compiling outweighed what it won."""
    checkpoint_steps: int | None = None
    """Steps between checkpoints inside an epoch; None for one after each epoch only."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "num_negatives", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.dropout_epochs < 0:
            raise ValueError(f"expected dropout_epochs of at least 0, got {self.dropout_epochs}")
        if not 0 <= self.id_dropout < 1:
            raise ValueError(f"expected id_dropout in [0, 1), got {self.id_dropout}")
        if self.id_dropout and self.loss != "softmax":
            raise ValueError(f"expected loss softmax with id_dropout, got {self.loss}")
        if not 0 <= self.gbce_calibration <= 1:
            raise ValueError(f"expected gbce_calibration in [0, 1], got {self.gbce_calibration}")
        if self.loss == "gbce" and self.negatives != "uniform":
            raise ValueError(f"expected negatives uniform with loss gbce, whose calibration assumes it, got {self.negatives}")
        if self.checkpoint_steps is not None and self.checkpoint_steps < 1:
            raise ValueError(f"expected checkpoint_steps of at least 1, or null, got {self.checkpoint_steps}")


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


@dataclass
class TrainState:
    """A moment of a training, enough to go on from on any number of ranks. Holds live tensors: save it before the next step.

    Attributes:
        progress: JSON-ready: where in which epoch, history, best figures.
        dense: whole tensors of the transformer and its optimizer, the same on all ranks.
        rows: tensors with a row for each item in [first, stop): table, average, optimizer.
        first, stop: items of this rank; all of them where the table is whole.
    """

    progress: dict[str, Any]
    dense: dict[str, Tensor]
    rows: dict[str, Tensor]
    first: int
    stop: int


class _Trainee(nn.Module):
    """Encoder and loss in one module, so that DistributedDataParallel sees every parameter used."""

    def __init__(
        self,
        encoder: InterestEncoder,
        config: EncoderTrainConfig,
        parallel: Parallel,
        teacher: InterestEncoder | MeanEncoder | None,
        share: float,
        stand_ins: StandIns | None,
    ):
        super().__init__()
        self.teacher, self.share = [teacher], share  # in a list: its weights are not to be trained, averaged or saved
        self.stand_ins = stand_ins if config.id_dropout else None
        self.encoder, self.parallel, self.config, self.precision = encoder, parallel, config, config.precision

    def forward(
        self,
        items: Tensor,
        events: Tensor,
        gaps: Tensor,
        waits: Tensor,
        targets: Tensor,
        negatives: Tensor | None,
        log_expected: Tensor | None,
    ) -> Tensor:
        device, encoder = items.device, self.encoder
        real, table = targets >= 0, None
        if self.stand_ins is not None:
            table = self.stand_ins.table(encoder, self.config.id_dropout)
        with torch.autocast(device.type, torch.bfloat16, enabled=self._autocasts(device)):
            inputs = (items, events, gaps, waits)
            states = encoder(*inputs) if table is None else functional_call(encoder, {"items.weight": table}, inputs)
            states = states[real].float()
        targets = targets[real]
        dtype = fast_dtype(device) if self.precision == "auto" else getattr(torch, self.precision)
        if not isinstance(encoder.items, ShardedTable):
            if negatives is None:
                seen = seen_before(items, real) if encoder.config.exclude_seen else None
                if (teacher := self.teacher[0]) is not None:
                    with torch.no_grad():
                        taught, told = teacher(items, events, gaps, waits)[real].float(), teacher.item_vectors()
                    goal = {"teacher_states_PD": taught, "teacher_vectors_ND": told, "share": self.share}
                    return distilled_softmax_loss(states, encoder.item_vectors(table=table), targets, **goal, seen=seen, dtype=dtype)
                return full_softmax_loss(states, encoder.item_vectors(table=table), targets, seen=seen, dtype=dtype)
            positive, negative = encoder.item_vectors(targets), encoder.item_vectors(negatives)
            if self.config.loss == "gbce":
                calibration = self.config.gbce_calibration
                return gbce_loss(states, positive, negative, targets, negatives, encoder.num_items, calibration)
            assert log_expected is not None
            return sampled_softmax_loss(states, positive, negative, targets, negatives, log_expected, dtype=dtype)
        first, stop = encoder.items.first, encoder.items.stop
        if negatives is None or log_expected is None:
            return sharded_softmax_loss(states, encoder.item_vectors(), targets, first=first, parallel=self.parallel, dtype=dtype)
        mine = (negatives >= first) & (negatives < stop)
        return sharded_sampled_loss(
            states,
            targets,
            negatives[mine],
            log_expected[mine],
            vectors_of=encoder.item_vectors,
            first=first,
            stop=stop,
            parallel=self.parallel,
        )

    def _autocasts(self, device: torch.device) -> bool:
        if self.precision == "auto":
            return device.type == "cuda" and fast_dtype(device) == torch.bfloat16
        return self.precision == "bfloat16"


def seen_before(items_BT: Tensor, real_BT: Tensor) -> Callable[[slice], Tensor]:
    """The histories of the positions that are trained on, made block by block.

    Args:
        items_BT: (B, T) int64 inputs, left-aligned.
        real_BT: (B, T) bool, the P positions, in this order.

    Returns:
        Slice of p positions -> (p, T) int64 the inputs up to each; later ones are replaced by the first.
    """
    rows_P, places_P = real_BT.nonzero(as_tuple=True)
    columns_T = torch.arange(items_BT.shape[1], device=items_BT.device)

    def history(positions: slice) -> Tensor:
        inputs = items_BT[rows_P[positions]]
        return torch.where(columns_T <= places_P[positions, None], inputs, inputs[:, :1])

    return history


class EncoderTraining:
    """One training of an encoder, in place; `run` ends with the weights of the best validation.

    Args:
        encoder: changed in place; with a `ShardedTable` where `parallel` cuts the items.
        source: the part to learn from, nothing else.
        config: see `EncoderTrainConfig`.
        seed: of order, windows, negatives and dropout.
        item_counts: (N,) training events by item, where negatives are drawn by them.
        teacher: a trained encoder over the same items, in evaluation mode; with the full softmax over a whole table.
        teacher_share: weight of its distribution in the loss, in [0, 1]; the rest is the next item.
        stand_ins: who stands in for whom, where the configuration asks for id dropout; None where no item has content.
        parallel: this rank among those that train together.
        device: where the encoder runs.
        deadline: `time.time()` by which to end; the learning rate falls over the epochs that fit (at least one is run),
            so a result under a deadline depends on the speed of the machine.
        validate: figure to maximise, called on every rank (rank 0's answer decides); None keeps the last weights.
        on_epoch: called after each epoch with its entry of the history.
        on_checkpoint: called with a state after each epoch, and every `checkpoint_steps`; on every rank.
        on_step: called on every rank after each step with {loss, lr, gradient_norm} as tensors or numbers, and the step's number.
    """

    def __init__(
        self,
        encoder: InterestEncoder,
        source: Source,
        config: EncoderTrainConfig,
        *,
        seed: int,
        item_counts: np.ndarray | None = None,
        teacher: InterestEncoder | MeanEncoder | None = None,
        teacher_share: float = 0.0,
        stand_ins: StandIns | None = None,
        parallel: Parallel | None = None,
        device: torch.device | str = "cpu",
        deadline: float | None = None,
        validate: Callable[[InterestEncoder], float] | None = None,
        on_epoch: Callable[[dict], None] | None = None,
        on_checkpoint: Callable[[TrainState], None] | None = None,
        on_step: Callable[[dict, int], None] | None = None,
    ):
        self.encoder, self.source, self.config, self.seed = encoder.to(device), source, config, seed
        self.parallel, self.device, self.deadline = parallel or Parallel(), device, deadline
        self.validate, self.on_epoch, self.on_checkpoint, self.on_step = validate, on_epoch, on_checkpoint, on_step
        if config.negatives != "uniform" and item_counts is None:
            raise ValueError(f"expected item_counts with negatives {config.negatives}, got none")
        self.negatives = Negatives(config.negatives, np.zeros(encoder.num_items) if item_counts is None else item_counts)
        table = encoder.items
        self.table: nn.Parameter = table.weight
        table.sparse = config.table_optimizer != "adamw" and config.loss != "softmax"
        if config.compile:
            for block in encoder.blocks:
                block.compile(dynamic=True)
        self.module = self.parallel.wrap(_Trainee(encoder, config, self.parallel, teacher, teacher_share, stand_ins), self.table)
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in encoder.named_parameters() if parameter is not self.table}
        self.optimizer = dense_optimizer(self.module, self.table, lr=config.lr, weight_decay=config.weight_decay)
        table_lr = config.lr if config.table_lr is None else config.table_lr
        self.table_optimizer = table_optimizer(config.table_optimizer, self.table, lr=table_lr, weight_decay=config.weight_decay)
        self.peaks = [(group, group["lr"]) for group in self.optimizer.param_groups + self.table_optimizer.param_groups]
        self.average = Average({name: parameter for parameter, name in self.names.items()}, self.table, config.ema)
        self.best: tuple[dict[str, Tensor], Tensor] | None = None
        self.result, self.step, self.stale = TrainResult(), 0, 0
        self.pool, self.batch = 0, 0  # next ones of the epoch
        self.loss_sum, self.num_targets, self.seconds = 0.0, 0, 0.0

    def run(self) -> TrainResult:
        """All epochs that are left."""
        config, result = self.config, self.result
        windows = self.source.num_windows(self.encoder.config.max_length)
        steps_per_epoch = max(1, math.ceil(windows / config.batch_size))
        for epoch in range(len(result.history) + 1, config.epochs + 1):
            fit = _epochs_that_fit(config.epochs - epoch + 1, result.history, self.deadline)
            epochs_left = int(self.parallel.of_first(fit, self.device))
            if epochs_left == 0 or self.stale >= config.patience:
                break
            self._epoch(epoch, (epoch - 1 + epochs_left) * steps_per_epoch)
            entry: dict[str, Any] = {"epoch": epoch, "loss": self.loss_sum / max(1, self.num_targets), "validation": None}
            if self.validate is not None and (epoch % config.validate_every == 0 or epochs_left == 1):
                started = time.time()
                entry["validation"] = self._validated(epoch)
                self.seconds += time.time() - started
            entry["seconds"] = round(self.seconds, 2)
            result.history.append(entry)
            self.pool, self.batch, self.loss_sum, self.num_targets, self.seconds = 0, 0, 0.0, 0, 0.0
            if self.on_epoch is not None:
                self.on_epoch(entry)
            if self.on_checkpoint is not None:
                self.on_checkpoint(self.state())
        self._keep_best()
        return result

    def _epoch(self, epoch: int, total_steps: int) -> None:
        self.module.train()
        self._drop(min(1.0, epoch / (self.config.dropout_epochs + 1)))
        started = time.time()
        on_device = torch.zeros((), dtype=torch.float64, device=self.device)
        cut = Cut(
            max_length=self.encoder.config.max_length,
            batch_size=self.config.batch_size,
            seed=self.seed,
            repeat_short=self.config.repeat_short,
            rank=self.parallel.rank,
            world_size=self.parallel.world_size,
        )
        for pool in self.source.pools(cut, epoch=epoch, first=self.pool):
            for index in range(self.batch, len(pool)):
                for group, peak in self.peaks:
                    group["lr"] = peak * schedule(self.step, self.config.warmup_steps, total_steps)
                on_device += self._step(pool, index, [self.seed, epoch, self.pool, index])
                self.num_targets += int(pool.num_targets[index])
                self.batch = index + 1
                every = self.config.checkpoint_steps
                if every and self.step % every == 0 and self.on_checkpoint is not None:
                    self.loss_sum += float(self.parallel.sum(on_device))
                    on_device.zero_()
                    self.seconds, started = self.seconds + time.time() - started, time.time()
                    self.on_checkpoint(self.state())
            self.pool, self.batch = self.pool + 1, 0
        self.loss_sum += float(self.parallel.sum(on_device))
        self.seconds += time.time() - started

    def _drop(self, share: float) -> None:
        for module in self.encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = share * self.encoder.config.dropout

    def _step(self, pool: Pool, index: int, where: list[int]) -> Tensor:
        """One optimizer step on one global batch; this rank's summed loss before it."""
        config, encoder = self.config, self.encoder
        torch.manual_seed(int(np.random.SeedSequence([*where, self.parallel.rank]).generate_state(1)[0]))  # dropout differs by rank
        negatives, log_expected = None, None
        if config.loss != "softmax":
            # The same on every rank.
            drawn = self.negatives.draw(config.num_negatives, np.random.default_rng(where))
            negatives = torch.from_numpy(drawn).to(self.device)
            log_expected = torch.from_numpy(self.negatives.log_expected(drawn, len(drawn))).to(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        self.table_optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        # Averaging gradients divides by the ranks; times their number that is the sum over all targets of the global batch.
        scale = self.parallel.world_size / pool.num_targets[index]
        parts = pool.batch(index, encoder.num_items, config.accumulate)
        for part, batch in enumerate(parts):
            with self.parallel.accumulating(self.module, last=part == len(parts) - 1):
                loss = self.module(*self._tensors(batch), negatives, log_expected)
                (loss * scale).backward()
            total += loss.detach()
        norm = self.parallel.clip(self.names, self.table, config.clip_norm)
        rows = touched(self.table)[0] if self.table.grad is not None and self.table.grad.is_sparse else None
        self.average.before_step(rows)
        self.optimizer.step()
        self.table_optimizer.step()
        self.step += 1
        self.average.after_step(self.step, rows)
        if self.on_step is not None:
            # This rank's loss, as a mean over the targets of one rank: adding up over ranks would cost an exchange a step.
            self.on_step({"loss": total * scale, "lr": self.peaks[0][0]["lr"], "gradient_norm": norm}, self.step)
        return total

    def _tensors(self, batch: Batch) -> list[Tensor]:
        arrays = (batch.items, batch.events, batch.gaps, batch.waits, batch.targets)
        return [torch.from_numpy(array).to(self.device, non_blocking=True) for array in arrays]

    def _validated(self, epoch: int) -> float:
        assert self.validate is not None
        self.module.eval()
        with self.average.in_place():
            figure = self.parallel.of_first(float(self.validate(self.encoder)), self.device)
        if self.result.best_validation is None or figure > self.result.best_validation:
            self.result.best_validation, self.result.best_epoch, self.stale = figure, epoch, 0
            dense = {name: tensor.detach().clone() for name, tensor in self.average.dense.items()}
            self.best = dense, self.average.rows.detach().clone()
        else:
            self.stale += 1
        return figure

    @torch.no_grad()
    def _keep_best(self) -> None:
        self.average.settle()
        dense, rows = self.best if self.best is not None else (self.average.dense, self.average.rows)
        for parameter, name in self.names.items():
            local(parameter).copy_(local(dense[name]))
        self.table.copy_(rows)
        if self.best is None and self.result.history:
            self.result.best_epoch = self.result.history[-1]["epoch"]
        self.encoder.items.sparse = False
        self.encoder.eval()
        for block in self.encoder.blocks:
            block._compiled_call_impl = None

    def state(self) -> TrainState:
        """This moment; every rank must call."""
        self.average.settle()
        progress = {
            "history": self.result.history,
            "best_epoch": self.result.best_epoch,
            "best_validation": self.result.best_validation,
            **{name: getattr(self, name) for name in ("step", "stale", "pool", "batch", "loss_sum", "num_targets", "seconds")},
        }
        by_row, shared = table_state(self.table_optimizer, self.table)
        dense = {f"model/{name}": whole(parameter.detach()) for parameter, name in self.names.items()}
        dense |= {f"optimizer/{name}": tensor for name, tensor in dense_state(self.optimizer, self.names).items()}
        dense |= {f"table/{name}": tensor for name, tensor in shared.items()}
        rows = {"items": self.table.detach(), **{f"optimizer/{name}": tensor for name, tensor in by_row.items()}}
        if self.config.ema:
            dense |= {f"kept/{name}": whole(tensor) for name, tensor in self.average.dense.items()}
            rows["kept"] = self.average.rows
        if self.best is not None:
            dense |= {f"best/{name}": whole(tensor) for name, tensor in self.best[0].items()}
            rows["best"] = self.best[1]
        first, stop = self.parallel.rows(self.encoder.num_items)
        return TrainState(progress, dense, {name: tensor[: stop - first] for name, tensor in rows.items()}, first, stop)

    @torch.no_grad()
    def resume(self, state: TrainState) -> None:
        """Go on from a state whose rows are those that this rank holds now."""
        progress = state.progress
        self.result = TrainResult(list(progress["history"]), progress["best_epoch"], progress["best_validation"])
        for name in ("step", "stale", "pool", "batch", "loss_sum", "num_targets", "seconds"):
            setattr(self, name, progress[name])

        def padded(rows: Tensor) -> Tensor:
            extra = len(self.table) - len(rows)  # the row of padding, which is in no checkpoint
            return torch.cat([rows.to(self.table.device), rows.new_zeros(extra, *rows.shape[1:]).to(self.table.device)]) if extra else rows

        self.table.copy_(padded(state.rows["items"]))
        for parameter, name in self.names.items():
            fill(parameter, state.dense[f"model/{name}"])
        load_dense_state(self.optimizer, self.names, _under(state.dense, "optimizer/"))
        by_row = {name: padded(tensor) for name, tensor in _under(state.rows, "optimizer/").items()}
        load_table_state(self.table_optimizer, self.table, by_row, _under(state.dense, "table/"))
        if self.config.ema:
            self.average.rows.copy_(padded(state.rows["kept"]))
            for name, tensor in self.average.dense.items():
                fill(tensor, state.dense[f"kept/{name}"])
        if "best" in state.rows:
            dense = {name: tensor.detach().clone() for name, tensor in self.average.dense.items()}
            for name, tensor in dense.items():
                fill(tensor, state.dense[f"best/{name}"])
            self.best = dense, padded(state.rows["best"]).to(self.device, copy=True)


def train_encoder(
    encoder: InterestEncoder, source: Source, config: EncoderTrainConfig, *, resume: TrainState | None = None, **options: Any
) -> TrainResult:
    """Train in place, from the start or from a state; see `EncoderTraining` for the other arguments."""
    training = EncoderTraining(encoder, source, config, **options)
    if resume is not None:
        training.resume(resume)
    return training.run()


def _under(values: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in values.items() if name.startswith(prefix)}


def _epochs_that_fit(wanted: int, history: list[dict], deadline: float | None) -> float:
    if deadline is None or not history:
        return wanted
    return max(0, min(wanted, int((deadline - time.time()) / np.median([entry["seconds"] for entry in history]))))
