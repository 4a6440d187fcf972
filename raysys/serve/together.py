"""The models in the process that speaks HTTP: an answer without a hop. No Ray here.

A hop through a Serve handle costs about as much as all models together on a
small catalogue. What waits while a stage computes is its next batch, as in the
replicas of their own; each stage has a thread, so that the event loop goes on
and a slow ranker holds up nobody's retrieval.
"""

from typing import Any

import numpy as np

from raysys.queries import Queries
from raysys.serve.lanes import Lane
from raysys.serve.models import Models, explain_one, rank_many, retrieve_many
from raysys.serve.recommender import RetrievedOne


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


def _explain_each(pipeline: Any, requests: list[tuple[str, Queries, np.ndarray]]) -> list[list[tuple[str, int | None]]]:
    return [explain_one(pipeline, query, items) for _, query, items in requests]
