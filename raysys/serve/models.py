"""The models behind an answer: bundles by version, kept warm, and the two stages for many requests at once.

Runs in whichever process computes: a replica of its own (`deployments.py`) or the one that speaks HTTP (`together.py`). No Ray here.
"""

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from raysys import storage
from raysys.bundle import MODEL_CLASSES, Bundle
from raysys.errors import ConfigError
from raysys.models.base import Candidates
from raysys.pipeline import Pipeline
from raysys.pools.config import PoolConfig
from raysys.queries import Queries
from raysys.registry import Registry
from raysys.serve.metrics import Metrics
from raysys.serve.recommender import RetrievedOne, pad_candidates

LOG = logging.getLogger("ray.serve")
POLL_S = 1.0
"""Seconds between looks at the registry's pointer."""
KEEP_VERSIONS = 2
"""Bundles a replica keeps loaded: the current one, and the one that requests under way may still name."""
RETRIEVAL_MODELS = tuple(name for name in MODEL_CLASSES if name != "ranker")
"""What a replica loads that only retrieves."""

RetrieveRequest = tuple[str, Queries, int, np.ndarray | bytes | None, np.ndarray, int]
"""(version, query, k, allowed, blocked rows, closest); allowed is (N,) bool, or the same as packed bits, None for all items."""
RankRequest = tuple[str, Queries, RetrievedOne]
"""(version, query, candidates)."""


@dataclass(frozen=True)
class Compute:
    """How a replica computes."""

    threads: int = 1
    """Threads of torch, of NumPy's products and of a search in an index."""
    device: str = "cpu"
    """`cpu`, `cuda`, or `auto`; see `device_of`."""
    cached_histories: int = 20_000
    """Histories whose vectors a node keeps, so that asking again without a new event does not encode again; about 300 bytes each."""
    pools: PoolConfig = PoolConfig()
    """From which catalogue size on retrieval asks an index."""


class Models:
    """Pipelines by version, loaded on demand from the registry; the last KEEP_VERSIONS stay.

    Args:
        registry: URI.
        compute: settings of this process; sets its torch threads.
        metrics: where batches are counted.
        only: models to load; all when None.
    """

    def __init__(self, registry: str, compute: Compute, metrics: Metrics, only: tuple[str, ...] | None = None):
        torch.set_num_threads(compute.threads)
        threadpool_limits(compute.threads)
        self.registry, self._compute, self._metrics, self._only = Registry(registry), compute, metrics, only
        self._device = device_of(compute.device)
        self._loaded: OrderedDict[str, Pipeline] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, version: str) -> Pipeline:
        """The pipeline of a version.

        Raises:
            BundleError: the registry does not have it, or it is damaged.
        """
        pipeline = self._loaded.get(version)
        if pipeline is not None:
            return pipeline  # without the lock: requests must not wait while the next version is loaded
        with self._lock:
            pipeline = self._loaded.get(version)
            if pipeline is None:
                pipeline = Pipeline(Bundle.open(self.registry.bundle_uri(version), only=self._only)).to(self._device).frozen()
                if "interest" in pipeline.bundle.models:
                    pipeline.bundle.models["interest"].remember(self._compute.cached_histories, histories_folder())
                if pipeline.sources:
                    pipeline.pooled(self._compute.pools)
                self._loaded[version] = pipeline
                while len(self._loaded) > KEEP_VERSIONS:
                    self._loaded.popitem(last=False)
            return pipeline

    def answer(self, stage: str, requests: list[Any], handle: Callable[[Pipeline, list[Any]], list[Any]]) -> list[Any]:
        """One batch of requests, their version first in each, handled a version at a time.

        Where a version fails, its requests get the exception as their answer: the others of the batch asked for something else.

        Args:
            stage: name, for the metrics.
            requests: of any versions.
            handle: a pipeline and the requests that name its version -> an answer each.
        """
        started = time.perf_counter()
        groups: dict[str, list[int]] = {}
        for position, request in enumerate(requests):
            groups.setdefault(request[0], []).append(position)
        answers: list[Any] = [None] * len(requests)
        for version, positions in groups.items():
            try:
                found = handle(self.get(version), [requests[position] for position in positions])
            except Exception as error:
                found = [error] * len(positions)
            for position, answer in zip(positions, found, strict=True):
                answers[position] = answer
        self._metrics.batch_size.observe(len(requests), stage)
        self._metrics.batch_ms.observe((time.perf_counter() - started) * 1000, stage)
        return answers

    def load_current(self) -> Pipeline | None:
        """Load what the pointer names, before a request asks for it; None while nothing is published."""
        pointer = self.registry.current()
        return None if pointer is None else self.get(pointer.version)

    def follow(self) -> None:
        """Load and warm up what the pointer names, now and then for ever in a thread, so that it is warm before the ingress names it."""

        def take_current() -> None:
            pipeline = self.load_current()
            if pipeline is not None:
                warm_up(pipeline)

        def poll() -> None:
            while True:
                time.sleep(POLL_S)
                try:
                    take_current()
                except Exception as error:  # the thread must live: the next version may be sound
                    LOG.error("cannot load the published version: %s: %s", type(error).__name__, error)

        take_current()
        threading.Thread(target=poll, daemon=True, name="follow-registry").start()


def histories_folder() -> str:
    """Where the replicas of a node share what they have encoded: in memory, or in the cache where no file system is there for that."""
    memory = Path("/dev/shm")
    return str(memory / f"raysys-histories-{os.getuid()}" if memory.is_dir() else storage.home() / "cache" / "histories")


def device_of(wanted: str) -> str:
    """`cpu` or `cuda` as wanted, or with `auto` the GPU where this replica has one that torch can use (a logical one is none).

    Raises:
        ConfigError: `cuda` where there is none.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise ConfigError(
            "args.device: expected a replica with a GPU for cuda, torch finds none; "
            "give those that compute num_gpus in ray_actor_options, or set device: auto"
        )
    return "cuda"


def warm_up(pipeline: Pipeline) -> None:
    """Run one request through, once a pipeline: the first call of torch and of lazy caches is the slow one."""
    if getattr(pipeline, "warm", False):
        return
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
    pipeline.warm = True  # type: ignore[attr-defined]


def retrieve_many(pipeline: Pipeline, group: list[RetrieveRequest]) -> list[RetrievedOne]:
    """Candidates of several requests in one pass over the models."""
    _, queries, ks, masks, away, closest = zip(*group, strict=True)
    blocked = (np.concatenate([[0], np.cumsum([len(rows) for rows in away])]).astype(np.int64), np.concatenate(away).astype(np.int64))
    allowed = _allowed(masks, pipeline.num_items)
    retrieved = pipeline.retrieve(Queries.stack(queries), max(ks), allowed=allowed, blocked=blocked, closest=max(closest))
    candidates = retrieved.candidates
    answers = []
    for row, k in enumerate(ks):
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


def _allowed(masks: Sequence[np.ndarray | bytes | None], num_items: int) -> np.ndarray | None:
    """(N,) bool where all requests have one mask, as those without a filter do, else (B, N); None where nothing is masked."""
    if all(mask is masks[0] for mask in masks) and not isinstance(masks[0], bytes):
        return masks[0]
    allowed = np.ones((len(masks), num_items), bool)
    for row, mask in enumerate(masks):
        if mask is not None:
            allowed[row] = np.unpackbits(np.frombuffer(mask, np.uint8), count=num_items) if isinstance(mask, bytes) else mask
    return allowed


def rank_many(pipeline: Pipeline, group: list[RankRequest]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scores and probabilities of the candidates of several requests."""
    candidates = pad_candidates([retrieved for _, _, retrieved in group])
    scores, probabilities = pipeline.rank(Queries.stack([query for _, query, _ in group]), candidates)
    counts = [len(retrieved.items) for _, _, retrieved in group]
    return [(scores[row, :count], probabilities[row, :count]) for row, count in enumerate(counts)]


def explain_one(pipeline: Pipeline, query: Queries, items: np.ndarray) -> list[tuple[str, int | None]]:
    """(kind, item row behind it) for each item."""
    return [(reason.kind, reason.because) for reason in pipeline.explain(query, items)]
