"""Requests of the HTTP API, checked. What is refused is named, with what was expected.

Names follow Gorse, Metarank, Personalize and Recombee. Answers are plain dicts
built in `recommender.py` (they are on the hot path); `AnswerBody` describes them for the docs.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from raysys.schema import DEFAULT_EVENT


@dataclass(frozen=True)
class Limits:
    """Bounds on a request; each is stated in the message that refuses one."""

    max_n: int = 200
    """Items an answer."""
    max_offset: int = 1000
    """Items skipped by `offset`."""
    max_history: int = 1000
    """Events of an inline history."""
    max_list: int = 10_000
    """Ids in `exclude`, `include` and `candidates`."""
    max_batch: int = 5000
    """Records of one batch."""
    max_body_bytes: int = 4 << 20
    """Bytes of a request body."""
    max_bodies_bytes: int = 64 << 20
    """Bytes of all bodies that a replica holds at once; more requests are shed."""
    max_id_length: int = 400
    """Bytes of an id in UTF-8."""
    max_future_s: float = 86_400.0
    """How far a timestamp may lie ahead, seconds; one that does counts as now."""
    min_timestamp_s: float = 631_152_000.0
    """Earliest timestamp, epoch seconds: 1990, as in `prepare`."""


LIMITS = Limits()


def _as_id(value: Any) -> Any:
    """Ids are strings; clients with numeric keys may send integers."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _short_enough(value: str) -> str:
    """Bytes count, not characters: they are what keys of the state have room for."""
    if len(value.encode()) > LIMITS.max_id_length:
        raise ValueError(f"expected an id of 1 to {LIMITS.max_id_length} bytes, got {len(value.encode())}")
    return value


Id = Annotated[str, BeforeValidator(_as_id), AfterValidator(_short_enough), Field(min_length=1)]


def parse_time(value: Any) -> float:
    """Epoch seconds from seconds, milliseconds, microseconds or ISO 8601 (UTC when it names no zone).

    Raises:
        ValueError: saying what was expected.
    """
    expected = "expected an ISO 8601 time, or epoch seconds or milliseconds"
    if isinstance(value, bool) or value is None:
        raise ValueError(f"{expected}, got {value!r}")
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            try:
                value = float(value)
            except ValueError:
                raise ValueError(f"{expected}, got {value!r}") from None
        else:
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if not isinstance(value, (int, float)) or not 0 <= value < 1e17:
        raise ValueError(f"{expected}, got {value!r}")
    seconds = float(value)
    return seconds / 1e6 if seconds > 1e14 else seconds / 1e3 if seconds > 1e11 else seconds


Time = Annotated[float, BeforeValidator(parse_time)]


class Strict(BaseModel):
    """Refuses fields it does not know, by name."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, allow_inf_nan=False)


class HistoryItem(Strict):
    """One event of an inline history."""

    item_id: Id
    event: str = Field(DEFAULT_EVENT, min_length=1, max_length=64)
    timestamp: Time | None = None
    value: float | None = None


class _Asking(Strict):
    user_id: Id | None = None
    session_id: Id | None = None
    history: list[HistoryItem | Id] | None = Field(
        None, max_length=LIMITS.max_history, description="inline events or item ids, oldest first"
    )
    scenario: str | None = Field(None, max_length=64)
    context: dict[str, str | int | float | bool | None] | None = Field(None, max_length=64)
    explain: bool = False
    return_metadata: bool = False
    debug: bool = False


class RecommendBody(_Asking):
    """`POST /v1/recommend`."""

    n: int = Field(10, ge=1, le=LIMITS.max_n, validation_alias=AliasChoices("n", "k", "top_k"))
    offset: int = Field(0, ge=0, le=LIMITS.max_offset)
    exclude: list[Id] = Field(default_factory=list, max_length=LIMITS.max_list)
    include: list[Id] | None = Field(None, max_length=LIMITS.max_list, description="answer only from these items")
    exclude_seen: bool | list[str] = Field(True, description="true, false, or the event types that count as seen")
    filter: dict[str, Any] = Field(default_factory=dict, max_length=32, description="attribute rules: equals, in, any, range, not")
    diversity: float = Field(0.0, ge=0.0, le=1.0)

    @model_validator(mode="before")
    @classmethod
    def _one_name_for_n(cls, values: Any) -> Any:
        if isinstance(values, dict) and len(given := [name for name in ("n", "k", "top_k") if name in values]) > 1:
            raise ValueError(f"expected one of n, k and top_k, got {' and '.join(given)}")
        return values


class RankBody(_Asking):
    """`POST /v1/rank`."""

    candidates: list[Id] = Field(min_length=1, max_length=LIMITS.max_list)


class EventBody(Strict):
    """One event."""

    user_id: Id
    item_id: Id
    event: str = Field(DEFAULT_EVENT, min_length=1, max_length=64, validation_alias=AliasChoices("event", "event_type"))
    event_id: Id | None = None
    timestamp: Time | None = None
    value: float | None = None
    session_id: Id | None = None
    recommendation_id: str | None = Field(None, max_length=128)
    position: int | None = Field(None, ge=0)
    properties: dict[str, Any] | None = Field(None, max_length=64)


class EventsBody(Strict):
    """A batch of events."""

    events: list[EventBody] = Field(min_length=1, max_length=LIMITS.max_batch)


class NamedItem(BaseModel):
    """One item of a bulk write: its id and any attributes."""

    model_config = ConfigDict(extra="allow")

    item_id: Id


class ItemsBody(Strict):
    """`POST /v1/items`."""

    items: list[NamedItem] = Field(min_length=1, max_length=LIMITS.max_batch)


class ReasonBody(BaseModel):
    """Why an item is there."""

    kind: str
    item_id: str | None = None
    text: str


class ItemBody(BaseModel):
    """One answered item."""

    item_id: str
    rank: int
    score: float | None
    probability: float | None = Field(description="P(positive event | shown); null where it is not calibrated")
    sources: list[str]
    reasons: list[ReasonBody] | None = None
    metadata: dict[str, Any] | None = None


class AnswerBody(BaseModel):
    """Answer of recommend, rank and similar."""

    recommendation_id: str
    user_id: str | None
    model_version: str | None
    strategy: str = Field(description="personalized, session, cold_start or fallback")
    degraded: bool
    degraded_reason: str | None = None
    ab_group: str | None = None
    items: list[ItemBody]
    stages: dict[str, float] | None = None


class EventsAnswer(BaseModel):
    """Answer of `POST /v1/events`."""

    accepted: int
    duplicates: int
    rejected: list[dict[str, Any]]


class ErrorBody(BaseModel):
    """The one shape of errors: {"error": {"type", "field", "message"}}."""

    error: dict[str, Any]
