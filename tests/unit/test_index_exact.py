import numpy as np
import pytest
import torch

from raysys.errors import SchemaError
from raysys.index import exact
from raysys.index.exact import exact_top_k, top_k_on_device


def reference(queries, items, k, seen=None, allowed=None):
    """Every score in float64 of integers (exact), fully sorted: higher first, then lower row."""
    scores = queries.astype(np.float64) @ items.astype(np.float64).T
    if allowed is not None:
        scores[:, ~allowed] = -np.inf
    if seen is not None:
        scores[np.repeat(np.arange(len(queries)), np.diff(seen[0])), seen[1]] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(scores, order, 1)
    rows, best = np.where(np.isfinite(best), order, -1), best.astype(np.float32)
    short = ((0, 0), (0, max(0, k - len(items))))
    return np.pad(rows, short, constant_values=-1), np.pad(best, short, constant_values=-np.inf)


def integers(rng, *shape, high=4):
    """Small whole numbers: their products are exact in float32, and full of ties."""
    return rng.integers(-high, high + 1, shape).astype(np.float32)


def searches():
    def on_device(queries, items, k, seen=None, allowed=None):
        return top_k_on_device(
            queries, torch.from_numpy(items), k, seen=seen, allowed=None if allowed is None else torch.from_numpy(allowed)
        )

    return [exact_top_k, on_device]


@pytest.mark.parametrize("search", searches())
def test_by_hand(search):
    items = np.array([[1, 0], [0, 1], [1, 1], [-1, 0], [1, 0]], np.float32)
    queries = np.array([[2, 1], [0, -1], [0, 0]], np.float32)
    # Scores: [2 1 3 -2 2], [0 -1 -1 0 0], all zero. Equal scores go to the lower row.
    rows, scores = search(queries, items, 3)
    assert rows.tolist() == [[2, 0, 4], [0, 3, 4], [0, 1, 2]]
    assert scores.tolist() == [[3, 2, 2], [0, 0, 0], [0, 0, 0]]
    # The first user has seen 2 and 0; row 4 may not appear; the third has seen everything else.
    seen = (np.array([0, 2, 2, 6]), np.array([2, 0, 3, 0, 1, 2], np.int32))
    rows, scores = search(queries, items, 3, seen=seen, allowed=np.array([1, 1, 1, 1, 0], bool))
    assert rows.tolist() == [[1, 3, -1], [0, 3, 1], [-1, -1, -1]]
    assert scores[0].tolist() == [1, -2, -np.inf] and np.isneginf(scores[2]).all()


@pytest.mark.parametrize("search", searches())
@pytest.mark.parametrize(("num_items", "k"), [(1, 3), (50, 100), (1024, 10), (5000, 100), (9001, 7)])
def test_equals_sorting_everything(search, num_items, k):
    rng = np.random.default_rng(num_items)
    queries, items = integers(rng, 700, 8), integers(rng, num_items, 8)
    lengths = rng.integers(0, min(20, num_items), 700)
    seen = (np.concatenate([[0], np.cumsum(lengths)]), rng.integers(0, num_items, lengths.sum()).astype(np.int32))
    allowed = rng.random(num_items) < 0.8
    for arguments in ({}, {"seen": seen}, {"allowed": allowed}, {"seen": seen, "allowed": allowed}):
        expected, found = reference(queries, items, k, **arguments), search(queries, items, k, **arguments)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("direction", [1, -1, 0])
def test_sorted_and_constant_catalogues(direction):
    """Scores that rise with the row beat the threshold every time; constant ones never, and the lowest rows stay."""
    items = (direction * np.arange(20_000, dtype=np.float32))[:, None]
    rows, _ = exact_top_k(np.ones((3, 1), np.float32), items, 50)
    expected = np.arange(50) if direction <= 0 else np.arange(19_999, 19_949, -1)
    assert (rows == expected).all()


def test_not_a_number_and_minus_infinity_never_appear():
    items = np.array([[np.nan], [1.0], [-np.inf], [-1.0]], np.float32)
    rows, _ = exact_top_k(np.ones((1, 1), np.float32), items, 4)
    assert rows.tolist() == [[1, 3, -1, -1]]


def test_threads_do_not_matter():
    rng = np.random.default_rng(0)
    queries, items = rng.standard_normal((1500, 16)).astype(np.float32), rng.standard_normal((6000, 16)).astype(np.float32)
    one, two = exact_top_k(queries, items, 20, threads=1), exact_top_k(queries, items, 20, threads=2)
    assert all((a == b).all() for a, b in zip(one, two, strict=True))
    assert (np.diff(one[1], axis=1) <= 0).all()
    assert exact.QUERY_BLOCK < 1500, "more than one block, or the test says nothing"


def test_what_does_not_fit_is_refused():
    with pytest.raises(SchemaError, match=r"of one D, got \(2, 3\) and \(5, 4\)"):
        exact_top_k(np.zeros((2, 3), np.float32), np.zeros((5, 4), np.float32), 1)
    with pytest.raises(SchemaError, match="k >= 1"):
        exact_top_k(np.zeros((2, 3), np.float32), np.zeros((5, 3), np.float32), 0)
