"""The Serve deployments: thin shells around `pipeline.py`, `events/store.py` and `http.py`.

Ingress (HTTP, reads state) -> Retrieval -> Ranking       one version a request, named in every call
        `-> Ingestion (the only writer of log and state)
"""

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.handle import DeploymentHandle

from raysys.bundle import MODEL_CLASSES, Bundle
from raysys.errors import ServeOverloaded
from raysys.events.dead_letters import DeadLetters
from raysys.events.log import Record, open_log
from raysys.events.state import StateLimits, open_state
from raysys.events.store import EventStore
from raysys.models.base import Candidates
from raysys.pipeline import Pipeline
from raysys.queries import Queries
from raysys.registry import Registry
from raysys.serve.catalogue import Catalogue, live_encoder
from raysys.serve.http import create_app
from raysys.serve.recommender import Recommender, RetrievedOne, Version, pad_candidates

LOG = logging.getLogger("ray.serve")
POLL_S = 1.0
"""Seconds between looks at the registry's pointer."""
WRITE_RETRIES_S = (0.2, 0.5, 1.0, 2.0, 4.0)
"""Waits before a write is repeated after its replica died; a new one is up in a few seconds."""
TRY_S = 30.0
"""Patience with the first request, which a replica sends itself before it is ready, seconds a stage."""
KEEP_VERSIONS = 2
"""Bundles a replica keeps loaded: the current one, and the one that requests under way may still name."""
NOTHING_PUBLISHED = "no model published; run `raysys train --prepared DIR --out BUNDLE`, then `raysys publish BUNDLE --registry {registry}`"


class Models:
    """Pipelines by version, loaded on demand from the registry; the last KEEP_VERSIONS stay.

    Args:
        registry: URI.
        only: models to load.
    """

    def __init__(self, registry: str, only: tuple[str, ...] | None = None):
        self.registry, self._only = Registry(registry), only
        self._loaded: OrderedDict[str, Pipeline] = OrderedDict()
        self._lock, self._loading = threading.Lock(), threading.Lock()

    def get(self, version: str) -> Pipeline:
        """The pipeline of a version.

        Raises:
            BundleError: the registry does not have it, or it is damaged.
        """
        with self._lock:
            if version in self._loaded:
                return self._loaded[version]
        # Loading takes seconds on a busy machine; requests for the version in use must not wait for it.
        with self._loading:
            with self._lock:
                if version in self._loaded:
                    return self._loaded[version]
            pipeline = Pipeline(Bundle.open(self.registry.bundle_uri(version), only=self._only))
            warm_up(pipeline)
            with self._lock:
                self._loaded[version] = pipeline
                while len(self._loaded) > KEEP_VERSIONS:
                    self._loaded.popitem(last=False)
            return pipeline

    def load_current(self) -> Pipeline | None:
        """Load what the pointer names, before a request asks for it; None while nothing is published."""
        pointer = self.registry.current()
        return None if pointer is None else self.get(pointer.version)

    def follow(self) -> None:
        """Poll the pointer for ever, in a thread: a new version is warm here before the ingress names it."""

        def poll() -> None:
            while True:
                time.sleep(POLL_S)
                try:
                    self.load_current()
                except Exception as error:  # the thread must live: the next version may be sound
                    LOG.error("cannot load the published version: %s: %s", type(error).__name__, error)

        threading.Thread(target=poll, daemon=True, name="follow-registry").start()


def warm_up(pipeline: Pipeline) -> None:
    """Run one request through: the first call of torch and of lazy caches is the slow one."""
    query = Queries.from_lists([[0]])
    items = np.zeros((1, pipeline.num_candidates), np.int32)
    names = tuple(pipeline.sources)
    if pipeline.sources:
        pipeline.retrieve(query)
        pipeline.explain(query, np.zeros(1, np.int64))
    elif pipeline.ranker is not None:
        names = pipeline.ranker.sources
    zeros = np.zeros(items.shape, np.float32)
    pipeline.rank(query, Candidates(items, zeros, np.zeros((*items.shape, len(names)), np.float32), names))


def _answer_by_version(models: Models, requests: list[Any], handle: Callable[[Pipeline, list[Any]], list[Any]]) -> list[Any]:
    """One batch of requests, their version first in each, handled a version at a time.

    Where a version fails, its requests get the exception as their answer: the others of the batch asked for something else.
    """
    groups: dict[str, list[int]] = {}
    for position, request in enumerate(requests):
        groups.setdefault(request[0], []).append(position)
    answers: list[Any] = [None] * len(requests)
    for version, positions in groups.items():
        try:
            found = handle(models.get(version), [requests[position] for position in positions])
        except Exception as error:
            found = [error] * len(positions)
        for position, answer in zip(positions, found, strict=True):
            answers[position] = answer
    return answers


@serve.deployment
class Retrieval:
    """Candidates for many requests at once.

    Args:
        registry: URI.
        threads: torch threads of this replica.
    """

    def __init__(self, registry: str, threads: int = 1):
        torch.set_num_threads(threads)
        self._models = Models(registry, only=tuple(name for name in MODEL_CLASSES if name != "ranker"))
        self._models.load_current()
        self._models.follow()

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.0)
    async def retrieve(self, requests: list[tuple[str, Queries, int, bytes | None, np.ndarray]]) -> list[RetrievedOne | Exception]:
        """(version, query, k, packed allowed bits or None, blocked rows) each."""
        return _answer_by_version(self._models, requests, self._retrieve)

    def _retrieve(self, pipeline: Pipeline, group: list[tuple]) -> list[RetrievedOne]:
        num_items = pipeline.num_items
        allowed = np.ones((len(group), num_items), bool)
        for row, (_, _, _, bits, blocked) in enumerate(group):
            if bits is not None:
                allowed[row] = np.unpackbits(np.frombuffer(bits, np.uint8), count=num_items)
            allowed[row, blocked] = False
        retrieved = pipeline.retrieve(
            Queries.stack([query for _, query, _, _, _ in group]), max(k for _, _, k, _, _ in group), allowed=allowed
        )
        candidates = retrieved.candidates
        answers = []
        for row, (_, _, k, _, _) in enumerate(group):
            count = min(k, int((candidates.items[row] >= 0).sum()))
            answers.append(
                RetrievedOne(
                    candidates.items[row, :count],
                    candidates.fused[row, :count],
                    candidates.log_probs[row, :count],
                    candidates.sources,
                    None if retrieved.profiles is None else retrieved.profiles[row],
                    None if retrieved.affinity is None else retrieved.affinity[row],
                )
            )
        return answers

    async def explain(self, version: str, query: Queries, items: np.ndarray) -> list[tuple[str, int | None]]:
        """(kind, item row behind it) for each item."""
        return [(reason.kind, reason.because) for reason in self._models.get(version).explain(query, items)]


@serve.deployment
class Ranking:
    """Scores and probabilities of candidates, for many requests at once.

    Args:
        registry: URI.
        threads: torch threads of this replica.
    """

    def __init__(self, registry: str, threads: int = 1):
        torch.set_num_threads(threads)
        self._models = Models(registry, only=("ranker",))
        self._models.load_current()
        self._models.follow()

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.0)
    async def rank(self, requests: list[tuple[str, Queries, RetrievedOne]]) -> list[tuple[np.ndarray, np.ndarray] | Exception]:
        """(version, query, candidates) each."""
        return _answer_by_version(self._models, requests, self._rank)

    def _rank(self, pipeline: Pipeline, group: list[tuple]) -> list[tuple[np.ndarray, np.ndarray]]:
        candidates = pad_candidates([retrieved for _, _, retrieved in group])
        scores, probabilities = pipeline.rank(Queries.stack([query for _, query, _ in group]), candidates)
        counts = [len(retrieved.items) for _, _, retrieved in group]
        return [(scores[row, :count], probabilities[row, :count]) for row, count in enumerate(counts)]


@serve.deployment
class Ingestion:
    """The writer of log and state: durable, then visible, then answered.

    Args:
        events: URI of the log.
        state: URI of the state.
        max_events: events kept a user.
        pseudonyms: write keyed hashes instead of user ids to the log.
        dead_letters: folder of refused records.
    """

    def __init__(self, events: str, state: str, max_events: int, pseudonyms: bool, dead_letters: str):
        log, limits = open_log(events, writable=True), StateLimits(max_events=max_events)
        self._store = EventStore(log, open_state(state, limits), pseudonyms=pseudonyms)
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


def _raised(answer: Any) -> Any:
    """A batched call hands an exception back as a value, so that it fails one request and not its whole batch."""
    if isinstance(answer, Exception):
        raise answer
    return answer


class HandleBackend:
    """`recommender.Backend` over Serve handles."""

    def __init__(self, retrieval: DeploymentHandle, ranking: DeploymentHandle):
        self._retrieval, self._ranking = retrieval, ranking

    async def retrieve(self, version: str, query: Queries, k: int, allowed: np.ndarray | None, blocked: np.ndarray) -> RetrievedOne:
        """See `Backend.retrieve`."""
        bits = None if allowed is None or allowed.all() else np.packbits(allowed).tobytes()
        return _raised(await self._retrieval.retrieve.remote((version, query, k, bits, blocked)))

    async def rank(self, version: str, query: Queries, retrieved: RetrievedOne) -> tuple[np.ndarray, np.ndarray]:
        """See `Backend.rank`."""
        return _raised(await self._ranking.rank.remote((version, query, retrieved)))

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


@serve.deployment
@serve.ingress()
class Ingress:
    """HTTP, user state and the order of stages; follows the registry to the newest version that every stage can load.

    Args:
        registry: URI of published bundles.
        state: URI of the online state.
        retrieval: handle.
        ranking: handle.
        ingestion: handle.
        max_in_flight: requests at once; more are shed.
    """

    def __init__(
        self,
        registry: str,
        state: str,
        retrieval: DeploymentHandle,
        ranking: DeploymentHandle,
        ingestion: DeploymentHandle,
        max_in_flight: int,
    ):
        self._registry = Registry(registry)
        self._registry_uri = registry
        self._problem: str | None = None
        self._max_in_flight = max_in_flight
        self._writer = HandleWriter(ingestion)
        self._backend = HandleBackend(retrieval, ranking)
        self._recommender = Recommender(open_state(state, patient=False), self._backend)
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
                name, query, k = version.bundle.version, Queries.from_lists([[0]]), self._recommender.num_candidates
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
        try:
            pointer = self._registry.current()
            current = self._recommender.version
            if pointer is None or (current is not None and current.bundle.version == pointer.version):
                return
            bundle = Bundle.open(self._registry.bundle_uri(pointer.version), only=("content",))
            catalogue = Catalogue(bundle.items, live_encoder(bundle))
            catalogue.apply(self._recommender.state.items_since(0))
            if current is not None:
                # Retrieval and ranking poll at the same pace; give them the time to load before naming the version to them.
                time.sleep(2 * POLL_S)
            self._recommender.version = Version.of(bundle, catalogue)
            self._problem = None
            LOG.info("serving version %s", pointer.version)
            if bundle.key_problem:
                LOG.warning(bundle.key_problem)
        except Exception as error:  # the thread must live: the next version may be sound
            self._problem = str(error)
            LOG.error("cannot serve the published version: %s: %s", type(error).__name__, error)
