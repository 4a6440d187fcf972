"""What every retrieval source promises, whatever is inside."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from raysys.models.base import Retriever, top_k
from raysys.models.content import ContentNeighbours
from raysys.models.covisit import Covisitation
from raysys.models.dot_product import DotProduct, DotProductConfig
from raysys.models.interest import InterestConfig, InterestEncoder, InterestRetriever
from raysys.models.kinds import Kinds
from raysys.models.linear import Linear
from raysys.models.popularity import Popularity
from raysys.prepare.dataset import Sequences
from raysys.queries import Queries

NUM_ITEMS = 30
NEVER_SEEN = NUM_ITEMS - 1
"""An item of the catalogue without a single event."""


def histories(num_users: int = 40, seed: int = 0) -> Sequences:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 9, num_users)
    total = int(lengths.sum())
    return Sequences(
        np.arange(num_users, dtype=np.int32),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        rng.integers(0, NEVER_SEEN, total).astype(np.int32),
        rng.integers(0, 3, total).astype(np.int8),
        1_700_000_000 + 3600 * np.arange(total, dtype=np.int64),
        np.full(total, np.nan, np.float32),
        np.ones(total, bool),
        np.zeros(total, np.int8),
    )


def _interest() -> InterestRetriever:
    torch.manual_seed(0)
    counts = np.bincount(histories().items, minlength=NUM_ITEMS)
    return InterestRetriever.from_encoder(InterestEncoder(NUM_ITEMS, 3, InterestConfig(dim=16, max_length=6)), counts)


def _content() -> ContentNeighbours:
    vectors = np.random.default_rng(1).standard_normal((NUM_ITEMS, 12)).astype(np.float32)
    vectors[3] = 0
    return ContentNeighbours.fit(vectors)


def _kinds() -> Kinds:
    counted = np.bincount(histories().items, minlength=NUM_ITEMS)
    model = Kinds.of(np.arange(NUM_ITEMS) % 4, counted, event_weights=[1.0, 2.0, 0.5])
    return model.update(histories(), np.ones(len(histories().items), bool))


BUILDERS = {
    "covisit": lambda: Covisitation.fit(histories(), NUM_ITEMS, event_weights=[1.0, 2.0, 0.5]),
    "linear": lambda: Linear.fit([histories()], NUM_ITEMS, event_weights=[1.0, 2.0, 0.5]),
    "popularity": lambda: Popularity.fit(histories(), NUM_ITEMS, event_weights=[1.0, 2.0, 0.5]),
    "content": _content,
    "kinds": _kinds,
    "dot_product": lambda: DotProduct.fit(histories(), NUM_ITEMS, DotProductConfig(dim=4, steps=5, batch_size=16), seed=3),
    "interest": _interest,
}


@pytest.fixture(params=list(BUILDERS), scope="module")
def model(request):
    return BUILDERS[request.param]()


@pytest.fixture(scope="module")
def queries() -> Queries:
    lists = [[1, 2, 3], [], [5], [7, 7, 2, 9, 11, 12, 13, 14, 15, 16], [3], [NEVER_SEEN]]
    return Queries.from_lists(lists, events=[[1] * len(row) for row in lists])


def test_is_a_retriever_under_its_own_name(model):
    assert isinstance(model, Retriever)
    assert BUILDERS[model.name]().name == model.name


def test_scores_are_finite_float32_over_the_whole_catalogue(model, queries):
    scores = model.scores(queries)
    assert scores.dtype == np.float32
    assert scores.shape == (len(queries), NUM_ITEMS)
    assert np.isfinite(scores).all()


def test_batch_equals_single(model, queries):
    batch = model.scores(queries)
    for row in range(len(queries)):
        np.testing.assert_allclose(model.scores(queries[row : row + 1])[0], batch[row], rtol=1e-4, atol=1e-5)


def test_histories_do_not_leak_into_each_other(model, queries):
    other = Queries.from_lists([[20, 21, 22], [5]], events=[[1, 1, 1], [1]])
    np.testing.assert_allclose(model.scores(other)[1], model.scores(queries)[2], rtol=1e-4, atol=1e-5)


def test_caller_may_write_into_the_scores(model, queries):
    before = model.scores(queries).copy()
    model.scores(queries)[:] = -np.inf
    np.testing.assert_array_equal(model.scores(queries), before)


def test_empty_history_says_nothing_about_the_user(model):
    """Popularity has an opinion without a user; all others are constant over the items that were ever seen."""
    scores = model.scores(Queries.from_lists([[], []]))
    np.testing.assert_array_equal(scores[0], scores[1])
    seen = np.bincount(histories().items, minlength=NUM_ITEMS) > 0
    if model.name == "popularity":
        assert np.ptp(scores[0]) > 0
    elif model.name != "interest":  # a sequence model starts from its own prior; fusion never asks it
        assert np.ptp(scores[0][seen]) == 0


def test_no_query_at_all(model):
    assert model.scores(Queries.from_lists([])).shape == (0, NUM_ITEMS)


def test_k_larger_than_the_catalogue_gives_every_item_once(model, queries):
    best = top_k(model.scores(queries), NUM_ITEMS + 100)
    assert best.shape == (len(queries), NUM_ITEMS)
    assert all(sorted(row) == list(range(NUM_ITEMS)) for row in best.tolist())


def test_built_twice_scores_the_same(model, queries):
    np.testing.assert_array_equal(BUILDERS[model.name]().scores(queries), model.scores(queries))


def test_round_trip_through_safetensors(model, queries):
    arrays, meta = model.to_arrays()
    loaded = type(model).from_arrays(load(save({name: np.ascontiguousarray(array) for name, array in arrays.items()})), meta)
    exact, back = model.scores(queries), loaded.scores(queries)
    # Content vectors are stored in half precision.
    np.testing.assert_allclose(back, exact, rtol=1e-3, atol=2e-3)
    arrays_again, meta_again = loaded.to_arrays()
    assert meta_again == meta
    assert {name: array.dtype for name, array in arrays_again.items()} == {name: array.dtype for name, array in arrays.items()}


def test_meta_is_json(model):
    import json

    _, meta = model.to_arrays()
    assert json.loads(json.dumps(meta)) == meta
