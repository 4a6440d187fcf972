"""Every setting of `raysys train`, and the defaults that follow from the data."""

import dataclasses
from dataclasses import dataclass, field

from raysys import config
from raysys.models.content import ContentConfig
from raysys.models.covisit import CovisitConfig
from raysys.models.dot_product import DotProductConfig
from raysys.models.interest import InterestConfig
from raysys.models.popularity import PopularityConfig
from raysys.models.ranker import RankerConfig
from raysys.train.encoder import EncoderTrainConfig


@dataclass(frozen=True)
class ScalingConfig:
    """Where training runs. The same code runs on one CPU and on many GPUs."""

    workers: int = 1
    """Ray Train workers; gradients are averaged over them."""
    use_gpu: bool = False
    """Give each worker one GPU."""
    cpus_per_worker: int | None = None
    """CPUs, and torch threads, of each worker; None shares the cluster's CPUs evenly."""
    max_failures: int = 3
    """Restarts from the last checkpoint after a worker or node has died."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run, by part."""

    interest: InterestConfig = field(default_factory=InterestConfig)
    encoder: EncoderTrainConfig = field(default_factory=EncoderTrainConfig)
    covisit: CovisitConfig = field(default_factory=CovisitConfig)
    popularity: PopularityConfig = field(default_factory=PopularityConfig)
    content: ContentConfig = field(default_factory=ContentConfig)
    dot_product: DotProductConfig = field(default_factory=DotProductConfig)
    ranker: RankerConfig = field(default_factory=RankerConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    sources: list[str] = field(default_factory=lambda: ["interest", "covisit", "content", "popularity", "dot_product"])
    """Retrieval sources to train; fusion gives each its weight on validation, 0 where it does not earn its place."""
    refit_epochs: int = 8
    """Epochs on the whole training part, starting from the model that was fitted without each user's last position."""
    num_candidates: int = 200
    """Items that retrieval hands to ranking."""
    history_max_events: int = 200
    """Events of each user kept in the bundle, where serving starts from."""
    max_ranker_queries: int = 20_000
    """Held-out positions the ranker learns from, sampled with the seed when there are more."""
    seed: int = 0
    """Seed of everything random; `--seed` wins."""


def load_train_config(uri: str | None, overrides: list[str]) -> tuple["TrainConfig", frozenset[str]]:
    """Settings and the dotted names that were given, so that data-driven defaults fill only the others."""
    values = config.merge(config.read_yaml(uri) if uri else {}, config.parse_overrides(overrides))
    return config.from_dict(TrainConfig, values), frozenset(_dotted(values))


def _dotted(values: dict, prefix: str = "") -> list[str]:
    names = []
    for key, value in values.items():
        names += _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return names


def replace(settings: TrainConfig, part: str, **values: object) -> TrainConfig:
    """A copy with some fields of one part changed."""
    return dataclasses.replace(settings, **{part: dataclasses.replace(getattr(settings, part), **values)})
