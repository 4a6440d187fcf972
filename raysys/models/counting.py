"""What models share that count events: the weight of an event by its code, and how a count fades with age."""

import numpy as np

SECONDS_A_DAY = 86_400.0


def weights_of(events: np.ndarray, event_weights: np.ndarray) -> np.ndarray:
    """(E,) float32 weight of each event.

    Args:
        events: (E,) int8 codes.
        event_weights: (T,) weight by code; codes beyond it weigh 1.
    """
    table = np.ones(128, np.float32)
    table[: len(event_weights)] = event_weights
    return table[events]


def fade(age_s: np.ndarray | int, half_life_days: float | None) -> np.ndarray:
    """0.5 ** (age / half life), float64; 1 without a half-life.

    Args:
        age_s: seconds.
        half_life_days: days of the data's own time.
    """
    return np.exp2(-np.asarray(age_s, np.float64) / (SECONDS_A_DAY * (half_life_days or np.inf)))
