"""What may be dropped from a log: old segments that every named consumer has read. Knows any `EventLog`."""

from dataclasses import dataclass, field

from raysys.errors import ConfigError
from raysys.events.log import EventLog, decode_offset


@dataclass(frozen=True)
class Retention:
    """How much of a log is kept; nothing is dropped by a limit that is None.

    Attributes:
        max_age_s: segments last written to longer ago are dropped, seconds.
        max_bytes: the oldest segments are dropped until what is left is smaller, bytes.
        force: drop even what a consumer has not read; it is counted.
    """

    max_age_s: float | None = None
    max_bytes: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.max_age_s is not None and self.max_age_s <= 0 or self.max_bytes is not None and self.max_bytes < 0:
            raise ConfigError(f"retention: expected a positive age and size, got {self.max_age_s} s and {self.max_bytes} bytes")


@dataclass(frozen=True)
class Retained:
    """What a round of retention came to.

    Attributes:
        segments: dropped.
        num_bytes: freed.
        held: consumer -> segments that are kept only because it has not read them.
        unread: consumer -> records that were dropped although it had not read them (`force`).
    """

    segments: int = 0
    num_bytes: int = 0
    held: dict[str, int] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)


def retain(log: EventLog, limits: Retention, *, now: float) -> Retained:
    """Drop what is beyond the limits, oldest first; never a segment that is being written.

    Args:
        log: any.
        limits: see `Retention`.
        now: UTC epoch seconds.
    """
    segments = log.describe()
    positions = {name: decode_offset(offset) for name, offset in log.consumers().items()}
    total = sum(segment.num_bytes for segment in segments)
    dropped = freed = 0
    held: dict[str, int] = {}
    unread: dict[str, int] = {}
    for segment in segments:
        old = limits.max_age_s is not None and segment.written < now - limits.max_age_s
        many = limits.max_bytes is not None and total > limits.max_bytes
        if segment.living or not (old or many):
            continue
        waiting = [name for name, at in positions.items() if at.get(segment.name, 0) < segment.stop]
        if waiting and not limits.force:
            for name in waiting:
                held[name] = held.get(name, 0) + 1
            continue
        for name in waiting:
            unread[name] = unread.get(name, 0) + len(log.read_segment(segment.name, positions[name].get(segment.name, 0))[0])
        log.drop(segment.name)
        dropped, freed, total = dropped + 1, freed + segment.num_bytes, total - segment.num_bytes
    return Retained(dropped, freed, held, unread)
