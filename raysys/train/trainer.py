"""Ray Train's trainer without its idle waits, which on a small set took longer than the training: 30 of 50 seconds.

Both are waits of its controller. It takes a checkpoint when it next looks at the workers, every two seconds by
default, and a worker stands still until then. And where a cluster has no dashboard (a private one of ours has none),
its cleaner of placement groups asks in vain for the state of an actor, ten seconds a question, and is waited for at the end.
"""

import os
from typing import Any

from ray._private.worker import get_dashboard_url
from ray.train.torch import TorchTrainer

LOOK_S = 0.25
"""Seconds between two looks of the controller at the workers; a look is one small call to each."""


class Trainer(TorchTrainer):
    """See the module; arguments are those of `TorchTrainer`."""

    def __init__(self, *args: Any, **options: Any):
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(LOOK_S))  # Ray hands it on to the controller
        super().__init__(*args, **options)

    def _create_default_callbacks(self) -> list:
        """Without the cleaner where it could not know whether the controller lives; a controller's group goes with it there too."""
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # mypy sees the class of before Train V2
        if get_dashboard_url():
            return callbacks
        return [callback for callback in callbacks if type(callback).__name__ != "PlacementGroupCleanerCallback"]
