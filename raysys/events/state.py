"""Online state: what an answer needs to know now. A view of the log that may be rebuilt from it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from raysys import storage
from raysys.errors import ConfigError
from raysys.events.log import Record, Span
from raysys.schema import HistoryEvent


@dataclass(frozen=True)
class StateLimits:
    """Bounds of what is kept; memory and disk follow from them."""

    max_events: int = 500
    """Last events kept a user and a session."""
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
        """
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

    def erased(self, user_id: str) -> bool:
        """Whether what older bundles say about this user must be ignored."""
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


def open_state(uri: str, limits: StateLimits | None = None, *, readonly: bool = False) -> UserState:
    """The online state at a location.

    Raises:
        ConfigError: no implementation for this kind of location.
    """
    if not storage.is_local(uri):
        raise ConfigError(f"state: expected a local folder (path or file://), got {uri!r}; other stores are not built yet")
    from raysys.events.embedded_state import EmbeddedState

    return EmbeddedState(storage.resolve(uri)[1], limits or StateLimits(), readonly=readonly)
