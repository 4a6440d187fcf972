"""Asking a stage that runs elsewhere: for a limited time, and not at all while it does not answer.

A stage that hangs would hold every request for its whole time limit, and the ingress would fill with waiting requests and
shed what it could have answered. So after some failures in a row the stage is left alone for a moment (a circuit breaker);
then one request tries it, and the others follow if that one succeeds.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from raysys.errors import DeadlineExceeded, StageUnavailable
from raysys.serve.request import Deadline

T = TypeVar("T")
FAILURES = 5
"""Failures in a row after which a stage is left alone."""
PAUSE_S = 1.0
"""For how long, seconds; one request tries it then."""


class Stage:
    """One stage, shared by all requests of this process.

    Args:
        name: for messages.
        clock: monotonic seconds.
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic):
        self.name, self._clock = name, clock
        self._failures, self._closed_until = 0, 0.0

    async def ask(self, deadline: Deadline, limit_s: float, call: Callable[[], Awaitable[T]]) -> T:
        """The call's result, waited for at most `limit_s` and never beyond the deadline.

        Raises:
            DeadlineExceeded: no time is left; the call was not made.
            StageUnavailable: the stage is left alone now; the call was not made.
            TimeoutError: it was late.
        """
        left_s = min(limit_s, deadline.left_s)
        if left_s <= 0:
            raise DeadlineExceeded("the deadline of the request has passed")
        if self._failures >= FAILURES:
            if self._clock() < self._closed_until:
                raise StageUnavailable(f"{self.name} failed {self._failures} times in a row; it is asked again within {PAUSE_S:g} s")
            self._closed_until = self._clock() + PAUSE_S  # this request tries, the others wait for what it finds
        try:
            result = await asyncio.wait_for(call(), left_s)
        except Exception as error:
            # A client in a hurry says nothing about the stage: its deadline must not close the stage for the others.
            if left_s == limit_s or not isinstance(error, TimeoutError):
                self._failures += 1
                self._closed_until = self._clock() + PAUSE_S
            raise
        self._failures = 0
        return result
