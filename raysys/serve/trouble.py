"""One log line for each answer that was degraded and each request that failed, and not more of them than a disk can bear.

The fields are attributes of the record: with `encoding: JSON` (serve_config.yaml) each line is a JSON object that also
carries Serve's `request_id`, which the client has as `X-Request-Id`. No ids of users or items, no bodies.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

from raysys.serve.request import Lack

LOG = logging.getLogger("ray.serve")
LINES_PER_S = 50.0
"""Lines a second and process in the long run; in an outage every answer would be one. What is left out is counted in the next line."""
BURST = 200
"""Lines at once after a quiet time."""


class Trouble:
    """Writes the lines.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._tokens, self._last = float(BURST), clock()
        self._left_out = 0

    def degraded(self, answer: dict[str, Any], lack: Lack, *, by: str, stages: dict[str, float]) -> None:
        """An answer that is less than it could be."""
        fields = {name: answer[name] for name in ("recommendation_id", "model_version", "strategy")}
        self._write("degraded answer", {**fields, "lack": lack.kind, "reason": lack.text, "by": by, "stages": dict(stages)})

    def failed(self, status: int, kind: str, error: Exception | None = None) -> None:
        """A request that was answered with a 5xx."""
        self._write("failed request", {"status": status, "error_type": kind, "error": type(error).__name__ if error else None})

    def _write(self, message: str, fields: dict[str, Any]) -> None:
        now = self._clock()
        self._tokens, self._last = min(float(BURST), self._tokens + (now - self._last) * LINES_PER_S), now
        if self._tokens < 1:
            self._left_out += 1
            return
        self._tokens -= 1
        LOG.warning(message, extra={**fields, "lines_left_out": self._left_out})
        self._left_out = 0
