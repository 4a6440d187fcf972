"""Dynamic batches: a thread for each stage takes all that wait for it when it has done with the last. No Ray here.

`serve.batch` does not do that: without a wait it makes a batch of each request the moment it comes, and lets these stand in line while
one of them computes; with a wait, every request of a quiet time pays for it. Here nothing waits but what comes while others are computed,
and the event loop goes on meanwhile.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any

MAX_BATCH = 32
"""Requests that a stage takes at once."""


class Lane:
    """A thread that handles requests, as many at once as wait for it.

    Args:
        name: of the thread.
        handle: requests -> an answer each; one that is an exception is raised for its request alone.
    """

    def __init__(self, name: str, handle: Callable[[list[Any]], list[Any]]):
        self._handle = handle
        # Bounded by the requests that its process takes at once.
        self._waiting: queue.SimpleQueue[tuple[Any, asyncio.Future]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name=name).start()

    async def __call__(self, request: Any) -> Any:
        """The request's answer; a caller that stops waiting costs nothing where the request was not begun."""
        return raised(await self.answer(request))

    async def answer(self, request: Any) -> Any:
        """The same, but an exception is handed back as a value, for callers who are far."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.put((request, future))
        return await future

    def _work(self) -> None:
        while True:
            batch = [self._waiting.get()]
            while len(batch) < MAX_BATCH and not self._waiting.empty():
                batch.append(self._waiting.get())
            batch = [one for one in batch if not one[1].cancelled()]
            if not batch:
                continue
            try:
                answers = self._handle([request for request, _ in batch])
            except Exception as error:  # the thread must live
                answers = [error] * len(batch)
            # One wake-up of the loop a batch, not one an answer.
            loop, done = batch[0][1].get_loop(), list(zip(batch, answers, strict=True))
            loop.call_soon_threadsafe(_deliver, done)


def _deliver(done: list[tuple[tuple[Any, asyncio.Future], Any]]) -> None:
    for (_, future), answer in done:
        if not future.done():
            future.set_result(answer)


def raised(answer: Any) -> Any:
    """An answer, or the exception that stands in its place, so that it fails one request and not its whole batch."""
    if isinstance(answer, Exception):
        raise answer
    return answer
