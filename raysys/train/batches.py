"""Batches of user sequences with little padding: windows, length buckets, token budgets.

Legend: B sequences, T positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from raysys.prepare.dataset import Sequences

BUCKET_BATCHES = 64
"""Batches whose windows are sorted by length together; more is less padding and less shuffling."""


@dataclass(frozen=True)
class Batch:
    """Inputs and next-item targets, left-aligned.

    Attributes:
        items, events: (B, T) int64; items padded with the number of items.
        targets: (B, T) int64 next item, -1 where there is none.
        num_targets: real targets in the whole global batch, over all ranks.
    """

    items: np.ndarray
    events: np.ndarray
    targets: np.ndarray
    num_targets: int


def windows(sequences: Sequences, max_length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cut every history into windows of at most `max_length` inputs with a next item each.

    Histories that are longer are cut at a random phase, so that over the epochs
    every position is seen with contexts of many lengths.

    Returns:
        starts (W,) and stops (W,) int64 flat positions; a window holds `stop - start - 1` training positions.
    """
    starts, stops = [], []
    lengths = np.diff(sequences.indptr)
    short = (lengths >= 2) & (lengths <= max_length + 1)
    starts.append(sequences.indptr[:-1][short])
    stops.append(sequences.indptr[1:][short])
    for row in np.flatnonzero(lengths > max_length + 1):
        first, last = sequences.indptr[row], sequences.indptr[row + 1]
        # Counted from the end, so that with phase 0 the newest events fill a whole window.
        ends = np.arange(last - rng.integers(0, max_length // 2 + 1), first + 1, -max_length)
        starts.append(np.maximum(ends - max_length - 1, first))
        stops.append(ends)
    start, stop = np.concatenate(starts), np.concatenate(stops)
    keep = stop - start >= 2
    return start[keep], stop[keep]


def batches(
    sequences: Sequences,
    *,
    max_length: int,
    batch_size: int,
    padding: int,
    rng: np.random.Generator,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """One epoch in random order; each global batch is dealt out over the ranks.

    Every rank draws the same windows in the same order (same `rng` state), so
    `world_size` ranks together see exactly what one rank would.

    Args:
        sequences: training histories.
        max_length: inputs a window.
        batch_size: windows a global batch.
        padding: item row of padding.
        rng: consumed; seed it by (seed, epoch).
        rank: this worker.
        world_size: number of workers.
    """
    start, stop = windows(sequences, max_length, rng)
    order = rng.permutation(len(start))
    groups = []
    for first in range(0, len(order), batch_size * BUCKET_BATCHES):
        bucket = order[first : first + batch_size * BUCKET_BATCHES]
        bucket = bucket[np.argsort((stop - start)[bucket], kind="stable")]
        groups += [bucket[at : at + batch_size] for at in range(0, len(bucket), batch_size)]
    for index in rng.permutation(len(groups)):
        group = groups[index]
        num_targets = int((stop[group] - start[group] - 1).sum())
        mine = group[rank::world_size]
        yield _pad(sequences, start[mine], stop[mine], padding, num_targets)


def _pad(sequences: Sequences, start: np.ndarray, stop: np.ndarray, padding: int, num_targets: int) -> Batch:
    lengths = stop - start - 1
    columns = np.arange(lengths.max(initial=0))
    real = columns[None, :] < lengths[:, None]
    take = (start[:, None] + columns[None, :])[real]
    items = np.full(real.shape, padding, np.int64)
    events = np.zeros(real.shape, np.int64)
    targets = np.full(real.shape, -1, np.int64)
    items[real], events[real], targets[real] = sequences.items[take], sequences.events[take], sequences.items[take + 1]
    return Batch(items, events, targets, num_targets)
