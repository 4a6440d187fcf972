"""Popularity: what everybody does, recent events first. The answer to a user nothing is known of.

Legend: B queries, N items.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from raysys.models.base import Arrays, Meta
from raysys.models.counting import fade, weights_of
from raysys.prepare.dataset import Sequences
from raysys.queries import Queries
from raysys.schema import UNKNOWN_ITEM


@dataclass(frozen=True)
class PopularityConfig:
    """How events are weighed."""

    half_life_days: float | None = None
    """An event counts half after so many days before the newest event; None counts all alike. Off where time is ordinal."""
    smoothing: float = 1.0
    """Added to every count, so that an item without events has a finite score."""

    def __post_init__(self) -> None:
        if self.half_life_days is not None and self.half_life_days <= 0:
            raise ValueError(f"half_life_days: expected a positive number or none, got {self.half_life_days}")


class Popularity:
    """Log of decayed, event-weighted counts (a Retriever); the same scores for every query.

    Args:
        counts: (N,) float64 weight of the events of each item, as of `watermark`.
        watermark: UTC epoch seconds of the newest event counted.
        config: settings.
        event_weights: weight by event code; missing codes weigh 1.
        decay: False where time is ordinal or no half-life is set.
    """

    name = "popularity"

    def __init__(self, counts: np.ndarray, watermark: int, config: PopularityConfig, *, event_weights: np.ndarray, decay: bool):
        self.counts, self.watermark, self.config = counts.astype(np.float64), watermark, config
        self.event_weights, self.decay = event_weights.astype(np.float32), decay

    @classmethod
    def fit(
        cls,
        sequences: Sequences,
        num_items: int,
        config: PopularityConfig | None = None,
        *,
        event_weights: Sequence[float] | np.ndarray = (),
        ordinal_time: bool = False,
    ) -> "Popularity":
        """Count the events given (pass the training part)."""
        empty = cls.empty(num_items, config, event_weights=event_weights, ordinal_time=ordinal_time)
        return empty.update(sequences.items, sequences.events, sequences.times)

    @classmethod
    def empty(
        cls,
        num_items: int,
        config: PopularityConfig | None = None,
        *,
        event_weights: Sequence[float] | np.ndarray = (),
        ordinal_time: bool = False,
    ) -> "Popularity":
        """A model that has counted nothing; its updates give what `fit` gives for all of them together."""
        config = config or PopularityConfig()
        decay = config.half_life_days is not None and not ordinal_time
        return cls(np.zeros(num_items), 0, config, event_weights=np.asarray(event_weights, np.float32), decay=decay)

    def emptied(self) -> "Popularity":
        """A model of the same settings that has counted nothing."""
        return Popularity(np.zeros(len(self.counts)), 0, self.config, event_weights=self.event_weights, decay=self.decay)

    def update(self, items: np.ndarray, events: np.ndarray, times: np.ndarray, *, num_items: int | None = None) -> "Popularity":
        """The model with more events counted, as if fitted on all of them (up to float order).

        Args:
            items: (E,) int32 rows; unknown ones are left out.
            events: (E,) int8 codes.
            times: (E,) int64 UTC epoch seconds.
            num_items: N after the update, when the catalogue has grown.
        """
        known = items != UNKNOWN_ITEM
        items, events, times = items[known], events[known], times[known]
        counts = np.zeros(max(num_items or 0, len(self.counts)))
        watermark = max(self.watermark, int(times.max(initial=0)))
        counts[: len(self.counts)] = self.counts * self._fade(np.array(watermark - self.watermark) if self.watermark else np.array(0))
        np.add.at(counts, items, weights_of(events, self.event_weights) * self._fade(watermark - times))
        return Popularity(counts, watermark, self.config, event_weights=self.event_weights, decay=self.decay)

    def scores(self, queries: Queries) -> np.ndarray:
        """(B, N) float32 log counts."""
        return np.broadcast_to(self.log_counts, (len(queries), len(self.counts))).copy()

    @cached_property
    def log_counts(self) -> np.ndarray:
        """(N,) float32, the scores of every query."""
        return np.log(self.counts + self.config.smoothing).astype(np.float32)

    def to_arrays(self) -> tuple[Arrays, Meta]:
        """Counts and weights."""
        meta = {"config": asdict(self.config), "watermark": self.watermark, "decay": self.decay}
        return {"counts": self.counts, "event_weights": self.event_weights}, meta

    @classmethod
    def from_arrays(cls, arrays: Arrays, meta: Meta) -> "Popularity":
        """The model back from `to_arrays`."""
        config = PopularityConfig(**meta["config"])
        return cls(arrays["counts"], meta["watermark"], config, event_weights=arrays["event_weights"], decay=meta["decay"])

    def _fade(self, age_s: np.ndarray) -> np.ndarray:
        return fade(age_s, self.config.half_life_days if self.decay else None)
