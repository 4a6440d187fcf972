"""The Serve deployments: thin shells around `models.py`, `events/store.py` and `http.py`.

Ingress (HTTP, reads state, and computes where `placement` is together)
        |-> Retrieval, Ranking   where it is apart; one version a request, named in every call
        `-> Ingestion            the only writer of log and state
"""

import asyncio
import logging
import threading
import time

import numpy as np
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.handle import DeploymentHandle

from raysys.bundle import Bundle
from raysys.errors import ServeOverloaded
from raysys.events.dead_letters import DeadLetters
from raysys.events.log import Record, open_log
from raysys.events.state import StateLimits, open_state
from raysys.events.store import EventStore
from raysys.queries import Queries
from raysys.registry import Registry
from raysys.serve.catalogue import Catalogue, CatalogueBounds, live_encoder
from raysys.serve.exporter import Exporter
from raysys.serve.http import create_app
from raysys.serve.lanes import Lane, raised
from raysys.serve.metrics import Metrics
from raysys.serve.models import (
    POLL_S,
    RETRIEVAL_MODELS,
    Compute,
    Models,
    RankRequest,
    RetrieveRequest,
    explain_one,
    rank_many,
    retrieve_many,
    warm_up,
)
from raysys.serve.rate import Rate
from raysys.serve.recommender import Backend, Recommender, RetrievedOne, Version
from raysys.serve.request import Budget
from raysys.serve.together import TogetherBackend

LOG = logging.getLogger("ray.serve")
WRITE_RETRIES_S = (0.2, 0.5, 1.0, 2.0, 4.0)
"""Waits before a write is repeated after its replica died; a new one is up in a few seconds."""
HEALTH_CHECK_S = 2.0
"""A dead replica is noticed, and another one started, when Serve next asks it for its health: every 10 s by default."""
TRY_S = 30.0
"""Patience with the first request, which a replica sends itself before it is ready, seconds a stage."""
NOTHING_PUBLISHED = "no model published; run `raysys train --prepared DIR --out BUNDLE`, then `raysys publish BUNDLE --registry {registry}`"


def _exported(metrics: Metrics) -> Metrics:
    """The metrics, handed on to Prometheus from now on."""
    Exporter(metrics).run()
    return metrics


@serve.deployment(health_check_period_s=HEALTH_CHECK_S)
class Retrieval:
    """Candidates for many requests at once.

    Args:
        registry: URI.
        compute: settings.
    """

    def __init__(self, registry: str, compute: Compute):
        self._models = Models(registry, compute, _exported(Metrics()), only=RETRIEVAL_MODELS)
        self._models.follow()
        self._lane = Lane("retrieval", self.retrieve_all)

    async def retrieve(self, request: RetrieveRequest) -> RetrievedOne | Exception:
        """Its candidates, computed with those of the requests that wait as well."""
        return await self._lane.answer(request)

    def retrieve_all(self, requests: list[RetrieveRequest]) -> list[RetrievedOne | Exception]:
        """See `retrieve_many`."""
        return self._models.answer("retrieval", requests, retrieve_many)

    async def explain(self, version: str, query: Queries, items: np.ndarray) -> list[tuple[str, int | None]]:
        """See `explain_one`."""
        return explain_one(self._models.get(version), query, items)


@serve.deployment(health_check_period_s=HEALTH_CHECK_S)
class Ranking:
    """Scores and probabilities of candidates, for many requests at once.

    Args:
        registry: URI.
        compute: settings.
    """

    def __init__(self, registry: str, compute: Compute):
        self._models = Models(registry, compute, _exported(Metrics()), only=("ranker",))
        self._models.follow()
        self._lane = Lane("ranking", lambda requests: self._models.answer("ranking", requests, rank_many))

    async def rank(self, request: RankRequest) -> tuple[np.ndarray, np.ndarray] | Exception:
        """Scores and probabilities, computed with those of the requests that wait as well."""
        return await self._lane.answer(request)


@serve.deployment(health_check_period_s=HEALTH_CHECK_S)
class Ingestion:
    """The writer of log and state: durable, then visible, then answered.

    Args:
        events: URI of the log.
        state: URI of the state.
        limits: bounds of the state.
        pseudonyms: write keyed hashes instead of user ids to the log.
        dead_letters: folder of refused records.
    """

    def __init__(self, events: str, state: str, limits: StateLimits, pseudonyms: bool, dead_letters: str):
        self._store = EventStore(open_log(events, writable=True), open_state(state, limits), pseudonyms=pseudonyms)
        self._dead_letters = DeadLetters(dead_letters)

    async def write(self, records: list[Record]) -> list[bool]:
        """See `telling.Writer.write`."""
        return await asyncio.wrap_future(self._store.submit(records))

    async def reject(self, entries: list[dict]) -> None:
        """See `telling.Writer.reject`."""
        await asyncio.get_running_loop().run_in_executor(None, self._dead_letters.write, entries)

    async def held(self, user_id: str) -> list[Record]:
        """See `telling.Writer.held`."""
        return await asyncio.get_running_loop().run_in_executor(None, self._store.records_of, user_id)


class HandleBackend:
    """`recommender.Backend` over Serve handles."""

    def __init__(self, retrieval: DeploymentHandle, ranking: DeploymentHandle):
        self._retrieval, self._ranking = retrieval, ranking

    async def retrieve(
        self, version: str, query: Queries, k: int, allowed: np.ndarray | None, blocked: np.ndarray, closest: int = 0
    ) -> RetrievedOne:
        """See `Backend.retrieve`."""
        bits = None if allowed is None or allowed.all() else np.packbits(allowed).tobytes()
        return raised(await self._retrieval.retrieve.remote((version, query, k, bits, blocked, closest)))

    async def rank(self, version: str, query: Queries, retrieved: RetrievedOne) -> tuple[np.ndarray, np.ndarray]:
        """See `Backend.rank`."""
        return raised(await self._ranking.rank.remote((version, query, retrieved)))

    async def explain(self, version: str, query: Queries, items: np.ndarray) -> list[tuple[str, int | None]]:
        """See `Backend.explain`."""
        return await self._retrieval.explain.remote(version, query, items)


class HandleWriter:
    """`telling.Writer` over the ingestion handle."""

    def __init__(self, ingestion: DeploymentHandle):
        self._ingestion = ingestion

    async def write(self, records: list[Record]) -> list[bool]:
        """See `telling.Writer.write`; a write under way in a replica that dies is repeated on its successor.

        That is safe: every event carries an `event_id` by now, and setting an attribute or erasing twice is doing it once.
        """
        for wait_s in (*WRITE_RETRIES_S, None):
            try:
                return await self._ingestion.write.remote(records)
            except serve.exceptions.BackPressureError:
                raise ServeOverloaded("too many writes are waiting; retry in a second") from None
            except RayError as error:
                if wait_s is None or isinstance(error, RayTaskError):
                    raise
                await asyncio.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")

    async def reject(self, entries: list[dict]) -> None:
        """See `telling.Writer.reject`."""
        await self._ingestion.reject.remote(entries)

    async def held(self, user_id: str) -> list[Record]:
        """See `telling.Writer.held`."""
        return await self._ingestion.held.remote(user_id)

    def post(self, records: list[Record]) -> None:
        """See `telling.Writer.post`."""
        self._ingestion.write.remote(records)


@serve.deployment(health_check_period_s=HEALTH_CHECK_S)
@serve.ingress()
class Ingress:
    """HTTP, user state and the order of stages; follows the registry to the newest version that every stage can load.

    Args:
        registry: URI of published bundles.
        state: URI of the online state.
        stages: handles of retrieval and ranking; None to compute here.
        ingestion: handle.
        compute: settings, where it computes.
        max_in_flight: requests at once; more are shed.
        rate: what one client may do.
        budget: time limits of a request.
        followers: kept an item for answers without retrieval.
        bounds: of what is kept about items in memory.
    """

    def __init__(
        self,
        registry: str,
        state: str,
        stages: tuple[DeploymentHandle, DeploymentHandle] | None,
        ingestion: DeploymentHandle,
        *,
        compute: Compute,
        max_in_flight: int,
        rate: Rate,
        budget: Budget,
        followers: int,
        bounds: CatalogueBounds,
    ):
        self._registry = Registry(registry)
        self._registry_uri = registry
        self._problem: str | None = None
        self._max_in_flight, self._rate, self._followers, self._bounds = max_in_flight, rate, followers, bounds
        self._writer = HandleWriter(ingestion)
        metrics = Metrics()
        # Where the stages are apart the ingress holds no models that compute, and no GPU was given to it.
        self._models: Models | None = None
        self._backend: Backend
        if stages is None:
            self._models = Models(registry, compute, metrics)
            self._backend = TogetherBackend(self._models)
        else:
            self._backend = HandleBackend(*stages)
        self._recommender = Recommender(open_state(state, patient=False), self._backend, budget=budget, metrics=_exported(metrics))
        self._tried: str | None = None
        self._follow_once()
        threading.Thread(target=self._follow, daemon=True, name="follow-registry").start()

    def __serve_build_asgi_app__(self) -> FastAPI:  # noqa: PLW3201 - Serve's own hook
        """The FastAPI app, once the replica knows its models."""
        return create_app(
            self._recommender,
            self._writer,
            models=self._registry.versions,
            not_ready=self._not_ready,
            started=self._try_stages,
            max_in_flight=self._max_in_flight,
            rate=self._rate,
        )

    def _not_ready(self) -> str | None:
        """Why no model answers, or None."""
        version = self._recommender.version
        if version is None:
            return self._problem or NOTHING_PUBLISHED.format(registry=self._registry_uri)
        return None if self._tried is not None else self._problem or f"trying version {version.bundle.version} before the first request"

    def _follow(self) -> None:
        while True:
            time.sleep(POLL_S)
            self._follow_once()

    async def _try_stages(self) -> None:
        """Send the first request ourselves: connecting to the other stages takes seconds, and a user should not pay them."""
        while self._tried is None:
            version = self._recommender.version
            if version is not None:
                name, query, k = version.bundle.version, Queries.from_lists([[0]]), version.bundle.num_candidates
                try:
                    retrieved = await asyncio.wait_for(self._backend.retrieve(name, query, k, None, np.zeros(0, np.int32)), TRY_S)
                    await asyncio.wait_for(self._backend.rank(name, query, retrieved), TRY_S)
                    self._tried, self._problem = name, None
                    return
                except Exception as error:  # the next round tries again
                    self._problem = f"version {name} does not answer yet: {type(error).__name__}"
                    LOG.warning(self._problem)
            await asyncio.sleep(POLL_S)

    def _follow_once(self) -> None:
        refused = self._recommender.metrics.version_refused
        try:
            pointer = self._registry.current()
            current = self._recommender.version
            if pointer is None or (current is not None and current.bundle.version == pointer.version):
                refused.set(0)
                return
            if self._models is not None:
                pipeline = self._models.get(pointer.version)
                warm_up(pipeline)
                bundle = pipeline.bundle
            else:
                bundle = Bundle.open(
                    self._registry.bundle_uri(pointer.version), only=("content", "covisit") if self._followers else ("content",)
                )
            catalogue = Catalogue(bundle.items, live_encoder(bundle), self._bounds)
            catalogue.apply(self._recommender.state.items_since(0))
            if self._models is None and current is not None:
                # Retrieval and ranking poll at the same pace; give them the time to load before naming the version to them.
                time.sleep(2 * POLL_S)
            version = Version.of(bundle, catalogue, self._followers)
            if self._models is None:
                bundle.models.pop("covisit", None)  # its counts take several times the memory of the followers that are kept
            self._recommender.version = version
            self._problem = None
            refused.set(0)
            LOG.info("serving version %s", pointer.version)
            if bundle.key_problem:
                LOG.warning(bundle.key_problem)
        except Exception as error:  # the thread must live: the next version may be sound
            self._problem = str(error)
            refused.set(1)
            LOG.error("cannot serve the published version: %s: %s", type(error).__name__, error)
