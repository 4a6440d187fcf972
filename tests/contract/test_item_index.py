"""What every item index must do, whether it scores all items or few: one suite for each kind and storage."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.errors import SchemaError, StateError
from raysys.index.config import IndexConfig
from raysys.index.files import build, open_index
from raysys.index.items import ItemIndex

N, D, MAX_FRESH = 2000, 16, 50
KINDS = {
    "exact float32": IndexConfig(kind="exact", max_fresh=MAX_FRESH),
    "exact bf16": IndexConfig(kind="exact", storage="bf16", max_fresh=MAX_FRESH),
    "exact int8": IndexConfig(kind="exact", storage="int8", max_fresh=MAX_FRESH),
    "approximate": IndexConfig(kind="approximate", target_recall=0.95, k=20, max_fresh=MAX_FRESH),
}
TOLERANCE = {"exact float32": 1e-5, "exact bf16": 0.01, "exact int8": 0.03, "approximate": 0.03}
"""Largest error of a dot product of unit vectors: that of rounding 16 components once."""


def unit(values):
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((40, D))
    return unit(centres[rng.integers(0, 40, N)] + 0.5 * rng.standard_normal((N, D)))


@pytest.fixture(scope="module", params=KINDS)
def opened(request, vectors, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("index"))
    build(folder, vectors, config=KINDS[request.param], queries=vectors[::7])
    return open_index(folder), TOLERANCE[request.param]


@pytest.fixture
def index(opened):
    """Without the changes of other tests."""
    return ItemIndex(opened[0].base, max_fresh=MAX_FRESH)


def check(index, tolerance, truth, queries, k, allowed=None, seen=None):
    """Every answer holds what may appear, as many as there are, with scores as they should be; recall of the best."""
    rows, scores = index.search(queries, k, allowed=allowed, seen=seen)
    assert rows.shape == scores.shape == (len(queries), k) and rows.dtype == np.int32 and scores.dtype == np.float32
    hits = wanted = 0
    for one, query in enumerate(queries):
        hidden = set() if seen is None else set(seen[1][seen[0][one] : seen[0][one + 1]].tolist())
        may = [row for row in truth if row not in hidden and (allowed is None or (row < len(allowed) and allowed[row]))]
        found = rows[one][rows[one] >= 0].tolist()
        assert len(found) == len(set(found)) == min(k, len(may)), "as many as may appear, none twice"
        assert set(found) <= set(may)
        assert (rows[one][len(found) :] == -1).all() and np.isneginf(scores[one][len(found) :]).all()
        exact = {row: float(truth[row] @ query) for row in may}
        np.testing.assert_allclose(scores[one][: len(found)], [exact[row] for row in found], atol=tolerance)
        pairs = list(zip(-scores[one][: len(found)], found, strict=True))
        assert pairs == sorted(pairs), "best first, ties by lower row"
        best = sorted(exact, key=lambda row: -exact[row])[:k]
        hits, wanted = hits + len(set(best) & set(found)), wanted + len(best)
    return hits / wanted if wanted else 1.0


def truth_of(vectors):
    return dict(enumerate(vectors))


def test_the_best_are_found(index, opened, vectors):
    queries = vectors[5::200]
    assert check(index, opened[1], truth_of(vectors), queries, 20) >= 0.9
    assert check(index, opened[1], truth_of(vectors), queries, 200) >= 0.9
    assert len(index) == N


def test_a_narrow_filter_still_gives_k(index, opened, vectors):
    """Items of all clusters are left, far from most queries: lists near the query hold none of them."""
    allowed = np.zeros(N, bool)
    allowed[np.random.default_rng(1).choice(N, 20, replace=False)] = True
    assert check(index, opened[1], truth_of(vectors), vectors[:8], 20, allowed=allowed) == 1.0
    assert check(index, opened[1], truth_of(vectors), vectors[:8], 4, allowed=allowed) >= 0.9
    per_query = np.stack([np.roll(allowed, shift) for shift in range(8)])
    rows, _ = index.search(vectors[:8], 20, allowed=per_query)
    assert (rows >= 0).all() and np.take_along_axis(per_query, rows, 1).all()


def test_a_cluster_far_away(index, opened, vectors):
    """Only the worst items of a query are allowed: no list near it holds any."""
    allowed = np.zeros(N, bool)
    allowed[np.argsort(vectors @ vectors[0])[:300]] = True
    assert check(index, opened[1], truth_of(vectors), vectors[:1], 100, allowed=allowed) >= 0.8


def test_seen_items_do_not_cost_results(index, opened, vectors):
    queries = vectors[:3]
    best = index.search(queries, 300)[0]
    seen = (np.array([0, 250, 250, 251]), np.concatenate([best[0, :250], best[2, :1]]))
    assert check(index, opened[1], truth_of(vectors), queries, 30, seen=seen) >= 0.85


def test_more_than_there_is(index, opened, vectors):
    assert check(index, opened[1], truth_of(vectors), vectors[:2], N + 10) == 1.0
    assert (index.search(vectors[:2], 5, allowed=np.zeros(N, bool))[0] == -1).all()
    assert (index.search(vectors[:2], 5, allowed=np.zeros(0, bool))[0] == -1).all(), "rows beyond the mask are not allowed"
    assert index.search(vectors[:0], 5)[0].shape == (0, 5)


def test_an_insert_is_visible_at_once_and_a_delete_gone(index, opened, vectors):
    query = unit(np.ones((1, D)))
    started = time.perf_counter()
    index.insert([N + 7], query)
    rows, scores = index.search(query, 3)
    assert time.perf_counter() - started < 0.1, "the promise is 100 ms"
    assert rows[0, 0] == N + 7 and scores[0, 0] == pytest.approx(1.0, abs=1e-6)
    truth = truth_of(vectors) | {N + 7: query[0]}
    index.delete([rows[0, 1], 10**6])
    del truth[int(rows[0, 1])]
    assert len(index) == N
    assert check(index, opened[1], truth, query, 20) >= 0.9
    index.delete([N + 7])
    del truth[N + 7]
    assert check(index, opened[1], truth, query, 20) >= 0.9


def test_an_insert_replaces(index, opened, vectors):
    """Row 3 of the base gets another vector, twice; row 4 comes back after it was deleted."""
    query = unit(np.ones((1, D)))
    index.insert([3], -query)
    index.insert([3], query)
    index.delete([4])
    index.insert([4], query)
    rows, _ = index.search(query, 5)
    assert rows[0, :2].tolist() == [3, 4], "equal scores: the lower row first"
    assert len(index) == N and index.num_fresh == 2
    check(index, opened[1], truth_of(vectors) | {3: query[0], 4: query[0]}, query, 50)


def test_what_does_not_fit_is_refused(index, vectors):
    with pytest.raises(SchemaError, match=r"expected \(2, 16\) finite vectors, one a row, got shape \(1, 16\)"):
        index.insert([1, 2], vectors[:1])
    with pytest.raises(SchemaError, match="finite"):
        index.insert([1], np.full((1, D), np.nan))
    with pytest.raises(SchemaError, match="distinct rows"):
        index.insert([1, 1], vectors[:2])
    with pytest.raises(SchemaError, match=r"expected queries \(B, 16\)"):
        index.search(vectors[:2, :3], 5)
    with pytest.raises(SchemaError, match=r"expected allowed \(R,\) or \(2, R\), got \(3, 5\)"):
        index.search(vectors[:2], 5, allowed=np.ones((3, 5), bool))
    index.insert(np.arange(N, N + MAX_FRESH), vectors[:MAX_FRESH])
    with pytest.raises(StateError, match="50 items are waiting for the next build of the index and 1 more came"):
        index.insert([0], vectors[:1])
    assert len(index) == N + MAX_FRESH, "a refused insert changes nothing"
    index.insert([N], vectors[:1])


def test_searches_while_it_changes(index, vectors):
    """Every search sees whole states: rows come and go in pairs of one vector, so both are there or none."""
    query, stop, odd = unit(np.ones((1, D))), threading.Event(), []

    def change():
        while not stop.is_set():
            index.insert([N, N + 1], np.repeat(query, 2, 0))
            index.delete([N, N + 1])

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(50):
            found = set(index.search(query, 10)[0][0].tolist())
            if len(found & {N, N + 1}) == 1:
                odd.append(found)
    finally:
        stop.set()
        thread.join()
    assert not odd


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_changes_and_filters_equal_brute_force(opened, vectors, data):
    base, tolerance = opened
    index, truth = ItemIndex(base.base, max_fresh=MAX_FRESH), truth_of(vectors)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    for _ in range(data.draw(st.integers(0, 4))):
        rows = rng.choice(N + 20, data.draw(st.integers(1, 10)), replace=False)
        if data.draw(st.booleans()):
            fresh = unit(rng.standard_normal((len(rows), D)))
            index.insert(rows, fresh)
            truth |= dict(zip(rows.tolist(), fresh, strict=True))
        else:
            index.delete(rows)
            truth = {row: vector for row, vector in truth.items() if row not in set(rows.tolist())}
    queries = unit(rng.standard_normal((data.draw(st.integers(1, 3)), D)))
    share = data.draw(st.sampled_from([None, 0.0, 0.002, 0.1, 0.9]))
    allowed = None if share is None else rng.random(data.draw(st.sampled_from([N - 5, N + 20]))) < share
    lengths = rng.integers(0, 30, len(queries))
    seen = (np.concatenate([[0], np.cumsum(lengths)]), rng.integers(0, N + 20, lengths.sum())) if data.draw(st.booleans()) else None
    recall = check(index, tolerance, truth, queries, data.draw(st.sampled_from([1, 10, 150])), allowed, seen)
    if tolerance <= 1e-5:
        assert recall == 1.0
