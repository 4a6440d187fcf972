"""One training worker: what it is asked, what it has, and its share of every checkpoint. Knows no stage; see `stages.py`."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import CheckpointUploadMode

from raysys import storage
from raysys.prepare.dataset import Prepared
from raysys.train.checkpoint import Saved, read_rows, read_state, write_rows, write_state
from raysys.train.config import TrainConfig
from raysys.train.evidence import Evidence
from raysys.train.parallel import Parallel
from raysys.train.survey import Survey


@dataclass(frozen=True)
class Plan:
    """What the driver asks of the workers.

    Attributes:
        prepared_uri: the prepared set.
        settings: complete ones.
        fit: "train" or "train+valid".
        threads: of torch, in each worker.
        deadline: `time.time()` by which to be done, or None.
        run: name of the run, for logs.
        survey: of the sequences where they are streamed; None where every worker reads them.
    """

    prepared_uri: str
    settings: TrainConfig
    fit: str
    threads: int
    deadline: float | None
    run: str
    survey: Survey | None


class Worker:
    """See the module.

    Args:
        plan: what to do.
        rank: this worker.
        world_size: number of workers.
        say: prints a line where the run was started; only rank 0 speaks.

    Attributes:
        prepared: the prepared set. num_items: N.
        evidence: what it may learn from.
        parallel: this rank among the others.
        device: where the encoder runs.
        saved: what is kept between stages; from the last checkpoint where there is one.
    """

    def __init__(self, plan: Plan, rank: int, world_size: int, say: Callable[[str], Any]):
        torch.set_num_threads(plan.threads)
        self.plan, self.settings, self.rank = plan, plan.settings, rank
        scaling = plan.settings.scaling
        self.parallel = Parallel(rank, world_size, scaling.strategy, scaling.shard_items)
        self.say = say if rank == 0 else lambda line: None
        self.prepared = Prepared.open(plan.prepared_uri)
        self.num_items = self.prepared.num_items
        self.evidence = Evidence(self.prepared, plan.settings, plan.survey)
        self.device = ray.train.torch.get_device()
        if self.device.type == "cuda" and not torch.cuda.is_available():
            self.say("the node has a GPU, but torch cannot use it: training on the CPU; install torch with CUDA there")
            self.device = torch.device("cpu")
        self.saved = Saved({"stage": "fit"}, {}, {})
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                self.saved = Saved(*read_state(folder), read_rows(folder, *self.parallel.rows(self.num_items)))
            self.say(f"continuing from a checkpoint in stage {self.state['stage']}")

    @property
    def state(self) -> dict[str, Any]:
        """What the stages keep, JSON-ready."""
        return self.saved.state

    def share(self, share: float) -> float | None:
        """The moment when a share of what is left of the time budget is used up."""
        if self.plan.deadline is None:
            return None
        return time.time() + share * max(0.0, self.plan.deadline - time.time())

    def save(self, *, folder: str | None = None, wait: bool = True) -> None:
        """Report to Ray Train; each worker brings what only it has to the checkpoint.

        Args:
            folder: where other files of the checkpoint are already; a temporary one by default. It is removed.
            wait: until the checkpoint is in the run's storage; else it is copied there while the training goes on.
        """
        folder = folder or tempfile.mkdtemp(prefix="raysys-checkpoint-")
        if self.rank == 0:
            write_state(folder, self.state, self.saved.dense)
        if self.rank == 0 or self.parallel.shard_items:
            write_rows(folder, self.saved.rows, *self.parallel.rows(self.num_items))
        is_empty = not os.listdir(folder)
        ray.train.report(
            {"stage": self.state["stage"]},
            checkpoint=None if is_empty else ray.train.Checkpoint.from_directory(folder),
            checkpoint_upload_mode=CheckpointUploadMode.SYNC if wait else CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )
        if is_empty:
            storage.remove(folder)
