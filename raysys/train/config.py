"""Every setting of `raysys train`, and the defaults that follow from the data."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from raysys import config
from raysys.models.content import ContentConfig
from raysys.models.covisit import CovisitConfig
from raysys.models.dot_product import DotProductConfig
from raysys.models.interest import InterestConfig
from raysys.models.judge import JudgeConfig
from raysys.models.linear import LinearConfig
from raysys.models.popularity import PopularityConfig
from raysys.models.ranker import RankerConfig
from raysys.train.encoder import EncoderTrainConfig
from raysys.train.metrics_log import LoggingConfig

STREAM_EVENTS = 50_000_000
"""Training events from which histories are streamed instead of held: 13 bytes each and worker."""


@dataclass(frozen=True)
class ScalingConfig:
    """Where training runs. The same code runs on one CPU and on many GPUs."""

    workers: int = 1
    """Ray Train workers; gradients are averaged over them."""
    min_workers: int | None = None
    """Start, and go on when nodes are lost, with as few workers as this, and take more when there is room; None waits for all of them."""
    resize_every_s: float = 60.0
    """With min_workers: seconds between looks for room for more workers; taking them repeats what follows the last checkpoint."""
    use_gpu: bool = False
    """Give each worker one GPU."""
    cpus_per_worker: int | None = None
    """CPUs, and torch threads, of each worker; None gives as many as the nodes allow."""
    max_failures: int = 3
    """Restarts from the last checkpoint after a worker or node has died."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """What each worker holds of the transformer: all of it, or a part (FSDP2), for encoders that fill a GPU; fsdp needs shard_items."""
    shard_items: bool = False
    """Cut the item table, its gradient and its optimizer state by rows over the workers, where it does not fit into one."""
    input: Literal["auto", "memory", "stream"] = "auto"
    """Training histories in every worker's memory, or streamed through it by Ray Data; auto streams from 50 million events."""
    shuffle_events: int = 4_000_000
    """Events that are shuffled together where they are streamed; a worker holds about three times its share of them, 6 bytes each.
    Worker 0 learns the other models from as many at a time, about 300 bytes each."""

    def __post_init__(self) -> None:
        if self.workers < 1 or (self.cpus_per_worker is not None and self.cpus_per_worker < 1):
            raise ValueError(f"expected at least one worker with one CPU, got {self.workers} with {self.cpus_per_worker}")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise ValueError(f"expected min_workers from 1 to workers ({self.workers}), got {self.min_workers}")
        if self.resize_every_s <= 0:
            raise ValueError(f"expected resize_every_s > 0, got {self.resize_every_s:g}")
        if self.strategy == "fsdp" and not self.shard_items:
            raise ValueError("strategy fsdp cuts the transformer and leaves the item table to shard_items; set shard_items: true as well")
        if self.shuffle_events < 1:
            raise ValueError(f"expected shuffle_events of at least 1, got {self.shuffle_events}")

    def streams(self, num_events: int) -> bool:
        """Whether this many training events are streamed."""
        return self.input == "stream" or (self.input == "auto" and num_events >= STREAM_EVENTS)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run, by part."""

    interest: InterestConfig = field(default_factory=InterestConfig)
    encoder: EncoderTrainConfig = field(default_factory=EncoderTrainConfig)
    covisit: CovisitConfig = field(default_factory=CovisitConfig)
    linear: LinearConfig = field(default_factory=LinearConfig)
    popularity: PopularityConfig = field(default_factory=PopularityConfig)
    content: ContentConfig = field(default_factory=ContentConfig)
    dot_product: DotProductConfig = field(default_factory=DotProductConfig)
    ranker: RankerConfig = field(default_factory=RankerConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    sources: list[str] = field(default_factory=lambda: ["interest", "covisit", "linear", "content", "popularity", "dot_product"])
    """Retrieval sources to train; fusion gives each its weight on validation, 0 where it does not earn its place."""
    refit_epochs: int = 8
    """Epochs on the whole training part, starting from the model that was fitted without each user's last position."""
    refit_lr_factor: float = 1.0
    """Peak learning rate of the refit, relative to the fit's."""
    num_candidates: int = 200
    """Items that retrieval hands to ranking."""
    history_max_events: int = 200
    """Events of each user kept in the bundle, where serving starts from."""
    max_ranker_queries: int = 20_000
    """Held-out positions the ranker learns from, sampled with the seed when there are more."""
    seed: int = 0
    """Seed of everything random; `--seed` wins."""

    def __post_init__(self) -> None:
        if self.interest.exclude_seen and (self.encoder.loss != "softmax" or self.scaling.shard_items):
            raise ValueError(
                "interest.exclude_seen is learnt by the full softmax over a whole table: expected encoder.loss softmax and "
                f"scaling.shard_items false, got {self.encoder.loss} and {str(self.scaling.shard_items).lower()}"
            )
        if self.interest.exclude_seen and self.encoder.repeat_short:
            raise ValueError(
                "encoder.repeat_short shows an event again after itself, which interest.exclude_seen calls no answer: expected one of them"
            )
        if self.encoder.id_dropout and self.scaling.shard_items:
            raise ValueError("encoder.id_dropout needs the whole item table: expected scaling.shard_items false, or encoder.id_dropout 0")
        if self.encoder.loss == "gbce" and self.scaling.shard_items:
            raise ValueError("encoder.loss gbce needs the whole item table: expected scaling.shard_items false, or encoder.loss sampled")
        if self.encoder.table_optimizer != "adamw" and self.scaling.workers > 1 and not self.scaling.shard_items:
            raise ValueError(
                f"encoder.table_optimizer {self.encoder.table_optimizer!r} works on the rows that a worker owns; "
                f"with {self.scaling.workers} workers set scaling.shard_items: true as well"
            )


def load_train_config(uri: str | None, overrides: list[str]) -> tuple["TrainConfig", frozenset[str]]:
    """Settings and the dotted names that were given, so that data-driven defaults fill only the others."""
    values = config.merge(config.read_yaml(uri) if uri else {}, config.parse_overrides(overrides))
    return config.from_dict(TrainConfig, values), frozenset(dotted_names(values))


def dotted_names(values: dict, prefix: str = "") -> list[str]:
    """Names of all leaves of nested settings, such as `encoder.lr`."""
    names = []
    for key, value in values.items():
        names += dotted_names(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return names


DENSE_LENGTH = 20.0
"""Mean training events a user from which histories count as long."""
SMALL_DATA = 200_000
"""Training events below which long histories, too, want more dropout."""
LARGE_CATALOGUE = 30_000
"""Items from which the softmax is sampled."""


RARE_REPEATS = 0.01
"""Share of training events on items that the user had before, from which the encoder has to learn about seen items too."""


def with_data_defaults(settings: TrainConfig, given: frozenset[str], lengths: np.ndarray, num_items: int, repeats: float) -> TrainConfig:
    """Fill what nobody set from statistics of the data.

    Short histories over many items overfit at once and want strong dropout;
    long ones want context, depth and less of it.

    Args:
        settings: as configured.
        given: dotted names that were set; they stay.
        lengths: (U,) training events a user.
        num_items: catalogue size.
        repeats: share of training events on an item that the user had before.
    """
    lengths = lengths[lengths > 0]
    mean, long = float(lengths.mean()) if len(lengths) else 0.0, float(np.quantile(lengths, 0.9)) if len(lengths) else 0.0
    dense = mean >= DENSE_LENGTH
    context = int(np.clip(2 ** np.ceil(np.log2(max(long, 1))), 16, 200))
    windows = max(1.0, float(np.ceil(lengths / context).sum()))
    few = dense and lengths.sum() < SMALL_DATA
    loss = settings.encoder.loss if "encoder.loss" in given else "sampled" if num_items > LARGE_CATALOGUE else "softmax"
    sees_all = loss == "softmax" and not settings.scaling.shard_items and not settings.encoder.repeat_short
    only_new = dense and repeats < RARE_REPEATS and sees_all
    wanted: dict[str, dict[str, Any]] = {
        "interest": {
            "dropout": 0.3 if few else 0.2 if dense else 0.5,
            "max_length": context,
            "num_layers": 4 if dense and not few else 2,
            "gated": True,  # both helped on every data set tried; `InterestConfig` alone is the plain SASRec that benchmarks compare
            "positions": "rotary",
            "exclude_seen": only_new,
        },
        "encoder": {
            "epochs": 32 if dense and not few else 20,  # MovieLens-1M: ndcg@10 on validation .198 of 12 epochs, .213 of 32
            "batch_size": int(np.clip(2 ** np.round(np.log2(windows / 90)), 16, 256)),  # about 90 steps an epoch
            "weight_decay": 0.1 if dense else 0.5,
            "loss": loss,
        },
    }
    free = {part: {name: value for name, value in values.items() if f"{part}.{name}" not in given} for part, values in wanted.items()}
    # All at once: what one part wants may be impossible beside what the other still has.
    return dataclasses.replace(settings, **{part: dataclasses.replace(getattr(settings, part), **values) for part, values in free.items()})


def demo_config() -> tuple[TrainConfig, frozenset[str]]:
    """Settings of the MovieLens-100k demo: the defaults, shortened to what a newcomer waits for."""
    interest = InterestConfig(dropout=0.3, max_length=100)
    encoder = EncoderTrainConfig(epochs=10, batch_size=16, warmup_steps=50, ema=0.98)
    given = {"interest.dropout", "interest.max_length", "encoder.batch_size", "encoder.epochs"}
    judge = JudgeConfig(members=1, max_positions=40_000)
    return TrainConfig(interest=interest, encoder=encoder, judge=judge, refit_epochs=3), frozenset(given)
