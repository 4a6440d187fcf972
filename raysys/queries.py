"""A batch of users as the models see them. Below models and prepare, so that both may use it.

Legend: B queries, L events of all histories together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

GAP_CODES = 32
"""Codes of lengths of time; the last one begins at 34 years."""


def time_codes(seconds: np.ndarray) -> np.ndarray:
    """Lengths of time on a scale of powers of two.

    Args:
        seconds: (L,) int64; negative ones count as 0.

    Returns:
        (L,) int8: 1 + log2(1 + seconds) rounded down, at most GAP_CODES - 1.
    """
    return (1 + np.log2(1.0 + seconds.clip(min=0)).astype(np.int64)).clip(max=GAP_CODES - 1).astype(np.int8)


def gap_codes(times: np.ndarray, indptr: np.ndarray) -> np.ndarray:
    """How long each event came after the one before it, on a scale of powers of two.

    Args:
        times: (L,) int64 seconds, in order within a history.
        indptr: (B+1,) int64; history b is `times[indptr[b]:indptr[b+1]]`.

    Returns:
        (L,) int8: 0 for the first event of a history, else the `time_codes` of the gap.
    """
    codes = time_codes(np.diff(times, prepend=times[:1]))
    codes[indptr[:-1][np.diff(indptr) > 0]] = 0
    return codes


@dataclass(frozen=True)
class Queries:
    """A batch of users as the models see them: ragged histories, oldest event first.

    Attributes:
        items: (L,) int32 item rows in [0, N).
        events: (L,) int8 event type codes (position in the bundle's list of events).
        times: (L,) int64 UTC epoch seconds (an ordinal where the data has order only).
        values: (L,) float32 what came with the event (a rating, seconds, a price), NaN where nothing did.
        indptr: (B+1,) int64; history b is `items[indptr[b]:indptr[b+1]]`.
        now: (B,) int64 time of the request, in the unit of `times`.
    """

    items: np.ndarray
    events: np.ndarray
    times: np.ndarray
    values: np.ndarray
    indptr: np.ndarray
    now: np.ndarray

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(B,) int64 number of events of each history."""
        return np.diff(self.indptr)

    @property
    def rows(self) -> np.ndarray:
        """(L,) int64 the query each event belongs to."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def gaps(self) -> np.ndarray:
        """(L,) int8; see `gap_codes`."""
        return gap_codes(self.times, self.indptr)

    @property
    def waits(self) -> np.ndarray:
        """(L,) int8 `time_codes` from each event to the next one of the history, from the last one to the request."""
        filled = self.lengths > 0
        last = self.indptr[1:][filled] - 1
        waits = np.diff(self.times, append=self.times[-1:])
        waits[last] = self.now[filled] - self.times[last]
        return time_codes(waits)

    def __getitem__(self, index: slice) -> "Queries":
        """A contiguous sub-batch."""
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"expected a contiguous slice, got step {step}")
        first, last = self.indptr[start], self.indptr[max(start, stop)]
        return Queries(
            self.items[first:last],
            self.events[first:last],
            self.times[first:last],
            self.values[first:last],
            self.indptr[start : max(start, stop) + 1] - first,
            self.now[start:stop],
        )

    def last(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The last events of each history as a matrix, left-aligned.

        Args:
            length: T, events a query at most.

        Returns:
            (B, T) int64 positions in the flat arrays, any valid one at padding (0 where there are no events at all), and (B, T) bool
            where they are real; T is at least 1.
        """
        lengths = np.minimum(self.lengths, length)
        columns = np.arange(max(1, int(lengths.max(initial=0))))
        real = columns[None, :] < lengths[:, None]
        at = (self.indptr[1:] - lengths)[:, None] + columns[None, :]
        return np.where(real, at, 0), real

    def take(self, rows: np.ndarray) -> "Queries":
        """Any queries of the batch, in any order."""
        lengths = self.lengths[rows]
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        at = np.arange(indptr[-1]) + np.repeat(self.indptr[rows] - indptr[:-1], lengths)
        return Queries(self.items[at], self.events[at], self.times[at], self.values[at], indptr, self.now[rows])

    @classmethod
    def stack(cls, parts: Sequence["Queries"]) -> "Queries":
        """The queries of one or more batches, one batch after the other."""
        items, events, times, values, now = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("items", "events", "times", "values", "now")
        )
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(items, events, times, values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), now)

    @classmethod
    def from_lists(
        cls,
        items: Sequence[Sequence[int]],
        events: Sequence[Sequence[int]] | None = None,
        times: Sequence[Sequence[int]] | None = None,
        now: Sequence[int] | None = None,
        values: Sequence[Sequence[float]] | None = None,
    ) -> "Queries":
        """Build a batch from one list of item rows a user (defaults: code 0, time = position, no values)."""
        lengths = np.array([len(history) for history in items], dtype=np.int64)
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

        def flat(lists: Sequence[Sequence[float]], dtype: Any) -> np.ndarray:
            return np.array([value for row in lists for value in row], dtype=dtype)

        flat_times = flat(times, np.int64) if times is not None else np.arange(indptr[-1]) - np.repeat(indptr[:-1], lengths)
        return cls(
            flat(items, np.int32),
            flat(events, np.int8) if events is not None else np.zeros(indptr[-1], np.int8),
            flat_times.astype(np.int64),
            flat(values, np.float32) if values is not None else np.full(indptr[-1], np.nan, np.float32),
            indptr,
            np.array(now, np.int64) if now is not None else lengths.astype(np.int64),
        )
