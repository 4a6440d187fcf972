"""Settings of the continual learner."""

from dataclasses import dataclass


@dataclass(frozen=True)
class OnlineConfig:
    """How a round learns, and when it may publish."""

    min_events: int = 1
    """New usable events before a round does anything."""
    max_events: int = 50_000
    """New usable events a round takes at most; the next round goes on from there."""
    holdout_share: float = 0.2
    """Newest part of the new events that judges the update, as a share."""
    anchor_users: int = 500
    """Users without new events whose last known event judges the update too; guards against forgetting."""
    replay_users: int = 1000
    """Users without new events that the encoder is fine-tuned on besides those with some."""
    epochs: int = 1
    """Passes of the encoder over the users with new events and the replayed ones; 0 leaves the encoder as it is."""
    batch_size: int = 128
    """Sequences a step."""
    lr: float = 2e-4
    """Peak learning rate of the fine-tuning, about a tenth of the training's."""
    recent_half_life_days: float = 4.0
    """The learner's own sources, of items and of kinds of items, forget what followed what by half in so many days of the data's time; 0
    for neither."""
    mixture_events: int = 2000
    """Newest events on which the weights and temperatures of the sources are refitted, at most."""
    mixture_prior: float = 200.0
    """Events that the present mixture counts for when it is refitted; 0 leaves it as it was trained."""
    threads: int = 1
    """Torch threads of a round; the learner mostly shares its machine with the service."""
    margin: float = 0.02
    """NDCG@10 that an update may lose against the serving version, on either slice and beyond one standard error, before it is refused."""
    max_log_loss_rise: float = 0.5
    """Nats by which the log loss of what users did next, under retrieval's distribution, may rise on either slice (calibration)."""
    max_drift: float = 0.5
    """Mean total variation between the serving and the updated distribution over the catalogue, for anchor users, in [0, 1]."""
    proven_fall: float = 0.5
    """Relative fall of the serving versions' hit rate, beyond two standard errors, after which it is asked whether tastes have changed."""
    young_events: int = 5000
    """After a proven change the three settings below hold for so many events, and nobody is an anchor."""
    young_lr: float = 4e-3
    """`lr` then; item vectors stay as they are."""
    young_epochs: int = 10
    """`epochs` then (0 `epochs` still leave the encoder as it is)."""
    young_batch_size: int = 64
    """`batch_size` then."""
    max_evaluated: int = 2000
    """Newest events scored in a round at most."""
    seed: int = 0
    """Of the samples and of dropout; with it goes the number of the round."""

    def __post_init__(self) -> None:
        if not 0 <= self.holdout_share < 1:
            raise ValueError(f"holdout_share: expected a share in [0, 1), got {self.holdout_share}")
        for name in (
            "min_events",
            "max_events",
            "batch_size",
            "threads",
            "max_evaluated",
            "young_events",
            "young_epochs",
            "young_batch_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
