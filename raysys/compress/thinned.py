"""Histories with events left out, other ones in every epoch: what follows in them is in nobody's memory.

Teachers know the histories that they have learnt from, and the next event of each, by heart; their distributions there say little more
than that event. On histories that never were, they say what they think.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from raysys.prepare.dataset import Sequences
from raysys.train.batches import Cut, InMemory, Pool, pool_rng


@dataclass(frozen=True)
class Thinned:
    """A `batches.Source` of thinned histories.

    Attributes:
        sequences: the whole ones.
        share: of the events, left out at random.
    """

    sequences: Sequences
    share: float

    def pools(self, cut: Cut, *, epoch: int, first: int = 0) -> Iterator[Pool]:
        """See `Source`."""
        kept = pool_rng(cut.seed, epoch, 1).random(len(self.sequences.items)) >= self.share
        return InMemory(self.sequences.where(kept)).pools(cut, epoch=epoch, first=first)

    def num_windows(self, max_length: int) -> int:
        """See `Source`; of the whole histories, so a little too many."""
        return InMemory(self.sequences).num_windows(max_length)

    def close(self) -> None:
        """See `Source`; nothing works ahead."""
