"""Batches of user sequences with little padding: windows, sorted by length in buckets.

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


def num_windows(sequences: Sequences, max_length: int) -> int:
    """About how many windows an epoch has; exact where no history is longer than `max_length`."""
    targets = np.maximum(np.diff(sequences.indptr) - 1, 0)
    return int(np.ceil(targets / max_length).sum())
