"""The event log: what every implementation promises. The log is the truth; state is a view of it.

A record is a JSON object with a `kind`:
    event    user_id, item_id, event, timestamp, value, event_id, session_id, recommendation_id, position, properties
    item     item_id, attributes (null values remove a column), replace
    item_delete  item_id
    user     user_id, attributes, replace
    erase    user_key (hex), at
    impression   recommendation_id, user_id, items, scores, version, at
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from raysys import storage
from raysys.errors import ConfigError

Record = dict[str, Any]


@dataclass(frozen=True)
class Span:
    """Where a batch of records lies: bytes [start, stop) of one segment."""

    segment: str
    start: int
    stop: int


class EventLog(Protocol):
    """Append-only and durable; many writers, many readers."""

    def append(self, records: Sequence[Record]) -> Span:
        """Write records; they survive a crash of process and machine once this returns."""
        ...

    def read(self, after: str | None = None, limit: int = 10_000) -> tuple[list[Record], str]:
        """Up to `limit` records after an opaque offset (None: the beginning), and the offset after them."""
        ...

    def segments(self) -> list[str]:
        """Names of all segments."""
        ...

    def read_segment(self, segment: str, start: int) -> tuple[list[Record], int]:
        """All whole records of a segment from a byte position, and the position after them."""
        ...

    def close(self) -> None:
        """Release files."""
        ...


def open_log(uri: str, *, writable: bool = False) -> EventLog:
    """The event log at a location.

    Raises:
        ConfigError: no implementation for this kind of location.
    """
    if not storage.is_local(uri):
        raise ConfigError(f"events: expected a local folder (path or file://), got {uri!r}; other event logs are not built yet")
    from raysys.events.embedded_log import EmbeddedLog

    return EmbeddedLog(storage.resolve(uri)[1], writable=writable)
