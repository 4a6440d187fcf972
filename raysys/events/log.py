"""The event log: what every implementation promises. The log is the truth; state is a view of it.

A log is a set of segments. One writer appends to a segment, so a position in it
(a whole number that only grows) says "everything before this" without gaps,
however many writers there are. A file is a segment, a Redis stream is one, and a
partition of Kafka that one writer holds would be.

A record is a JSON object with a `kind`; `received` and `at` are the service's clock, UTC epoch seconds:
    event        user_id, item_id, event, timestamp, value, event_id, session_id, recommendation_id, position, properties, received
    item         item_id, attributes (null values remove a column), replace, received
    item_delete  item_id, received
    user         user_id, attributes, replace, received
    erase        user_key (hex), at
    impression   recommendation_id, user_id, items, positions, scores, propensities, version, strategy, at
"""

import base64
import math
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import orjson

from raysys import storage
from raysys.errors import ConfigError, StateError
from raysys.events.identity import user_key

Record = dict[str, Any]
Tombstones = Mapping[bytes, float]
"""User key -> when that user was erased; whatever the user did until then is never read again."""
READ_AT_ONCE = 10_000
CONSUMER_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")


@dataclass(frozen=True)
class Span:
    """Where a batch of records lies: positions [start, stop) of one segment."""

    segment: str
    start: int
    stop: int


@dataclass(frozen=True)
class SegmentInfo:
    """What retention needs to know of a segment.

    Attributes:
        name: sorts by the time when the segment was begun.
        stop: position after its last record.
        num_bytes: room it takes.
        written: when something was last appended, UTC epoch seconds.
        living: its writer may append to it; such a segment is never dropped.
    """

    name: str
    stop: int
    num_bytes: int
    written: float
    living: bool


class EventLog(ABC):
    """Append-only and durable; many writers, many readers. A new kind of log implements the abstract part and nothing elsewhere."""

    @abstractmethod
    def append(self, records: Sequence[Record]) -> Span:
        """Write records; they survive a crash of process and machine once this returns.

        An `erase` record is a tombstone too, before it is a record: see `tombstones`.

        Raises:
            StateError: they could not be written. A part may come back at the next open, which event ids make harmless.
        """

    @abstractmethod
    def segments(self) -> list[str]:
        """Names of all segments, oldest first."""

    @abstractmethod
    def read_raw(self, segment: str, start: int, limit: int | None = None) -> tuple[list[Record], int]:
        """Whole records of a segment from a position on, erased users too, and the position after them; nothing where it was dropped."""

    @abstractmethod
    def describe(self) -> list[SegmentInfo]:
        """All segments, oldest first."""

    @abstractmethod
    def drop(self, segment: str) -> None:
        """Remove a segment that nobody writes to."""

    @abstractmethod
    def tombstones(self) -> Tombstones:
        """Every erasure so far; as fresh as the last one that was answered."""

    @abstractmethod
    def overwrite_erased(self) -> int:
        """Overwrite what erased users left in the segments, living ones included; positions stay. How many records that were."""

    @abstractmethod
    def commit(self, consumer: str, offset: str) -> None:
        """Remember how far a named consumer has come; retention waits for it."""

    @abstractmethod
    def consumers(self) -> dict[str, str]:
        """Name -> committed offset."""

    @abstractmethod
    def remove_consumer(self, consumer: str) -> None:
        """Forget a consumer, so that retention no longer waits for it."""

    @abstractmethod
    def exclusive(self, task: str) -> AbstractContextManager[None]:
        """Hold a named lock of this log, on whatever node, until the block ends or the process dies.

        Raises:
            StateError: somebody holds it.
        """

    @abstractmethod
    def close(self) -> None:
        """Release files and connections."""

    def committed(self, consumer: str) -> str | None:
        """Offset of a named consumer; None for one that never committed."""
        return self.consumers().get(consumer)

    def read_segment(self, segment: str, start: int, limit: int | None = None) -> tuple[list[Record], int]:
        """Like `read_raw`, without what erased users did before they were erased."""
        records, stop = self.read_raw(segment, start, limit)
        tombstones = self.tombstones() if records else {}
        if tombstones:
            records = [record for record in records if not is_erased(record, tombstones)]
        return records, stop

    def read(self, after: str | None = None, limit: int = READ_AT_ONCE) -> tuple[list[Record], str]:
        """About `limit` records at most after an opaque offset (None: the beginning), and the offset after them.

        Records of one segment come in order, segments one after the other. No records means that the log ends here.
        """
        positions = decode_offset(after)
        records: list[Record] = []
        segments = self.segments()
        for segment in segments:
            while len(records) < limit:
                start = positions.get(segment, 0)
                found, positions[segment] = self.read_segment(segment, start, limit - len(records))
                records += found
                if positions[segment] == start:
                    break
        return records, encode_offset({segment: positions[segment] for segment in segments if positions.get(segment)})


def is_erased(record: Record, tombstones: Tombstones) -> bool:
    """Whether a record belongs to what a user did before being erased, or has been overwritten for that reason."""
    if record.get("kind") == "erased":
        return True
    user_id = record.get("user_id")
    if user_id is None:
        return False
    return moment(record) <= tombstones.get(user_key(user_id), -math.inf)


def moment(record: Record) -> float:
    """When the service took a record in, UTC epoch seconds; infinitely late where it does not say."""
    return float(record["received"] if "received" in record else record.get("at", math.inf))


def encode_offset(positions: Mapping[str, int]) -> str:
    """Positions by segment as opaque text; the same positions give the same text."""
    return base64.urlsafe_b64encode(zlib.compress(orjson.dumps(dict(positions), option=orjson.OPT_SORT_KEYS))).decode()


def decode_offset(offset: str | None) -> dict[str, int]:
    """The positions in an offset; none for None.

    Raises:
        StateError: it is not an offset.
    """
    if offset is None:
        return {}
    try:
        return orjson.loads(zlib.decompress(base64.urlsafe_b64decode(offset)))
    except (ValueError, zlib.error):
        raise StateError(f"event log offset {offset[:40]!r} is not one that this log gave out") from None


def checked_consumer(name: str) -> str:
    """A consumer's or a lock's name.

    Raises:
        StateError: it would not do as a file name.
    """
    if not CONSUMER_NAME.fullmatch(name):
        raise StateError(f"expected a consumer name of 1 to 64 letters, digits, '.', '_' and '-', got {name[:80]!r}")
    return name


def open_log(uri: str, *, writable: bool = False) -> EventLog:
    """The event log at a location: a local folder, or `redis://host:port/db`.

    Raises:
        ConfigError: no implementation for this kind of location.
        StateError: it cannot be opened, or a server there would lose acknowledged events.
    """
    if storage.is_local(uri):
        from raysys.events.embedded_log import EmbeddedLog

        return EmbeddedLog(storage.resolve(uri)[1], writable=writable)
    if is_redis(uri):
        from raysys.events.redis_log import RedisLog

        return RedisLog(uri, writable=writable)
    raise ConfigError(f"events: expected a local folder (path or file://) or redis://host:port/db, got {uri!r}")


def is_redis(uri: str) -> bool:
    """Whether a location is a Redis server."""
    return uri.startswith(("redis://", "rediss://", "unix://"))
