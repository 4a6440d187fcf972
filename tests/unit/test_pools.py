"""Retrieval from pools against scoring every item: the same answers, where both can run."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from raysys.batch.stages import Stage
from raysys.bundle import Bundle, Histories
from raysys.index.files import drop_unused
from raysys.models.base import SparseSource, VectorSource
from raysys.models.content import ContentNeighbours
from raysys.models.covisit import Covisitation
from raysys.models.dot_product import DotProduct, DotProductConfig
from raysys.models.fusion import Fusion
from raysys.models.interest import InterestConfig, InterestEncoder, InterestRetriever
from raysys.models.linear import Linear, LinearConfig
from raysys.models.popularity import Popularity
from raysys.pipeline import Pipeline
from raysys.pools.config import PoolConfig
from raysys.prepare.dataset import Sequences
from raysys.queries import Queries

N, USERS, EVENTS, D, C, CLUSTERS = 6_000, 1_500, 20, 32, 16, 60
CONFIG = PoolConfig(items_from=1_000, size=200, sample=1_500)


def clustered(rng: np.random.Generator, width: int) -> np.ndarray:
    """(N, width) float32 unit vectors; item i is of cluster i mod CLUSTERS."""
    centres = rng.standard_normal((CLUSTERS, width))
    vectors = centres[np.arange(N) % CLUSTERS] + 0.7 * rng.standard_normal((N, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def walks(rng: np.random.Generator) -> Sequences:
    """Histories that stay in a few clusters, popular items first."""
    homes = rng.integers(0, CLUSTERS, (USERS, 3))
    ranks = np.minimum(rng.zipf(1.3, (USERS, EVENTS)) - 1, N // CLUSTERS - 1)
    items = (np.take_along_axis(homes, rng.integers(0, 3, (USERS, EVENTS)), 1) + CLUSTERS * ranks).astype(np.int32).ravel()
    times = np.tile(1_700_000_000 + 3600 * np.arange(EVENTS, dtype=np.int64), USERS)
    ones = np.ones(len(items), np.float32)
    indptr = np.arange(0, len(items) + 1, EVENTS, dtype=np.int64)
    rows = np.arange(USERS, dtype=np.int32)
    return Sequences(rows, indptr, items, np.ones(len(items), np.int8), times, ones, ones > 0, np.zeros(len(items), np.int8))


def bundle_of(*, exclude_seen: bool = False) -> Bundle:
    rng, data = np.random.default_rng(0), walks(np.random.default_rng(1))
    counts = np.bincount(data.items, minlength=N)
    torch.manual_seed(0)
    encoder = InterestEncoder(N, 2, InterestConfig(dim=D, num_layers=1, max_length=20, exclude_seen=exclude_seen))
    with torch.no_grad():
        encoder.items.weight[:N] = 0.02 * torch.from_numpy(clustered(rng, D))
    coefficients = Covisitation.fit(data, N).matrix.copy()
    coefficients.data = coefficients.data - 0.05  # a regression has coefficients of either sign
    models = {
        "interest": InterestRetriever.from_encoder(encoder.eval(), counts),
        "covisit": Covisitation.fit(data, N),
        "linear": Linear(coefficients, LinearConfig(), np.ones(2, np.float32)),
        "dot_product": DotProduct(rng.standard_normal((8, N)), rng.standard_normal((N, 8)), (1.0, 0.0), DotProductConfig(dim=8)),
        "content": ContentNeighbours.fit(clustered(rng, C)),
        "popularity": Popularity.fit(data, N),
    }
    weights = {"interest": 0.4, "covisit": 0.2, "linear": 0.1, "dot_product": 0.1, "content": 0.15, "popularity": 0.05}
    temperatures = {"interest": 1.0, "covisit": 0.5, "linear": 0.4, "dot_product": 0.3, "content": 0.1, "popularity": 1.0}
    table = pa.table({"item_id": [f"i{row}" for row in range(N)], "num_train": counts})
    histories = Histories.build(data, [f"u{user}" for user in range(USERS)], max_events=50)
    return Bundle(table, models, {"mixture": Fusion.of(weights, temperatures).to_dict()}, histories, {"version": "v"})


@pytest.fixture(scope="module")
def bundle():
    return bundle_of()


@pytest.fixture(scope="module")
def dense(bundle):
    return Pipeline(bundle)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("indexes"))


@pytest.fixture(scope="module")
def pooled(bundle, folder):
    return Pipeline(bundle).pooled(CONFIG, folder=folder)


@pytest.fixture(scope="module")
def queries(bundle):
    return bundle.histories.sample(64)


def blocked_of(queries: Queries):
    return queries.indptr, queries.items


def overlap(found, expected, n: int = 20) -> float:
    """Share of the first n of `expected`, or of all where it has fewer, that are among the first n of `found`."""
    lists = [[set(row[:n]) - {-1} for row in part.items.tolist()] for part in (found, expected)]
    return float(np.mean([len(ours & theirs) / len(theirs) for ours, theirs in zip(*lists, strict=True)]))


def largest_difference(found, expected) -> dict[str, float]:
    """Of the log-probabilities of items that both have and that are not next to impossible, by source and fused."""
    worst = dict.fromkeys((*found.sources, "fused"), 0.0)
    for row in range(len(found.items)):
        both, ours, theirs = np.intersect1d(found.items[row], expected.items[row], return_indices=True)
        ours, theirs = ours[both >= 0], theirs[both >= 0]
        for name in found.sources:
            one, other = (
                found.log_probs[row, ours, found.sources.index(name)],
                expected.log_probs[row, theirs, expected.sources.index(name)],
            )
            worst[name] = max(worst[name], float(np.abs(one - other)[other > -20].max(initial=0.0)))
        worst["fused"] = max(worst["fused"], float(np.abs(found.fused[row, ours] - expected.fused[row, theirs]).max(initial=0.0)))
    return worst


def test_every_source_says_which_kind_it_is(bundle):
    kinds = {name: (isinstance(model, VectorSource), isinstance(model, SparseSource)) for name, model in bundle.models.items()}
    vector, sums, neither = (True, False), (False, True), (False, False)
    assert kinds == {
        "interest": vector,
        "content": vector,
        "dot_product": vector,
        "covisit": sums,
        "linear": sums,
        "popularity": neither,
    }


def test_pools_answer_as_scoring_everything_does(dense, pooled, queries):
    """The test that decides: overlap of the first 20 and the largest difference of log-probabilities."""
    assert dense.pools is None and pooled.pools is not None
    expected = dense.retrieve(queries, 100, blocked=blocked_of(queries), closest=15)
    found = pooled.retrieve(queries, 100, blocked=blocked_of(queries), closest=15)
    assert overlap(found.candidates, expected.candidates) > 0.97
    worst = largest_difference(found.candidates, expected.candidates)
    assert max(worst[name] for name in ("covisit", "linear", "popularity")) < 1e-3, "exact normalisers"
    assert max(worst.values()) < 0.15, worst
    np.testing.assert_allclose(found.profiles, expected.profiles, atol=1e-6)
    np.testing.assert_allclose(found.affinity, expected.affinity, atol=0.05)


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5])
def test_filters_hold_before_the_cut(dense, pooled, queries, share):
    """k items where k are allowed, the same as from all items; normalisers stay those of the whole catalogue."""
    allowed = np.random.default_rng(2).random(N) < share
    expected = dense.retrieve(queries, 50, allowed=allowed, blocked=blocked_of(queries)).candidates
    found = pooled.retrieve(queries, 50, allowed=allowed, blocked=blocked_of(queries)).candidates
    assert ((found.items >= 0).sum(axis=1) == (expected.items >= 0).sum(axis=1)).all()
    assert allowed[found.items[found.items >= 0]].all()
    assert overlap(found, expected) > 0.97 and max(largest_difference(found, expected).values()) < 0.15


def test_a_mask_a_query_is_a_mask_for_that_query(pooled, queries):
    few = queries[slice(0, 3)]
    masks = np.random.default_rng(3).random((3, N)) < np.array([[0.001], [0.05], [1.0]])
    together = pooled.retrieve(few, 50, allowed=masks, blocked=blocked_of(few)).candidates
    for row in range(3):
        one = few[slice(row, row + 1)]
        alone = pooled.retrieve(one, 50, allowed=masks[row], blocked=blocked_of(one)).candidates
        np.testing.assert_array_equal(alone.items[0], together.items[row])
        np.testing.assert_allclose(alone.fused[0], together.fused[row], rtol=1e-4, atol=1e-4)


def test_blocked_items_never_come_and_more_than_the_pool_can_be_asked_for(dense, pooled, queries):
    most = CONFIG.size + 500
    far = (np.arange(len(queries) + 1) * 300, np.concatenate([row[row >= 0] for row in dense.retrieve(queries, 300).candidates.items]))
    found = pooled.retrieve(queries, most, blocked=far).candidates
    assert (found.items >= 0).all() and all(len(set(row)) == most for row in found.items.tolist())
    for row in range(len(queries)):
        assert not set(found.items[row]) & set(far[1][far[0][row] : far[0][row + 1]].tolist())
    assert overlap(found, dense.retrieve(queries, most, blocked=far).candidates, n=100) > 0.9


def test_who_has_no_history_gets_what_is_popular(dense, pooled):
    nobody = Queries.from_lists([[], [3, 63]])
    expected, found = (pipeline.retrieve(nobody, 30).candidates for pipeline in (dense, pooled))
    np.testing.assert_array_equal(found.items[0], expected.items[0])
    np.testing.assert_allclose(found.log_probs[0], expected.log_probs[0], atol=1e-4)


def test_given_items_and_reasons_are_as_from_all_items(dense, pooled, queries):
    items = np.random.default_rng(4).integers(0, N, (len(queries), 40))
    expected, found = (pipeline.candidates_of(queries, items) for pipeline in (dense, pooled))
    np.testing.assert_allclose(found.fused, expected.fused, atol=0.15)
    same = [
        one == other
        for row in range(20)
        for query in [queries[slice(row, row + 1)]]
        for one, other in zip(dense.explain(query, items[row]), pooled.explain(query, items[row]), strict=True)
    ]
    assert np.mean(same) > 0.97


def test_items_that_the_encoder_has_not_seen_or_leaves_out(folder):
    bundle = bundle_of(exclude_seen=True)
    dense, pooled = Pipeline(bundle), Pipeline(bundle).pooled(CONFIG, folder=folder)
    assert not bundle.models["interest"].warm.all()
    queries = bundle.histories.sample(32)
    expected, found = (pipeline.retrieve(queries, 50).candidates for pipeline in (dense, pooled))
    assert overlap(found, expected) > 0.97 and max(largest_difference(found, expected).values()) < 0.15
    cold, history = np.flatnonzero(~bundle.models["interest"].warm)[:5], queries.items[:5]
    items = np.concatenate([cold, history])[None, :]
    for pipeline in (dense, pooled):
        assert (pipeline.candidates_of(queries[slice(0, 1)], items).log_probs[0, :, 0] < -1e8).all()


def test_an_index_is_built_once_for_the_same_vectors(bundle, pooled, folder):
    files = {path: path.stat().st_mtime_ns for path in Path(folder).glob("*/index.faiss")}
    assert len(files) >= 3, "interest, content, dot product"
    again = Pipeline(bundle).pooled(CONFIG, folder=folder)
    assert again.pools is not None and {path: path.stat().st_mtime_ns for path in files} == files
    assert again.pooled(PoolConfig(items_from=N + 1), folder=folder).pools is None, "small enough to score all"
    assert again.pooled(CONFIG, folder=folder).pools is not None
    again.use(again.fusion)
    assert again.pools is None, "another mixture, other sources"


def test_batch_lists_come_from_pools_too(bundle, dense, queries, folder, monkeypatch, tmp_path):
    monkeypatch.setenv("RAYSYS_HOME", str(tmp_path))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "indexes").symlink_to(folder)
    keys = pa.array([f"u{row}" for row in range(len(queries))])
    lists = [
        Stage(bundle, "retrieval", k=20, batch_size=16, threads=1, pools=pools).table(keys, "user_id", queries)["item_id"].to_pylist()
        for pools in (None, CONFIG)
    ]
    assert np.mean([len(set(a) & set(b)) / 20 for a, b in zip(*lists, strict=True)]) > 0.97
    assert all(len(one) == 20 for one in lists[1])


def test_the_last_used_indexes_stay(tmp_path):
    for at in range(4):
        (tmp_path / f"i{at}").mkdir()
        (tmp_path / f"i{at}" / ".lock").touch()
        os.utime(tmp_path / f"i{at}" / ".lock", (at, at))
    (tmp_path / "not-an-index").mkdir()
    drop_unused(str(tmp_path), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i2", "i3", "not-an-index"]


@pytest.mark.parametrize("wrong", [{"items_from": -1}, {"size": 0}, {"sample": 0}, {"target_recall": 0.0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PoolConfig(**wrong)
