"""The encoder in a stage: begun from what the stage before left, or continued from a checkpoint, and kept for the next one.

Every rank takes part in all of it; the whole encoder, with the rows of all ranks, exists on rank 0 alone.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property

import torch
from torch import nn

from raysys.features.text import catalogue_vectors
from raysys.models.content import ContentNeighbours
from raysys.models.interest import InterestEncoder
from raysys.prepare.dataset import Prepared
from raysys.train.config import TrainConfig
from raysys.train.encoder import EncoderTrainConfig, EncoderTraining, TrainResult, TrainState
from raysys.train.id_dropout import StandIns
from raysys.train.metrics_log import MetricsLog
from raysys.train.parallel import whole
from raysys.train.stream import source_of
from raysys.train.table import ShardedTable, gathered
from raysys.train.worker import Worker


class EncoderStages:
    """Trainings of one encoder, stage after stage.

    Args:
        worker: this rank; the encoder is kept in what it saves, under `encoder`.
    """

    def __init__(self, worker: Worker):
        self.worker, self.settings = worker, worker.settings

    def train(
        self,
        stage: str,
        *,
        schedule: EncoderTrainConfig | None = None,
        deadline: float | None = None,
        validate: Callable | None = None,
        report: bool = True,
    ) -> TrainResult:
        """Train the encoder of the stage before, or a new one, or go on where the checkpoint stopped.

        Args:
            stage: what is learnt from; see `Parts.of`.
            schedule: epochs and rates; those of the settings by default.
            deadline: `time.time()` by which to end.
            validate: figure to maximise; without one the last weights stay.
            report: whether to write checkpoints on the way.
        """
        worker = self.worker
        encoder = new_encoder(worker.prepared, self.settings, self._table())
        first, stop = worker.parallel.rows(worker.num_items)
        resume = None
        if worker.state.get("training", {}).get("stage") == stage:
            resume = TrainState(worker.state["training"]["progress"], *worker.saved.under("training/"), first, stop)
        elif "encoder" in worker.saved.rows:
            self._fill(encoder, worker.saved.rows["encoder"])
        worker.saved.drop("encoder", "training/", "encoder/")
        source = source_of(worker.evidence, stage)
        log = MetricsLog(self.settings.logging, worker.plan.run, stage, worker.rank)
        training: EncoderTraining

        def on_epoch(entry: dict) -> None:
            figure = "" if entry["validation"] is None else f", ndcg@10 {entry['validation']:.4f}"
            worker.say(f"encoder: {stage} epoch {entry['epoch']}, loss {entry['loss']:.4f}{figure}, {entry['seconds']:.1f} s")
            log.epoch(entry, training.step)

        def on_checkpoint(state: TrainState) -> None:
            worker.state["training"] = {"stage": stage, "progress": state.progress}
            worker.saved.put("training/", state.dense, state.rows)
            # Inside an epoch the training does not wait for the storage; after one, the checkpoint counts when this returns.
            worker.save(wait=state.progress["batch"] == 0)
            worker.saved.drop("training/")

        training = EncoderTraining(
            encoder,
            source,
            schedule or self.settings.encoder,
            seed=self.settings.seed,
            item_counts=worker.evidence.item_counts,
            stand_ins=self._stand_ins,
            parallel=worker.parallel,
            device=worker.device,
            deadline=deadline,
            validate=validate,
            on_epoch=on_epoch,
            on_checkpoint=on_checkpoint if report else None,
            on_step=log.step,
        )
        if resume is not None:
            training.resume(resume)
        result = training.run()
        source.close()
        log.close()
        worker.state.pop("training", None)
        dense = {name: whole(value.detach()).cpu() for name, value in encoder.named_parameters() if name != "items.weight"}
        worker.saved.put("encoder/", dense, {})
        worker.saved.rows["encoder"] = encoder.items.weight.detach()[: stop - first].cpu()
        return result

    def refit_schedule(self, epochs: int) -> EncoderTrainConfig:
        """Epochs and rates of a training that goes on from a finished one."""
        config = self.settings.encoder
        return dataclasses.replace(config, epochs=epochs, lr=config.lr * self.settings.refit_lr_factor, dropout_epochs=0)

    def whole(self) -> InterestEncoder | None:
        """The encoder of the last training with its whole table, on rank 0; None on the others. Every rank must call."""
        worker = self.worker
        table = gathered(worker.saved.rows["encoder"], worker.num_items, worker.parallel)
        if table is None:
            return None
        encoder = new_encoder(worker.prepared, self.settings)
        self._fill(encoder, table)
        return encoder.eval()

    @cached_property
    def _stand_ins(self) -> StandIns | None:
        """Who stands in for whom under id dropout; None without it, and where no item has a text."""
        worker = self.worker
        if not self.settings.encoder.id_dropout:
            return None
        texts = catalogue_vectors(worker.prepared.items())
        if texts is None:
            worker.say("encoder: id_dropout has nothing to work on, no item has a title, text or category")
            return None
        return StandIns(ContentNeighbours.fit(texts).item_vectors, worker.evidence.item_counts > 0)

    def _table(self) -> Callable[[int], ShardedTable] | None:
        """Builds the item table of the training where it is cut over several workers; None for a whole one."""
        parallel, num_items = self.worker.parallel, self.worker.num_items
        if not parallel.shard_items or parallel.world_size == 1:
            return None
        return lambda seed: ShardedTable(num_items, self.settings.interest.dim, seed, parallel)

    @torch.no_grad()
    def _fill(self, encoder: InterestEncoder, rows: torch.Tensor) -> None:
        encoder.items.weight[: len(rows)] = rows
        for name, parameter in encoder.named_parameters():
            if name != "items.weight":
                parameter.copy_(self.worker.saved.dense[f"encoder/{name}"])


def new_encoder(prepared: Prepared, settings: TrainConfig, table: Callable[[int], nn.Module] | None = None) -> InterestEncoder:
    """An untrained encoder; the same settings and seed give the same start in every process, however its table is cut."""
    torch.manual_seed(settings.seed)
    return InterestEncoder(prepared.num_items, len(prepared.events), settings.interest, table)
