"""Batches of user sequences with little padding: windows, sorted by length in buckets.

Short histories may be repeated in the room that longer ones need (repeated padding, Dang et al., "Repeated Padding for Sequential
Recommendation", RecSys 2024).

A pool is what is shuffled together: all of the data where it is in memory
(`InMemory`), some fragments of it where it is streamed (`stream.py`). A global
batch is determined by (seed, epoch, pool, index), never by who asks for it, so
any number of workers takes the same steps.

Legend: B sequences, T positions, W windows, G global batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from raysys.prepare.dataset import Sequences
from raysys.queries import gap_codes

BUCKET_BATCHES = 64
"""Batches whose windows are sorted by length together; more is less padding and less shuffling."""


@dataclass(frozen=True)
class Batch:
    """Inputs and next-item targets, left-aligned.

    Attributes:
        items, events: (B, T) int64; items padded with the number of items.
        gaps, waits: (B, T) int64 codes of how long after the event before it came, and how long before the target.
        targets: (B, T) int64 next item, -1 where there is none.
    """

    items: np.ndarray
    events: np.ndarray
    gaps: np.ndarray
    waits: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Pool:
    """The share of one rank in some global batches.

    Attributes:
        items: (E,) int32. events: (E,) int8. gaps: (E,) int8. Histories, flat.
        start, stop: (W,) int64 flat positions of this rank's windows, batch by batch.
        copies: (W,) int64, at least 1: how often each stands in its row, padding in between.
        first: (G+1,) int64; batch g has the windows `first[g]:first[g+1]`.
        num_targets: (G,) int64 targets of the whole global batch, over all ranks.
    """

    items: np.ndarray
    events: np.ndarray
    gaps: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    copies: np.ndarray
    first: np.ndarray
    num_targets: np.ndarray

    def __len__(self) -> int:
        return len(self.num_targets)

    def batch(self, index: int, padding: int, parts: int = 1) -> list[Batch]:
        """One global batch's share, cut into `parts` for gradient accumulation.

        Args:
            index: of the batch in [0, G).
            padding: item row of padding.
            parts: batches that together are the share; some may be empty.
        """
        share = slice(self.first[index], self.first[index + 1])
        start, stop, copies = self.start[share], self.stop[share], self.copies[share]
        # Every parts-th one: neighbours have like lengths, so that the parts are alike too.
        return [_pad(self, start[part::parts], stop[part::parts], copies[part::parts], padding) for part in range(parts)]

    def compact(self) -> "Pool":
        """The same with nothing but this rank's windows, to be sent from where pools are cut to where they are used."""
        lengths = self.stop - self.start
        stop = np.cumsum(lengths)
        start = stop - lengths
        take = np.arange(lengths.sum()) + np.repeat(self.start - start, lengths)
        return Pool(self.items[take], self.events[take], self.gaps[take], start, stop, self.copies, self.first, self.num_targets)


@dataclass(frozen=True)
class Cut:
    """How histories are cut into global batches, and whose share of them is wanted.

    Attributes:
        max_length: inputs a row.
        batch_size: windows a global batch.
        seed: of order and cuts.
        repeat_short: give each window as many copies as a draw says, evenly from 1 to what `max_length` has room for.
        rank: this worker.
        world_size: number of workers; together they get what one would.
    """

    max_length: int
    batch_size: int
    seed: int = 0
    repeat_short: bool = False
    rank: int = 0
    world_size: int = 1


class Source(Protocol):
    """Where training histories come from."""

    def pools(self, cut: Cut, *, epoch: int, first: int = 0) -> Iterator[Pool]:
        """One epoch's pools from number `first` on; the same arguments give the same batches.

        Args:
            cut: how, and for whom.
            epoch: another one is another order.
            first: pools to leave out at the start, where training goes on in the middle of an epoch.
        """
        ...

    def num_windows(self, max_length: int) -> int:
        """About how many windows an epoch has."""
        ...

    def close(self) -> None:
        """No further epoch is wanted; whatever works ahead stops."""
        ...


@dataclass(frozen=True)
class InMemory:
    """All histories in the worker's memory, as one pool: the cheapest source where they fit."""

    sequences: Sequences

    def pools(self, cut: Cut, *, epoch: int, first: int = 0) -> Iterator[Pool]:
        """See `Source`."""
        if first == 0:
            yield cut_pool(self.sequences, cut, pool_rng(cut.seed, epoch, 0))

    def num_windows(self, max_length: int) -> int:
        """See `Source`."""
        return num_windows(np.diff(self.sequences.indptr), max_length)

    def close(self) -> None:
        """See `Source`; nothing works ahead."""


def pool_rng(seed: int, epoch: int, pool: int) -> np.random.Generator:
    """What cuts and shuffles a pool."""
    return np.random.default_rng([seed, epoch, pool])


def windows(sequences: Sequences, max_length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cut every history into windows of at most `max_length` inputs with a next item each.

    Together the windows hold every next item once. Histories that are longer are
    cut at random places, so that over the epochs a position is seen with contexts
    of many lengths.

    Returns:
        starts (W,) and stops (W,) int64 flat positions; a window holds `stop - start - 1` training positions.
    """
    first, last = sequences.indptr[:-1], sequences.indptr[1:]
    num_targets = np.maximum(last - first - 1, 0)
    # Only the newest window varies in length: a shift instead would drop the newest events, the ones most like those to come.
    newest = np.where(num_targets > max_length, rng.integers((max_length + 1) // 2, max_length + 1, len(first)), max_length)
    older = -(-np.maximum(num_targets - newest, 0) // max_length)
    counts = np.where(num_targets > 0, 1 + older, 0)
    row = np.repeat(np.arange(len(first)), counts)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    stop = last[row] - np.where(nth > 0, newest[row] + (nth - 1) * max_length, 0)
    start = np.maximum(stop - 1 - np.where(nth > 0, max_length, newest[row]), first[row])
    return start, stop


def cut_pool(sequences: Sequences, cut: Cut, rng: np.random.Generator) -> Pool:
    """All windows of some histories in random order, dealt out over the ranks batch by batch.

    Every rank draws the same windows in the same order (same `rng` state).

    Args:
        sequences: the histories.
        cut: how, and for whom.
        rng: of cuts, copies and order; see `pool_rng`.
    """
    batch_size = cut.batch_size
    start, stop = windows(sequences, cut.max_length, rng)
    inputs = stop - start - 1
    copies = rng.integers(1, (cut.max_length + 1) // (inputs + 1), endpoint=True) if cut.repeat_short else np.ones_like(start)
    room = copies * (inputs + 1)
    order = rng.permutation(len(start))
    groups = []
    for first in range(0, len(order), batch_size * BUCKET_BATCHES):
        bucket = order[first : first + batch_size * BUCKET_BATCHES]
        bucket = bucket[np.argsort(room[bucket], kind="stable")]
        groups += [bucket[at : at + batch_size] for at in range(0, len(bucket), batch_size)]
    groups = [groups[index] for index in rng.permutation(len(groups))]
    num_targets = np.array([(copies * inputs)[group].sum() for group in groups], np.int64)
    shares = [group[cut.rank :: cut.world_size] for group in groups]
    mine = np.concatenate([*shares, np.zeros(0, np.int64)]).astype(np.int64)
    first_of = np.concatenate([[0], np.cumsum([len(share) for share in shares])]).astype(np.int64)
    gaps = gap_codes(sequences.times, sequences.indptr)
    return Pool(sequences.items, sequences.events, gaps, start[mine], stop[mine], copies[mine], first_of, num_targets)


def _pad(pool: Pool, start: np.ndarray, stop: np.ndarray, copies: np.ndarray, padding: int) -> Batch:
    stride = stop - start  # inputs of a copy, and the padding that keeps its last from being followed by the first of the next
    columns = np.arange((copies * stride - 1).max(initial=0))
    place = columns[None, :] % stride[:, None]
    real = (columns[None, :] < (copies * stride)[:, None]) & (place < stride[:, None] - 1)
    take = (start[:, None] + place)[real]

    def matrix(values: np.ndarray, padding: int) -> np.ndarray:
        padded = np.full(real.shape, padding, np.int64)
        padded[real] = values
        return padded

    return Batch(
        matrix(pool.items[take], padding),
        matrix(pool.events[take], 0),
        matrix(pool.gaps[take], 0),
        matrix(pool.gaps[take + 1], 0),
        matrix(pool.items[take + 1], -1),
    )


def num_windows(lengths: np.ndarray, max_length: int, users: np.ndarray | int = 1) -> int:
    """About how many windows histories of these lengths have, `users` of each; exact where none is longer than `max_length`."""
    return int((np.ceil(np.maximum(lengths - 1, 0) / max_length) * users).sum())
