"""Online state: what an answer needs to know now. A view of the log that may be rebuilt from it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from raysys import storage
from raysys.errors import ConfigError
from raysys.events.log import Record, Span, Tombstones, is_redis
from raysys.schema import HistoryEvent


@dataclass(frozen=True)
class StateLimits:
    """Bounds of what is kept; memory and disk follow from them."""

    max_events: int = 500
    """Last events kept a user and a session."""
    max_seen: int = 10_000
    """Items kept a user as seen; beyond it those of longest ago are forgotten."""
    session_window_s: float = 30 * 86400.0
    """How long a session without events is kept, seconds."""
    event_id_window_s: float = 7 * 86400.0
    """How long an `event_id` is remembered to recognise a duplicate, seconds."""
    max_bytes: int = 8 << 30
    """Largest size of the embedded store, bytes (address space, not disk, is taken at once)."""


@dataclass(frozen=True)
class ItemState:
    """What has been said about an item since the bundle was made.

    Attributes:
        attributes: columns set since then; they win over the bundle's. A None value removes the column.
        deleted: never to be recommended again.
        sequence: position in the order of changes.
    """

    attributes: dict[str, Any] = field(default_factory=dict)
    deleted: bool = False
    sequence: int = 0


class UserState(Protocol):
    """Reads are of the last commit of any process; `apply` is the only way to write."""

    def apply(self, records: Sequence[Record], span: Span) -> list[bool]:
        """Fold records in, once: a span that was applied before changes nothing.

        Returns:
            For each record, False where it was an event seen before (by `event_id`).

        Raises:
            StateBehind: earlier records of the segment are missing here (the state was lost or restored); replay the log.
        """
        ...

    def bury(self, tombstones: Tombstones) -> None:
        """Forget users before a replay: the log no longer returns what they did, whatever the order of its segments."""
        ...

    def applied(self, segment: str) -> int:
        """Byte position in a log segment up to which records are folded in."""
        ...

    def known_event(self, event_id: str) -> bool:
        """Whether an event with this id is inside the window."""
        ...

    def history(self, user_id: str) -> list[HistoryEvent]:
        """Last events, oldest first."""
        ...

    def session_history(self, session_id: str) -> list[HistoryEvent]:
        """Last events of an anonymous or known session, oldest first."""
        ...

    def user(self, user_id: str) -> dict[str, Any] | None:
        """Attributes, or None when nothing was ever set."""
        ...

    def counters(self, user_id: str) -> dict[str, int]:
        """Events of a user by type, since the log began."""
        ...

    def seen(self, user_id: str, kinds: Collection[str] | None = None) -> set[str]:
        """Items that a user did something with, also beyond the last events; with `kinds` only by events of these types."""
        ...

    def erased_at(self, user_id: str) -> float | None:
        """When a user was erased, UTC epoch seconds: what bundles say about such a user must be ignored. None when never."""
        ...

    def item(self, item_id: str) -> ItemState | None:
        """What is known beyond the bundle."""
        ...

    def item_sequence(self) -> int:
        """Number of the last item change."""
        ...

    def items_since(self, sequence: int) -> list[tuple[str, ItemState]]:
        """Items changed after a sequence number, in order of change."""
        ...

    def popular(self, k: int) -> list[str]:
        """Item ids with most events since the log began, best first."""
        ...

    def close(self) -> None:
        """Release the store."""
        ...


def open_state(uri: str, limits: StateLimits | None = None, *, readonly: bool = False, patient: bool = True) -> UserState:
    """The online state at a location: a local folder, or `redis://host:port/db`.

    Args:
        uri: the location.
        limits: bounds.
        readonly: only read; an embedded store must exist.
        patient: wait some seconds for a server that restarts; an answer does not.

    Raises:
        ConfigError: no implementation for this kind of location.
        StateError: it cannot be opened.
    """
    limits = limits or StateLimits()
    if storage.is_local(uri):
        from raysys.events.embedded_state import EmbeddedState

        return EmbeddedState(storage.resolve(uri)[1], limits, readonly=readonly)
    if is_redis(uri):
        from raysys.events.redis_state import RedisState

        return RedisState(uri, limits, patient=patient)
    raise ConfigError(f"state: expected a local folder (path or file://) or redis://host:port/db, got {uri!r}")
