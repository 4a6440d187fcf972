"""What the stages learn from and are judged by, a piece of the users at a time.

Where the data is held in memory there is one piece, read once and kept. Where it
is streamed a piece is some fragments with at most `scaling.shuffle_events` events,
read anew in every pass: memory holds two of them at most, whatever the size of the
data. No Ray here.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Literal

import numpy as np

from raysys.prepare.dataset import Prepared, Sequences
from raysys.train.config import TrainConfig
from raysys.train.parts import Held, Parts
from raysys.train.survey import Fragment, Survey, grouped, read_fragments

Role = Literal["choice", "heldout"]
"""What held positions are for: to choose settings, or for the ranker to learn; see `Parts`."""


class Evidence:
    """The users of a prepared set, as pieces of `Parts`.

    Args:
        prepared: the set.
        settings: of the training.
        survey: of the set where it is streamed; None where it is held in memory.
    """

    def __init__(self, prepared: Prepared, settings: TrainConfig, survey: Survey | None):
        self.prepared, self.settings, self.survey = prepared, settings, survey
        self.has_validation = prepared.manifest["counts"]["valid"] > 0
        self._groups = [] if survey is None else grouped(survey.fragments, settings.scaling.shuffle_events)

    def __len__(self) -> int:
        """Number of pieces."""
        return 1 if self.survey is None else len(self._groups)

    def piece(self, index: int) -> Parts:
        """One of the pieces; the same users each time."""
        return self._whole if self.survey is None else self._read(self._groups[index])

    def of(self, stage: str) -> Iterator[Sequences]:
        """What is learnt from in a stage, piece by piece; see `Parts.of`."""
        for index in range(len(self)):
            yield self.piece(index).of(stage)

    def sample(self, stage: str) -> Sequences:
        """What is learnt from in a stage of about one piece's worth of users, drawn with the seed; of all where there is one piece."""
        if self.survey is None:
            return self._whole.of(stage)
        order = np.random.default_rng(self.settings.seed).permutation(len(self.survey.fragments))
        drawn = grouped((self.survey.fragments[index] for index in order), self.settings.scaling.shuffle_events)[0]
        return self._read(drawn).of(stage)

    @property
    def lengths(self) -> np.ndarray:
        """(U,) training events of each user, in no order."""
        return np.diff(self._whole.train.indptr) if self.survey is None else self.survey.lengths

    @property
    def statistics(self) -> tuple[np.ndarray, int, float]:
        """What defaults follow from: `lengths`, items, share of training events whose user had the item before."""
        repeats = self._whole.train.repeats if self.survey is None else self.survey.repeats
        return self.lengths, self.prepared.num_items, repeats

    @property
    def item_counts(self) -> np.ndarray:
        """(N,) int64 events of each item in `Parts.fit`."""
        return self._tally[0]

    def num_held(self, role: Role) -> int:
        """Held positions of a role."""
        return int(self._tally[1][role].sum())

    def held(self, role: Role, count: int) -> Held:
        """At most `count` of the held positions of a role, drawn over all pieces with the seed, in their order."""
        sizes = self._tally[1][role]
        ends = np.cumsum(sizes)
        picked = _draw(int(ends[-1]), count, self.settings.seed)
        owner = np.searchsorted(ends, picked, side="right")
        found = []
        for index in np.unique(owner) if len(picked) else [0]:
            parts = self.piece(index)
            here = picked[owner == index] - (ends[index] - sizes[index])
            found.append(Held.at(parts.all, getattr(parts, role)[here]))
        return Held.stack(found)

    @cached_property
    def _whole(self) -> Parts:
        return Parts(self.prepared.sequences(), self.settings)

    def _read(self, fragments: list[Fragment]) -> Parts:
        assert self.survey is not None
        sequences = read_fragments(self.prepared.uri, fragments)
        return Parts(sequences, self.settings, held=self.survey.held_out(self.settings), has_validation=self.has_validation)

    @cached_property
    def _tally(self) -> tuple[np.ndarray, dict[Role, np.ndarray]]:
        """One pass: events of the fit by item, and held positions of each piece by role."""
        counts = np.zeros(self.prepared.num_items, np.int64)
        sizes: dict[Role, np.ndarray] = {role: np.zeros(len(self), np.int64) for role in ("choice", "heldout")}
        for index in range(len(self)):
            parts = self.piece(index)
            counts += np.bincount(parts.fit.items, minlength=len(counts))
            for role, of_role in sizes.items():
                of_role[index] = len(getattr(parts, role))
        return counts, sizes


def _draw(total: int, count: int, seed: int) -> np.ndarray:
    """At most `count` of the numbers below `total`, ascending."""
    if total <= count:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, count, replace=False))
