"""What the service counts about itself, in this process. No Ray here: exporter.py hands it on.

Recording is on the road of every answer, so it is a dictionary entry and an
addition; Ray's own calls cost several microseconds each, and its exporter
replays every observation of a histogram in Python. So totals are kept here and
exported once a second, a histogram as the counters that Prometheus makes of one:

    NAME_bucket{le="..."}   observations of at most `le`
    NAME_sum, NAME_count    for means

Ray puts `ray_` before each name and `_total` behind each counter. Label values
come from closed sets (stages, strategies, codes); never an id of a user or item.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MS_BUCKETS = (1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0)
"""Upper bounds of latencies, milliseconds: close where answers should be, far apart where they should not."""
COUNT_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
"""Upper bounds of numbers of things."""
MAX_SERIES = 200
"""Label combinations a metric keeps; what comes beyond is counted under `other`."""
OTHER = "other"


@dataclass(frozen=True)
class Sample:
    """One number to export."""

    name: str
    """Without Ray's prefix and suffix."""
    is_counter: bool
    """A total that only grows, else a gauge."""
    labels: tuple[tuple[str, str], ...]
    value: float


class _Metric:
    def __init__(self, name: str, text: str, *labels: str):
        self.name, self.text, self.labels = name, text, labels

    def _place(self, values: tuple[str, ...], held: dict) -> tuple[str, ...]:
        """Where values are kept: at their own place, or beyond MAX_SERIES at one for all others."""
        return values if len(held) < MAX_SERIES else (OTHER,) * len(values)

    def exported(self) -> dict[str, str]:
        """Prometheus name -> type of everything this becomes."""
        raise NotImplementedError

    def samples(self) -> Iterator[Sample]:
        """What is to be exported now."""
        raise NotImplementedError


class Counter(_Metric):
    """A total by label values."""

    def __init__(self, name: str, text: str, *labels: str):
        super().__init__(name, text, *labels)
        self.values: dict[tuple[str, ...], float] = {}

    def add(self, *labels: str, by: float = 1.0) -> None:
        """Count `by` more, under label values in the order of `labels`."""
        value = self.values.get(labels)
        if value is None:
            labels = self._place(labels, self.values)
            value = self.values.get(labels, 0.0)
        self.values[labels] = value + by

    def exported(self) -> dict[str, str]:
        """See `_Metric`."""
        return {f"ray_{self.name}_total": "counter"}

    def samples(self) -> Iterator[Sample]:
        """See `_Metric`."""
        for values, total in list(self.values.items()):
            yield Sample(self.name, True, tuple(zip(self.labels, values, strict=True)), total)


class Gauge(_Metric):
    """The present value by label values."""

    def __init__(self, name: str, text: str, *labels: str):
        super().__init__(name, text, *labels)
        self.values: dict[tuple[str, ...], float] = {}

    def set(self, value: float, *labels: str) -> None:
        """Replace the value under these label values."""
        self.values[labels if labels in self.values else self._place(labels, self.values)] = value

    def only(self, value: float, *labels: str) -> None:
        """Replace all values by this one; Ray forgets the others within two of its reports."""
        self.values = {labels: value}

    def exported(self) -> dict[str, str]:
        """See `_Metric`."""
        return {f"ray_{self.name}": "gauge"}

    def samples(self) -> Iterator[Sample]:
        """See `_Metric`."""
        for values, value in list(self.values.items()):
            yield Sample(self.name, False, tuple(zip(self.labels, values, strict=True)), value)


class Histogram(_Metric):
    """How often a value was how large, by label values.

    Args:
        bounds: upper bounds of the buckets, ascending.
    """

    def __init__(self, name: str, text: str, *labels: str, bounds: tuple[float, ...]):
        super().__init__(name, text, *labels)
        self.bounds = bounds
        self.counts: dict[tuple[str, ...], list[int]] = {}
        self.sums: dict[tuple[str, ...], float] = {}

    def observe(self, value: float, *labels: str) -> None:
        """Note one value."""
        counts = self.counts.get(labels)
        if counts is None:
            labels = self._place(labels, self.counts)
            counts = self.counts.setdefault(labels, [0] * (len(self.bounds) + 1))
            self.sums.setdefault(labels, 0.0)
        counts[bisect_left(self.bounds, value)] += 1
        self.sums[labels] += value

    def exported(self) -> dict[str, str]:
        """See `_Metric`."""
        return {f"ray_{self.name}_{part}_total": "counter" for part in ("bucket", "sum", "count")}

    def samples(self) -> Iterator[Sample]:
        """See `_Metric`."""
        for values, counts in list(self.counts.items()):
            labels, below = tuple(zip(self.labels, values, strict=True)), 0
            for bound, count in zip((*(f"{bound:g}" for bound in self.bounds), "+Inf"), counts, strict=True):
                below += count
                yield Sample(f"{self.name}_bucket", True, (*labels, ("le", bound)), below)
            yield Sample(f"{self.name}_sum", True, labels, self.sums[values])
            yield Sample(f"{self.name}_count", True, labels, below)


class Metrics:
    """Everything that a process of the service may count; one that counts nothing of a kind exports nothing of it.

    Not for several threads: each metric is written by one (the event loop, or the thread that follows the registry).
    """

    def __init__(self) -> None:
        self.responses = Counter("raysys_responses", "HTTP responses by status code", "status")
        self.refused = Counter("raysys_refused", "requests refused before they were read", "why")
        self.in_flight = Gauge("raysys_in_flight", "requests that this ingress replica works on")
        self.answers = Counter(
            "raysys_answers",
            "answers by what was asked, strategy, last stage that ordered them, why degraded",
            "call",
            "strategy",
            "by",
            "lack",
        )
        self.stage_ms = Histogram(
            "raysys_stage_ms", "milliseconds of each stage of an answer, and of the whole", "stage", bounds=MS_BUCKETS
        )
        self.candidates = Histogram("raysys_candidates", "items that retrieval handed to ranking", bounds=COUNT_BUCKETS)
        self.stage_failures = Counter("raysys_stage_failures", "stages that failed or were late, by exception", "stage", "error")
        self.filter_masks = Counter("raysys_filter_masks", "filters asked for, and those whose mask was kept from before", "found")
        self.events = Counter("raysys_events", "events sent, by what became of them", "outcome")
        self.visible_ms = Histogram(
            "raysys_event_visible_ms", "milliseconds from an event's arrival until it is durable and visible", bounds=MS_BUCKETS
        )
        self.impressions_dropped = Gauge("raysys_impressions_dropped", "impressions lost since the start because the log was behind")
        self.model_info = Gauge("raysys_model_info", "1 for the version in use", "version")
        self.version_refused = Gauge("raysys_version_refused", "1 while what is published cannot be served; the log says why")
        self.model_age_s = Gauge("raysys_model_age_seconds", "seconds since the version in use was made")
        self.newest_event_age_s = Gauge(
            "raysys_newest_learnt_event_age_seconds", "seconds since the newest event that the version in use has learnt from"
        )
        self.batch_size = Histogram("raysys_batch_size", "requests that a model replica computed together", "stage", bounds=COUNT_BUCKETS)
        self.batch_ms = Histogram("raysys_batch_ms", "milliseconds that a model replica computed for a batch", "stage", bounds=MS_BUCKETS)
        self.before_export: list[Callable[[], None]] = []
        """Called before `samples`, to set gauges that change by themselves."""

    def all(self) -> list[_Metric]:
        """Every metric there is."""
        return [metric for metric in vars(self).values() if isinstance(metric, _Metric)]

    def samples(self) -> list[Sample]:
        """What is to be exported now."""
        for prepare in self.before_export:
            prepare()
        return [sample for metric in self.all() for sample in metric.samples()]

    def counts(self) -> dict[str, int]:
        """For people, in `GET /v1/models`: answers by strategy, failures by stage and exception, what was lacking without a failure."""
        found: dict[str, int] = {}
        for (_, strategy, _, lack), total in self.answers.values.items():
            for name in (f"strategy_{strategy}", *([f"degraded_{lack}"] if lack in ("user_key", "no_model") else [])):
                found[name] = found.get(name, 0) + int(total)
        return found | {f"degraded_{stage}_{error}": int(total) for (stage, error), total in self.stage_failures.values.items()}


def exported_names() -> dict[str, str]:
    """Prometheus name -> type of everything that the service exports."""
    return {name: kind for metric in Metrics().all() for name, kind in metric.exported().items()}
