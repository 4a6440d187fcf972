"""Settings of the sweep itself, the `tune:` part of its YAML file."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TuneConfig:
    """How the space is searched and what a trial may use."""

    algorithm: Literal["random", "grid", "optuna"] = "random"
    """Where the next trial comes from: drawn, every combination of the choices, or Optuna's TPE (`pip install 'raysys[tune]'`)."""
    scheduler: Literal["asha", "pbt", "none"] = "asha"
    """Who goes on: ASHA stops the worse ones early; PBT lets them copy weights and settings of the better; none lets all finish."""
    cpus_per_trial: float | None = None
    """CPUs of a trial, fractions allowed; None takes `scaling.cpus_per_worker`, or 1."""
    gpus_per_trial: float | None = None
    """GPUs of a trial, fractions allowed (0.25: four trials share one); None takes 1 with `scaling.use_gpu`, else 0."""
    reduction: int = 3
    """ASHA: one trial in so many goes on at each decision."""
    perturb_every: int = 2
    """PBT: epochs between decisions, at which the trials wait for each other."""

    def __post_init__(self) -> None:
        for name in ("cpus_per_trial", "gpus_per_trial"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"expected {name} >= 0, got {value}")
        if self.cpus_per_trial == 0:
            raise ValueError("expected cpus_per_trial > 0, got 0")
        if self.reduction < 2 or self.perturb_every < 1:
            raise ValueError(f"expected reduction >= 2 and perturb_every >= 1, got {self.reduction} and {self.perturb_every}")
