"""What one request carries along: until when an answer is due, what each stage took, and the list as it grows.

Legend: n items of the list.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from raysys.errors import SchemaError

DEADLINE_HEADER = "X-Deadline-Ms"
MAX_DEADLINE_MS = 60_000


@dataclass(frozen=True)
class Budget:
    """Time limits of one request, seconds."""

    whole_s: float = 3.0
    """From its arrival to its answer, where the client does not say; what is left of it bounds every stage."""
    retrieval_s: float = 2.0
    ranking_s: float = 1.0


@dataclass(frozen=True)
class Deadline:
    """When an answer is due; no stage is waited for beyond it.

    Args:
        at: on the clock of `time.monotonic`.
    """

    at: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        """So many seconds from now."""
        return cls(time.monotonic() + seconds)

    @classmethod
    def of(cls, header: str | None) -> "Deadline | None":
        """What a client asks for in DEADLINE_HEADER; None when it says nothing.

        Raises:
            SchemaError: not a whole number of milliseconds in range.
        """
        if header is None:
            return None
        if not header.isascii() or not header.isdecimal() or not 1 <= int(header[:9]) <= MAX_DEADLINE_MS or len(header) > 9:
            raise SchemaError(f"{DEADLINE_HEADER}: expected whole milliseconds from 1 to {MAX_DEADLINE_MS}, got {header[:20]!r}")
        return cls.after(int(header) / 1000)

    @property
    def left_s(self) -> float:
        """Seconds left, negative when it has passed."""
        return self.at - time.monotonic()


class Stages:
    """Milliseconds of each stage, and since the start."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}
        self._first = self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        """What went by since the last mark was this stage."""
        now = time.perf_counter()
        self.milliseconds[name] = round((now - self._last) * 1000, 3)
        self._last = now

    @property
    def whole_ms(self) -> float:
        """Since the request was read."""
        return (time.perf_counter() - self._first) * 1000


@dataclass(frozen=True)
class Lack:
    """Why an answer is less than it could be."""

    kind: str
    """state, user_key, ranking, retrieval or no_model: what the metrics count."""
    text: str
    """What the client reads in `degraded_reason`."""


@dataclass
class Ranked:
    """The list of an answer, best first."""

    by: str
    """What put it in order: ranking, retrieval, covisit, content or popularity."""
    item_ids: list[str] = field(default_factory=list)
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """(n,) int64 item rows, -1 for items that the bundle does not know."""
    scores: list[float | None] = field(default_factory=list)
    probabilities: list[float | None] = field(default_factory=list)
    sources: list[list[str]] = field(default_factory=list)

    def append(self, item_id: str, row: int = -1, source: str | None = None, score: float | None = None) -> None:
        """One more item at the end."""
        self.item_ids.append(item_id)
        self.rows = np.append(self.rows, row)
        self.scores.append(score)
        self.probabilities.append(None)
        self.sources.append([source] if source else [])

    def with_rest(self, item_ids: Iterable[str]) -> "Ranked":
        """This list, and behind it those of these items that are not in it, without a score."""
        placed = set(self.item_ids)
        for item_id in item_ids:
            if item_id not in placed:
                self.append(item_id)
        return self
