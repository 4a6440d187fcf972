"""Who may learn from what, and what is kept from whom to judge by it. No Ray here."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from raysys.errors import SchemaError
from raysys.prepare.dataset import Sequences
from raysys.queries import Queries
from raysys.schema import SPLIT_TRAIN, UNKNOWN_ITEM
from raysys.train.config import TrainConfig

MAX_HISTORY = 500
"""Events of a history that a query carries; no model looks further back."""


class Parts:
    """Who may learn from what, in all sequences or in a fragment of them.

    Args:
        sequences: every event of some users.
        settings: of the training.
        held: `held_out` of all users; None where these are all.
        has_validation: whether the data has a validation part; None where these are all sequences.

    Attributes:
        all: every event; histories of queries are cut from it.
        train: the training part.
        fit: the training part without each user's last positions.
        heldout: flat positions in `all` of those, where the ranker learns.
        choice: flat positions where settings are chosen: the validation part, or half the users' held-out positions without one.
    """

    def __init__(self, sequences: Sequences, settings: TrainConfig, *, held: int | None = None, has_validation: bool | None = None):
        self.all = sequences
        is_train = (sequences.split == SPLIT_TRAIN) & (sequences.items != UNKNOWN_ITEM)
        if held is None and is_train.sum() < 2:
            raise SchemaError(f"expected at least two training events, found {int(is_train.sum())}; prepare more data or another split")
        self.train = sequences.where(is_train)
        counts = np.diff(self.train.indptr)
        wanted = held_out(int((counts >= 2).sum()), settings) if held is None else held
        from_end = np.repeat(counts, counts) - 1 - (np.arange(len(self.train.items)) - np.repeat(self.train.indptr[:-1], counts))
        is_held = from_end < np.repeat(held_counts(counts, wanted), counts)
        self.fit = self.train.where(~is_held)
        flat_train = np.flatnonzero(is_train)
        self.heldout = flat_train[is_held]
        valid = sequences.target_positions("valid")
        self.has_validation = len(valid) > 0 if has_validation is None else has_validation
        if self.has_validation:
            self.choice = valid
        else:
            odd = sequences.user_idx[sequences.rows[self.heldout]] % 2 == 1
            self.choice, self.heldout = self.heldout[odd], self.heldout[~odd]

    @property
    def upto_valid(self) -> Sequences:
        """Everything before the test part that has a row in the catalogue."""
        everything = self.all.upto("valid")
        return everything.where(everything.items != UNKNOWN_ITEM)

    def of(self, stage: str) -> Sequences:
        """What the encoder learns from in a stage of `stages.py`."""
        return {"fit": self.fit, "refit": self.train}[stage] if stage != "last refit" else self.upto_valid


def held_out(num_users: int, settings: TrainConfig) -> int:
    """Events of a user that are held out for the ranker at most, where so many users have two training events."""
    # About a tenth of each history, one event at least, and never more than it takes to feed the ranker.
    return int(np.clip(np.ceil(settings.max_ranker_queries / max(1, num_users)), 1, 10))


def held_counts(lengths: np.ndarray, held: int) -> np.ndarray:
    """(U,) events that are held out of histories of these lengths."""
    return np.where(lengths >= 2, np.clip(np.round(0.1 * lengths), 1, held), 0).astype(np.int64)


@dataclass(frozen=True)
class Held:
    """Positions that were kept from a fit, as questions to it.

    Attributes:
        queries: Q histories.
        targets: (Q,) int64 items that follow, UNKNOWN_ITEM possible.
        positive: (Q,) bool, whether the event that follows is a positive target.
        events: (Q,) int8 code of that event. values: (Q,) float32 its value, NaN without.
    """

    queries: Queries
    targets: np.ndarray
    positive: np.ndarray
    events: np.ndarray
    values: np.ndarray
    ANSWERS: ClassVar[tuple[str, ...]] = ("targets", "positive", "events", "values")

    @classmethod
    def at(cls, sequences: Sequences, positions: np.ndarray) -> "Held":
        """Flat positions of some sequences."""
        queries = sequences.queries_before(positions, max_events=MAX_HISTORY)
        about = (getattr(sequences, name)[positions] for name in ("positive", "events", "values"))
        return cls(queries, sequences.items[positions].astype(np.int64), *about)

    @classmethod
    def stack(cls, parts: list["Held"]) -> "Held":
        """One or more, one after the other."""
        queries = Queries.stack([part.queries for part in parts])
        return cls(queries, *(np.concatenate([getattr(part, name) for part in parts]) for name in cls.ANSWERS))

    def take(self, rows: np.ndarray) -> "Held":
        """Some of the positions."""
        return Held(self.queries.take(rows), *(getattr(self, name)[rows] for name in self.ANSWERS))

    def __len__(self) -> int:
        return len(self.targets)


def chunks(count: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover `count` rows."""
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]
