"""How good an event was: its value (a rating) where values decide what is positive, else whether it is a positive one.

Legend: E events, C event codes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raysys.prepare.dataset import Sequences

NEVER = float(np.finfo(np.float32).max)
"""A least value that no value reaches; finite, because the learner publishes no model with other numbers."""
MAX_GRADE = 3.0
"""Grades are cut here, in standard deviations."""
NEVER = float(np.finfo(np.float32).max)
"""Least value of an event that no value makes positive; finite, because a gate takes infinity in a model for damage."""


@dataclass(frozen=True)
class Grading:
    """How events become grades and likes, by event code.

    Attributes:
        always: (C,) bool, positive whatever the value.
        least: (C,) float32 value from which an event is positive; NEVER where values do not decide.
        mean, std: (C,) float32 of the values where they decide; std 0 elsewhere.
        share: share of events that are positive, the base rate.
    """

    always: np.ndarray
    least: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    share: float

    @classmethod
    def of(cls, sequences: Sequences, events: Sequence[str], event_types: Mapping[str, Mapping[str, Any]]) -> "Grading":
        """From the meaning of events and the values that some of them have.

        Args:
            sequences: events of the training part.
            events: name by code.
            event_types: fields of `schema.EventType` by name, as in the manifest.
        """
        kinds = [event_types.get(name, {}) for name in events]
        positive = np.array([bool(kind.get("positive")) for kind in kinds])
        least = np.array([NEVER if kind.get("min_value") is None else kind["min_value"] for kind in kinds], np.float32)
        least[~positive] = NEVER
        always = positive & (least == np.float32(NEVER))
        mean, std = np.zeros(len(kinds), np.float32), np.zeros(len(kinds), np.float32)
        for code in np.flatnonzero(least < np.float32(NEVER)):
            values = sequences.values[(sequences.events == code) & np.isfinite(sequences.values)]
            if len(values):
                mean[code], std[code] = values.mean(), values.std()
        share = float(sequences.positive.mean()) if len(sequences.positive) else 0.5
        return cls(always, least, mean, std, float(np.clip(share, 0.01, 0.99)))

    def liked(self, events: np.ndarray, values: np.ndarray) -> np.ndarray:
        """(E,) bool, whether each event is positive."""
        return self.always[events] | (values >= self.least[events])

    def grade(self, events: np.ndarray, values: np.ndarray) -> np.ndarray:
        """(E,) float32 in standard deviations: of the value where it decides and there is one, else of being positive."""
        valued = np.isfinite(values) & (self.std[events] > 0)
        of_value = (np.where(valued, values, 0.0) - self.mean[events]) / np.where(valued, self.std[events], 1.0)
        of_liking = (self.liked(events, values) - self.share) / np.sqrt(self.share * (1 - self.share))
        return np.clip(np.where(valued, of_value, of_liking), -MAX_GRADE, MAX_GRADE).astype(np.float32)
