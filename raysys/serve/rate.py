"""How often one client may call: a token bucket a client, in a table of bounded size."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Rate:
    """What a client may do at one ingress replica.

    Attributes:
        per_s: requests a second in the long run; 0 for no limit.
        burst: requests at once after a quiet time.
        max_clients: clients remembered; beyond it the one that was quiet the longest starts afresh.
    """

    per_s: float = 0.0
    burst: int = 20
    max_clients: int = 10_000


class RateLimit:
    """Counts requests by client.

    Args:
        rate: what is allowed.
        clock: monotonic seconds.
    """

    def __init__(self, rate: Rate, clock: Callable[[], float] = time.monotonic):
        self.rate, self._clock = rate, clock
        self._buckets: OrderedDict[bytes, tuple[float, float]] = OrderedDict()

    def wait_s(self, client: bytes) -> int:
        """0 when the request may pass, else whole seconds until one would."""
        if not self.rate.per_s:
            return 0
        now = self._clock()
        tokens, last = self._buckets.pop(client, (float(self.rate.burst), now))
        tokens = min(float(self.rate.burst), tokens + (now - last) * self.rate.per_s)
        passes = tokens >= 1
        self._buckets[client] = (tokens - 1 if passes else tokens, now)
        if len(self._buckets) > self.rate.max_clients:
            self._buckets.popitem(last=False)
        return 0 if passes else math.ceil((1 - tokens) / self.rate.per_s)
