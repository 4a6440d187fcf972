"""Names and types of the data contract: columns, event types, split codes.

Knows nothing about files or models. `user_id` and `item_id` are strings and
live outside; `user_idx` and `item_idx` are dense rows and live inside.
"""

from dataclasses import dataclass, field

USER_ID = "user_id"
ITEM_ID = "item_id"
TIMESTAMP = "timestamp"
EVENT = "event"
VALUE = "value"
SESSION_ID = "session_id"
RECOMMENDATION_ID = "recommendation_id"
POSITION = "position"
PROPENSITY = "propensity"
EVENT_ID = "event_id"
USER_IDX = "user_idx"
ITEM_IDX = "item_idx"

REQUIRED_INTERACTION_COLUMNS = (USER_ID, ITEM_ID, TIMESTAMP)
OPTIONAL_INTERACTION_COLUMNS = (EVENT, VALUE, SESSION_ID, RECOMMENDATION_ID, POSITION, PROPENSITY, EVENT_ID)
DEFAULT_EVENT = "view"

UNKNOWN_ITEM = -1
"""`item_idx` of an item that the training window does not know."""

SPLIT_TRAIN, SPLIT_VALID, SPLIT_TEST = 0, 1, 2
SPLIT_CODES = {"train": SPLIT_TRAIN, "valid": SPLIT_VALID, "test": SPLIT_TEST}
SPLIT_KINDS = ("leave-one-out", "time", "none")

COLUMN_ALIASES = {
    "datetime": TIMESTAMP,
    "weight": VALUE,
    "rating": VALUE,
    "user": USER_ID,
    "item": ITEM_ID,
    "event_type": EVENT,
    "event_value": VALUE,
}
"""Neighbours' column names (RecTools, RecBole, Amazon Personalize), lower case, to ours."""


@dataclass(frozen=True)
class EventType:
    """What one kind of event means to the models."""

    weight: float = 1.0
    """Evidence of interest, relative to a view; scales counts, dimensionless."""
    positive: bool = False
    """True when the event is a positive target (a click, a purchase)."""
    min_value: float | None = None
    """If set, the event is positive only with `value >= min_value` (ratings)."""


DEFAULT_EVENT_TYPES: dict[str, EventType] = {
    "view": EventType(1.0),
    "impression": EventType(0.0),
    "skip": EventType(0.0),
    "click": EventType(1.0, positive=True),
    "play": EventType(1.0, positive=True),
    "read": EventType(1.0, positive=True),
    "like": EventType(2.0, positive=True),
    "cart": EventType(2.0, positive=True),
    "purchase": EventType(3.0, positive=True),
    "rating": EventType(1.0, positive=True, min_value=4.0),
}
OTHER_EVENT = "other"
"""Name behind event code 0: whatever the training window did not contain."""

NON_HISTORY_EVENTS = frozenset({"impression", "skip"})
"""Events that are logged and learnt from, but are not something the user did with an item."""


@dataclass(frozen=True)
class HistoryEvent:
    """One event of a user as serving sees it; `timestamp` in UTC epoch seconds."""

    item_id: str
    event: str = DEFAULT_EVENT
    timestamp: float = 0.0
    value: float | None = None
    properties: dict = field(default_factory=dict)
