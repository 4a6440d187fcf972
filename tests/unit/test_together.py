"""Models in the process that answers: batches of what waits, failures that stay with their request, a caller that gives up."""

import asyncio
import dataclasses
import threading

import numpy as np
import pytest

from raysys.bundle import Bundle
from raysys.errors import BundleError
from raysys.pipeline import Pipeline
from raysys.pools.config import PoolConfig
from raysys.queries import Queries
from raysys.registry import Registry
from raysys.serve import deployments
from raysys.serve.lanes import MAX_BATCH, Lane
from raysys.serve.metrics import Metrics
from raysys.serve.models import Compute, Models
from raysys.serve.together import TogetherBackend

NOBODY = np.zeros(0, np.int32)


POOLED = Compute(cached_histories=100, pools=PoolConfig(items_from=1, size=10, sample=200))
"""Pools of so small a catalogue: few items are searched for, and the sample holds all others, so that normalisers are exact."""


@pytest.fixture(params=[Compute(cached_histories=100), POOLED], ids=["all items", "pools"])
def models(request, tmp_path, planted_bundle):
    Registry(str(tmp_path)).publish(planted_bundle)
    return Models(str(tmp_path), request.param, Metrics())


def test_the_next_version_has_pools_of_its_own_and_shares_what_did_not_change(tmp_path, planted_bundle, own_home):
    registry = Registry(str(tmp_path / "registry"))
    first = registry.publish(planted_bundle).version
    models = Models(registry.uri, POOLED, Metrics())
    before, bundle = models.load_current(), Bundle.open(planted_bundle)
    indexes = own_home / "cache" / "indexes"
    built = {path.name: path.stat().st_mtime_ns for path in indexes.glob("*/index.faiss")}
    counted = bundle.models["popularity"].update(np.array([3] * 50), np.array([2] * 50), np.array([1_700_000_000] * 50))
    dataclasses.replace(bundle, models={**bundle.models, "popularity": counted}).write(str(tmp_path / "next"), manifest=bundle.told)
    second = registry.publish(str(tmp_path / "next")).version
    after = models.load_current()
    assert before.pools is not None and after.pools is not None and before is models.get(first) and after is models.get(second)
    assert {path.name: path.stat().st_mtime_ns for path in indexes.glob("*/index.faiss")} == built, "vectors are as they were"
    nobody = Queries.from_lists([[]])
    assert after.retrieve(nobody, 1).candidates.items[0, 0] == 3 != before.retrieve(nobody, 1).candidates.items[0, 0]


def test_answers_equal_the_pipeline_also_in_a_batch(models, planted_bundle):
    bundle = Bundle.open(planted_bundle)
    pipeline, backend, version = Pipeline(bundle), TogetherBackend(models), models.load_current().bundle.version
    queries = [Queries.from_lists([[row, row + 1, row + 2]]) for row in range(0, 100, 5)]
    even = np.arange(pipeline.num_items) % 2 == 0

    async def ask(query):
        retrieved = await backend.retrieve(version, query, 7, even, np.array([4], np.int32))
        scores, probabilities = await backend.rank(version, query, retrieved)
        reasons = await backend.explain(version, query, retrieved.items)
        return retrieved, scores, probabilities, reasons

    async def all_at_once():
        return await asyncio.gather(*map(ask, queries))

    for query, (retrieved, scores, probabilities, reasons) in zip(queries, asyncio.run(all_at_once()), strict=True):
        allowed = even & (np.arange(pipeline.num_items) != 4)
        expected = pipeline.retrieve(query, 7, allowed=allowed).candidates
        np.testing.assert_array_equal(retrieved.items, expected.items[0])
        wanted_scores, wanted_probabilities = pipeline.rank(query, expected)
        np.testing.assert_allclose(scores, wanted_scores[0], atol=5e-4)
        np.testing.assert_allclose(probabilities, wanted_probabilities[0], atol=1e-4)
        assert reasons == [(reason.kind, reason.because) for reason in pipeline.explain(query, retrieved.items)]


def test_an_unknown_version_fails_its_own_request_alone(models):
    backend, version = TogetherBackend(models), models.load_current().bundle.version

    async def both():
        calls = (backend.retrieve(name, Queries.from_lists([[1]]), 5, None, NOBODY) for name in (version, "no-such-version"))
        return await asyncio.gather(*calls, return_exceptions=True)

    good, bad = asyncio.run(both())
    assert len(good.items) == 5 and isinstance(bad, BundleError)


def test_a_stage_takes_what_waits_at_once_and_skips_who_gave_up():
    begin, batches = threading.Event(), []

    def handle(requests):
        begin.wait(5)
        batches.append(list(requests))
        return [ValueError("odd") if request % 2 else request for request in requests]

    async def run():
        lane = Lane("test", handle)
        first = asyncio.create_task(lane(0))
        await asyncio.sleep(0.1)  # the thread holds the first one
        rest = [asyncio.create_task(lane(number)) for number in range(1, MAX_BATCH + 5)]
        await asyncio.sleep(0.05)
        rest[1].cancel()
        await asyncio.sleep(0)
        begin.set()
        return await asyncio.gather(first, *rest, return_exceptions=True)

    answers = asyncio.run(run())
    assert batches[0] == [0] and batches[1][:2] == [1, 3] and len(batches) == 3  # 2 gave up and was not begun
    assert answers[0] == 0 and isinstance(answers[1], ValueError) and isinstance(answers[2], asyncio.CancelledError) and answers[4] == 4


@pytest.mark.parametrize("name, call", [("Retrieval", "retrieve"), ("Ranking", "rank")])
def test_a_stage_of_its_own_takes_what_waits_at_once(name, call, tmp_path, planted_bundle, monkeypatch):
    """What came while the first batch was computed is the second one; `serve.batch` would compute nine more, one after the other."""
    Registry(str(tmp_path)).publish(planted_bundle)
    monkeypatch.setattr(deployments, "_exported", lambda metrics: metrics)
    replica = getattr(deployments, name).func_or_class(str(tmp_path), Compute())
    begin, batches = threading.Event(), []

    def handled(stage, requests, handle):
        begin.wait(5)
        batches.append(list(requests))
        return [ValueError("odd") if request % 2 else request for request in requests]

    monkeypatch.setattr(replica._models, "answer", handled)

    async def run():
        first = asyncio.create_task(getattr(replica, call)(0))
        await asyncio.sleep(0.1)  # the thread holds the first one
        rest = [asyncio.create_task(getattr(replica, call)(number)) for number in range(1, 10)]
        await asyncio.sleep(0.05)
        begin.set()
        return await asyncio.gather(first, *rest)

    answers = asyncio.run(run())
    assert batches == [[0], list(range(1, 10))]
    assert answers[2] == 2 and isinstance(answers[1], ValueError), "an exception comes as a value: it has a hop before it"


def test_a_broken_stage_goes_on():
    broken = iter([True, False])

    def handle(requests):
        if next(broken):
            raise RuntimeError("once")
        return requests

    async def run():
        lane = Lane("test", handle)
        return await asyncio.gather(lane(1), return_exceptions=True), await lane(2)

    (failed,), fine = asyncio.run(run())
    assert isinstance(failed, RuntimeError) and fine == 2
