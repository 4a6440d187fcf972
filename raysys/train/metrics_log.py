"""Figures of a training for TensorBoard and MLflow, written by rank 0; off unless configured.

Steps are steps of the optimizer, counted through all epochs of a stage. After a
restart the steps since the checkpoint are written again; both tools show the
later value.
"""

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

from raysys import storage


@dataclass(frozen=True)
class LoggingConfig:
    """Where figures of training go."""

    tensorboard: str | None = None
    """Folder of TensorBoard event files, one below it for each stage; absolute, and visible to worker 0."""
    mlflow: str | None = None
    """MLflow tracking URI; needs the mlflow package on the workers."""
    every_steps: int = 10
    """Steps between two points of a curve."""

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"expected every_steps of at least 1, got {self.every_steps}")
        folder = self.tensorboard
        if folder is not None and not (storage.is_local(folder) and folder.removeprefix("file://").startswith("/")):
            raise ValueError(f"expected an absolute folder for tensorboard, got {self.tensorboard!r}")
        if self.mlflow is not None and importlib.util.find_spec("mlflow") is None:
            raise ValueError("mlflow is set, but the mlflow package is not installed; install it here and on the workers, or leave it out")


class MetricsLog:
    """Curves of one stage; does nothing where nothing is configured or off rank 0.

    Args:
        config: where to.
        run: name of the training run.
        stage: of the training.
        rank: this worker.
    """

    def __init__(self, config: LoggingConfig, run: str, stage: str, rank: int):
        self.every, self.writer, self.mlflow = config.every_steps, None, None
        if rank > 0:
            return
        if config.tensorboard is not None:
            from tensorboardX import SummaryWriter  # comes with ray[tune]

            folder = storage.resolve(config.tensorboard)[1]
            self.writer = SummaryWriter(os.path.join(folder, run, stage.replace(" ", "-")))
        if config.mlflow is not None:
            import mlflow

            self.mlflow = mlflow
            mlflow.set_tracking_uri(config.mlflow)
            mlflow.set_experiment("raysys")
            mlflow.start_run(run_name=f"{run}-{stage}")

    def step(self, figures: dict[str, Any], step: int) -> None:
        """Figures of an optimizer step; only every so many are written."""
        if step % self.every == 0:
            self._write({name: float(value) for name, value in figures.items()}, step)

    def epoch(self, entry: dict, step: int) -> None:
        """An epoch's entry of the history, at the step that ended it."""
        self._write({f"epoch/{name}": float(value) for name, value in entry.items() if value is not None}, step)

    def _write(self, figures: dict[str, float], step: int) -> None:
        if self.writer is not None:
            for name, value in figures.items():
                self.writer.add_scalar(name, value, step)
        if self.mlflow is not None:
            self.mlflow.log_metrics(figures, step=step)

    def close(self) -> None:
        """Everything is on disk after this."""
        if self.writer is not None:
            self.writer.close()
        if self.mlflow is not None:
            self.mlflow.end_run()
