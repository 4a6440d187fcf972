"""What becomes of written things: events, items and users, checked record by record."""

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from raysys.errors import SchemaError
from raysys.events.log import Record
from raysys.serve.api import LIMITS, EventBody

ATTRIBUTE_TYPES = (str, int, float, bool, list, type(None))
LIST_COLUMNS, TEXT_COLUMNS, RESERVED = ("categories",), ("title", "text"), ("item_id", "item_idx", "user_id", "num_train")


def check_events(body: Any, now: float) -> tuple[list[Record], list[dict]]:
    """Split a batch into records for the log and refusals.

    Args:
        body: parsed JSON: one event, or `{"events": [...]}`.
        now: UTC epoch seconds; stands in for a missing timestamp.

    Returns:
        Records, and `{index, field, reason}` for each refused event.

    Raises:
        SchemaError: the body as a whole is not what was expected.
    """
    events = body.get("events") if isinstance(body, dict) and "events" in body else [body]
    if isinstance(body, dict) and "events" in body and len(body) > 1:
        raise SchemaError(f"expected only 'events' beside a batch, got also {', '.join(sorted(set(body) - {'events'}))}")
    if not isinstance(events, list) or not events:
        raise SchemaError(f"events: expected a non-empty list of events, got {type(events).__name__}")
    if len(events) > LIMITS.max_batch:
        raise SchemaError(f"events: expected at most {LIMITS.max_batch} events a request, got {len(events)}; send several batches")
    records, rejected = [], []
    for index, event in enumerate(events):
        if not isinstance(event, dict):
            rejected.append({"index": index, "field": None, "reason": f"expected an object, got {type(event).__name__}"})
            continue
        try:
            checked = EventBody.model_validate(event)
        except ValidationError as error:
            field, reason = first_problem(error.errors())
            rejected.append({"index": index, "field": field, "reason": reason})
            continue
        stated = checked.timestamp if checked.timestamp is not None else now
        if implausible := _implausible(stated, now):
            rejected.append({"index": index, "field": "timestamp", "reason": implausible})
            continue
        record = {"kind": "event", **checked.model_dump(exclude_none=True), "timestamp": min(stated, now), "received": now}
        if stated > now:  # a clock that is ahead must not make this event the newest for hours
            record["stated"] = stated
        record.setdefault("event_id", uuid.uuid4().hex)
        records.append(record)
    return records, rejected


def _implausible(timestamp: float, now: float) -> str | None:
    """Why an event cannot have happened then; None where it can. Late ones are welcome: they take their place in the history."""
    if timestamp > now + LIMITS.max_future_s:
        return f"expected at most {LIMITS.max_future_s / 3600:g} h in the future, got {(timestamp - now) / 3600:.1f} h"
    if timestamp < LIMITS.min_timestamp_s:
        return f"expected epoch seconds of {LIMITS.min_timestamp_s:.0f} (1990) or later, got {timestamp:g}"
    return None


def first_problem(errors: list[Any]) -> tuple[str | None, str]:
    """(field, message) of the first error of pydantic, in our words."""
    problem = errors[0]
    path = [str(part) for part in problem["loc"] if part not in ("body",)]
    if problem["type"] == "extra_forbidden":
        return ".".join(path), f"unknown field {path[-1]!r}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return ".".join(path), "expected a value, the field is missing"
    got = problem.get("input")
    shown = "" if "got" in message or isinstance(got, (dict, list)) else f", got {str(got)[:80]!r}"
    return ".".join(path) or None, f"{message}{shown}"


def checked_id(value: Any, field: str) -> str:
    """An id from a path or a bulk write.

    Raises:
        SchemaError: it is empty, too long, or neither text nor a whole number.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not 0 < len(value.encode()) <= LIMITS.max_id_length:
        raise SchemaError(f"{field}: expected an id of 1 to {LIMITS.max_id_length} bytes, got {value!r:.80}")
    return value


def check_attributes(attributes: Any, *, what: str) -> dict[str, Any]:
    """Flat attributes of an item or a user.

    Raises:
        SchemaError: naming the attribute, what was expected and what came.
    """
    if not isinstance(attributes, dict):
        raise SchemaError(f"expected an object of {what} attributes, got {type(attributes).__name__}")
    for name, value in attributes.items():
        if name in RESERVED:
            raise SchemaError(f"{name}: expected an attribute, this name is reserved (the id stands in the path)")
        if not 0 < len(name) <= 128:
            raise SchemaError(f"{name[:40]}: expected an attribute name of 1 to 128 characters, got {len(name)}")
        if value is None:
            continue
        if not isinstance(value, ATTRIBUTE_TYPES):
            raise SchemaError(f"{name}: expected text, a number, true, false or a list, got {type(value).__name__}")
        if name in TEXT_COLUMNS and not isinstance(value, str):
            raise SchemaError(f"{name}: expected text, got {value!r}")
        if name in LIST_COLUMNS and not (isinstance(value, list) and all(isinstance(entry, str) for entry in value)):
            raise SchemaError(f"{name}: expected a list of strings, got {value!r}")
        if name == "available" and not isinstance(value, bool):
            raise SchemaError(f"available: expected true or false, got {value!r}")
        if isinstance(value, list) and not all(isinstance(entry, (str, int, float)) for entry in value):
            raise SchemaError(f"{name}: expected a list of strings or numbers, got {value!r}")
    return attributes


class ImpressionBuffer:
    """Impressions on their way to the log: gathered, so that no answer waits for the disk.

    Lost with the process at worst for `flush_s`; they are a record for learning, not a promise to a client.

    Args:
        send: takes a list of records.
        clock: UTC epoch seconds now; that of the erasures, which forget what was shown before them.
        flush_s: seconds between sends.
        limit: records kept at most; beyond it the oldest are dropped and counted.
    """

    def __init__(
        self, send: Callable[[list[Record]], None], *, clock: Callable[[], float] = time.time, flush_s: float = 0.5, limit: int = 20_000
    ):
        self._send, self._clock, self._flush_s = send, clock, flush_s
        self._records: deque[Record] = deque(maxlen=limit)
        self._last = time.monotonic()
        self.dropped = 0

    def add(self, answer: dict[str, Any]) -> None:
        """Note what was shown, where, and with which chance. Nothing explores yet, so what was shown was certain to be."""
        items = answer["items"]
        if not items:
            return
        self.dropped += len(self._records) == self._records.maxlen
        self._records.append(
            {
                "kind": "impression",
                "recommendation_id": answer["recommendation_id"],
                "user_id": answer["user_id"],
                "items": [item["item_id"] for item in items],
                "positions": [item["rank"] for item in items],
                "scores": [item["score"] for item in items],
                "propensities": [item.get("propensity", 1.0) for item in items],
                "version": answer["model_version"],
                "strategy": answer["strategy"],
                "at": self._clock(),
            }
        )
        if time.monotonic() - self._last >= self._flush_s:
            self.flush()

    def flush(self) -> None:
        """Send what is gathered."""
        self._last = time.monotonic()
        if self._records:
            records = list(self._records)
            self._records.clear()
            self._send(records)

    async def keep_flushing(self) -> None:
        """Send also what no later answer follows."""
        while True:
            await asyncio.sleep(self._flush_s)
            self.flush()
