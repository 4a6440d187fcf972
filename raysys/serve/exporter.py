"""From `metrics.Metrics` to Ray's Prometheus exporter, once a second, in a thread. Ray adds deployment, replica and application."""

import logging
import threading
import time
from typing import Any

from ray.serve import metrics as ray_metrics

from raysys.serve.metrics import Metrics, Sample

LOG = logging.getLogger("ray.serve")
EXPORT_S = 1.0
"""Seconds between exports. Ray sends them on every `RAY_metrics_report_interval_ms` (10 s by default)."""


class Exporter:
    """Tells Ray what has changed.

    Args:
        metrics: this process's.
    """

    def __init__(self, metrics: Metrics):
        self.metrics = metrics
        self._texts = {metric.name: metric.text for metric in metrics.all()}
        self._counters: dict[str, ray_metrics.Counter] = {}
        self._gauges: dict[str, ray_metrics.Gauge] = {}
        self._told: dict[tuple, float] = {}

    def export(self) -> None:
        """Add to Ray's counters what came since the last call; set its gauges, which it forgets unless they are set again."""
        for sample in self.metrics.samples():
            labels = dict(sample.labels)
            if not sample.is_counter:
                self._gauge(sample).set(float(sample.value), labels)
                continue
            key = (sample.name, sample.labels)
            fresh = sample.value - self._told.get(key, 0.0)
            if fresh > 0:
                self._told[key] = sample.value
                self._counter(sample).inc(fresh, labels)

    def run(self) -> None:
        """Export for ever, in a thread that ends with the process."""

        def loop() -> None:
            while True:
                time.sleep(EXPORT_S)
                try:
                    self.export()
                except Exception as error:  # answers matter more than their statistics
                    LOG.error("cannot export metrics: %s: %s", type(error).__name__, error)

        threading.Thread(target=loop, daemon=True, name="export-metrics").start()

    def _counter(self, sample: Sample) -> ray_metrics.Counter:
        if sample.name not in self._counters:
            self._counters[sample.name] = ray_metrics.Counter(sample.name, self._text(sample.name), _names(sample))
        return self._counters[sample.name]

    def _gauge(self, sample: Sample) -> ray_metrics.Gauge:
        if sample.name not in self._gauges:
            self._gauges[sample.name] = ray_metrics.Gauge(sample.name, self._text(sample.name), _names(sample))
        return self._gauges[sample.name]

    def _text(self, name: str) -> str:
        return self._texts.get(name) or self._texts[name.rpartition("_")[0]]


def _names(sample: Sample) -> Any:  # Serve types it as a tuple of one
    return tuple(name for name, _ in sample.labels)
