"""The models in the process that speaks HTTP: an answer without a hop. No Ray here.

A hop through a Serve handle costs about as much as all models together on a
small catalogue. What waits while a stage computes is its next batch, as in the
replicas of their own; each stage has a thread, so that the event loop goes on
and a slow ranker holds up nobody's retrieval.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from raysys.queries import Queries
from raysys.serve.models import Models, explain_one, rank_many, retrieve_many
from raysys.serve.recommender import RetrievedOne

MAX_BATCH = 32
"""Requests that a stage takes at once."""


class TogetherBackend:
    """`recommender.Backend` in this process.

    Args:
        models: by version, with every model of the bundle.
    """

    def __init__(self, models: Models):
        self._retrieve = Lane("retrieval", lambda requests: models.answer("retrieval", requests, retrieve_many))
        self._rank = Lane("ranking", lambda requests: models.answer("ranking", requests, rank_many))
        self._explain = Lane("explain", lambda requests: models.answer("explain", requests, _explain_each))

    async def retrieve(
        self, version: str, query: Queries, k: int, allowed: np.ndarray | None, blocked: np.ndarray, closest: int = 0
    ) -> RetrievedOne:
        """See `Backend.retrieve`."""
        return await self._retrieve((version, query, k, allowed, blocked, closest))

    async def rank(self, version: str, query: Queries, retrieved: RetrievedOne) -> tuple[np.ndarray, np.ndarray]:
        """See `Backend.rank`."""
        return await self._rank((version, query, retrieved))

    async def explain(self, version: str, query: Queries, items: np.ndarray) -> list[tuple[str, int | None]]:
        """See `Backend.explain`."""
        return await self._explain((version, query, items))


class Lane:
    """A thread that handles requests, as many at once as wait for it.

    Args:
        name: of the thread.
        handle: requests -> an answer each; one that is an exception is raised for its request alone.
    """

    def __init__(self, name: str, handle: Callable[[list[Any]], list[Any]]):
        self._handle = handle
        # Bounded by the requests that the ingress takes at once.
        self._waiting: queue.SimpleQueue[tuple[Any, asyncio.Future]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name=name).start()

    async def __call__(self, request: Any) -> Any:
        """The request's answer; a caller that stops waiting costs nothing where the request was not begun."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.put((request, future))
        return raised(await future)

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


def _explain_each(pipeline: Any, requests: list[tuple[str, Queries, np.ndarray]]) -> list[list[tuple[str, int | None]]]:
    return [explain_one(pipeline, query, items) for _, query, items in requests]


def raised(answer: Any) -> Any:
    """A batched call hands an exception back as a value, so that it fails one request and not its whole batch."""
    if isinstance(answer, Exception):
        raise answer
    return answer
