"""Settings of `raysys prepare`. Knows no files and no Ray."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal

from raysys.errors import ConfigError
from raysys.schema import DEFAULT_EVENT_TYPES, EventType

MAX_PARTITIONS = 1 << 16
"""A row's partition is a 16-bit key of the sort that splits a chunk."""


@dataclass(frozen=True)
class PrepareConfig:
    """How raw events become sequences."""

    event_types: dict[str, EventType] = field(default_factory=dict)
    """Event name -> weight, positive, min_value; replaces the default of that name, others keep theirs."""
    valid_fraction: float = 0.1
    """`time` split: share of all interactions between training and test, in (0, 1)."""
    test_fraction: float = 0.1
    """`time` split: share of all interactions, the latest ones, in (0, 1)."""
    min_user_events: int = 0
    """Users with fewer events in the training part are left out (0 keeps all)."""
    min_item_events: int = 0
    """Items with fewer events in the training part lose those events and are not learnt (0 keeps all)."""
    time: Literal["auto", "utc", "ordinal"] = "auto"
    """What `timestamp` means; `auto` reads it from the data folder's dataset.json, else UTC."""
    min_timestamp: str = "1990-01-01"
    """Earlier events are quarantined as implausible; ISO date, UTC."""
    max_timestamp: str | None = None
    """Later events are quarantined as implausible; ISO date, UTC. None = one day after the run."""
    partitions: int = 0
    """Partitions of users, each handled by one task in memory; 0 = one for each `rows_per_partition`."""
    rows_per_partition: int = 2_000_000
    """Interactions a partition should hold; about 200 bytes of memory a row."""
    rows_per_chunk: int = 1_000_000
    """Interactions that one task reads and cleans; about 200 bytes of memory a row."""
    keep_raw: bool = True
    """Keep the cleaned events beside the sequences, so that `--append` can add to them; about doubles the size of the set."""

    def __post_init__(self) -> None:
        if not (0 < self.valid_fraction < 1 and 0 < self.test_fraction < 1 and self.valid_fraction + self.test_fraction < 1):
            shares = f"{self.valid_fraction} and {self.test_fraction}"
            raise ConfigError(f"valid_fraction and test_fraction: expected shares in (0, 1) with a sum below 1, got {shares}")
        for name in ("min_user_events", "min_item_events", "partitions"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.partitions > MAX_PARTITIONS:
            raise ConfigError(f"partitions: expected at most {MAX_PARTITIONS}, got {self.partitions}")
        for name in ("rows_per_partition", "rows_per_chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        for name, kind in self.event_types.items():
            if kind.weight < 0:
                raise ConfigError(f"event_types.{name}.weight: expected 0 or more, got {kind.weight}")
        first, last = self.plausible_us(datetime.now(UTC))
        if first >= last:
            raise ConfigError(f"min_timestamp {self.min_timestamp} is not before max_timestamp {self.max_timestamp}")

    def merged_event_types(self) -> dict[str, EventType]:
        """The defaults of `schema`, overlaid by name."""
        return {**DEFAULT_EVENT_TYPES, **self.event_types}

    def plausible_us(self, now: datetime) -> tuple[int, int]:
        """First and last plausible timestamp in UTC epoch microseconds."""
        first = _epoch_us(self.min_timestamp, "min_timestamp")
        last = int((now + timedelta(days=1)).timestamp() * 1e6)
        return first, last if self.max_timestamp is None else _epoch_us(self.max_timestamp, "max_timestamp")


def _epoch_us(text: str, name: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise ConfigError(f"{name}: expected an ISO date such as 2020-01-31, got {text!r}") from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1e6)
