"""What histories say of items: numbers by hand, and two camps of taste."""

import numpy as np
import pytest

from raysys.models.grading import Grading
from raysys.models.opinions import FEATURES, OpinionConfig, Opinions
from raysys.prepare.dataset import Sequences
from raysys.queries import Queries

EVENTS = ["other", "view", "purchase", "rating"]
TYPES = {"view": {"positive": False}, "purchase": {"positive": True}, "rating": {"positive": True, "min_value": 4.0}}
RATING = 3
NO_TABLE = np.zeros((8, 0), np.float32)


def rated(histories, values) -> Sequences:
    """Ratings of some users in the order of time, liked from 4."""
    queries = Queries.from_lists(histories, [[RATING] * len(row) for row in histories], values=values)
    return Sequences(
        np.arange(len(histories), dtype=np.int32),
        queries.indptr,
        queries.items,
        queries.events,
        queries.times,
        queries.values,
        queries.values >= 4,
        np.zeros(len(queries.items), np.int8),
    )


def camps(num_users: int = 60) -> Sequences:
    """Items 0 to 3 against 4 to 7: every user loves the one half and cannot bear the other."""
    rng = np.random.default_rng(0)
    histories = [rng.permutation(8).tolist() for _ in range(num_users)]
    return rated(histories, [[5 if (item < 4) == (user % 2 == 0) else 1 for item in row] for user, row in enumerate(histories)])


def column(features: np.ndarray, name: str) -> np.ndarray:
    return features[..., FEATURES.index(name)]


def test_an_event_is_graded_by_its_value_where_values_decide_else_by_its_kind():
    sequences = rated([[0, 1], [2, 3]], [[1, 3], [5, 3]])  # mean 3, standard deviation sqrt(2), one of four is positive
    grading = Grading.of(sequences, EVENTS, TYPES)
    events, values = np.array([3, 3, 3, 2, 1, 0], np.int8), np.array([5, 4, np.nan, 20, 20, np.nan], np.float32)
    assert grading.liked(events, values).tolist() == [True, True, False, True, False, False]
    no, yes = -0.25 / np.sqrt(0.25 * 0.75), 0.75 / np.sqrt(0.25 * 0.75)
    assert grading.grade(events, values) == pytest.approx([np.sqrt(2), 1 / np.sqrt(2), no, yes, no, no], abs=1e-6)


def test_offsets_are_shrunk_means_of_what_users_left():
    sequences = rated([[0, 1], [0, 2]], [[5, 1], [5, 1]])  # mean 3, deviation 2: grades 1 and -1
    grading = Grading.of(sequences, EVENTS, TYPES)
    alone = Opinions.fit(sequences, 8, grading, OpinionConfig(item_prior=1, user_prior=1e9, dim=2))
    assert alone.offsets == pytest.approx([2 / 3, -1 / 2, -1 / 2, 0, 0, 0, 0, 0])
    assert alone.counts[:3].tolist() == [2, 1, 1] and alone.likes[:3].tolist() == [2, 0, 0]


def test_features_of_a_user_by_hand():
    sequences = rated([[0, 1], [0, 2]], [[5, 1], [5, 1]])
    model = Opinions.fit(sequences, 8, Grading.of(sequences, EVENTS, TYPES), OpinionConfig(item_prior=1, user_prior=1e9, dim=2))
    model.config = OpinionConfig(item_prior=1, user_prior=2, dim=2)
    query = Queries.from_lists([[0, 1]], [[RATING] * 2], [[1000, 5000]], [5060], [[5, 1]])
    found = model.features(query, np.array([[2]]), NO_TABLE, NO_TABLE)
    left = np.array([1 - 2 / 3, -1 + 1 / 2])
    assert column(found, "user_offset")[0, 0] == pytest.approx(left.sum() / (2 + 2))
    assert column(found, "user_likes")[0, 0] == pytest.approx(0)  # one of two where one of two is usual
    assert column(found, "user_latest")[0, 0] == pytest.approx((0.6 * left[0] + left[1]) / (1.6 + 1))
    assert column(found, "item_likes")[0, 0] == pytest.approx(np.log(0.25 / 0.75))  # (0 + 1 * .5) of (1 + 1)
    assert column(found, "gap")[0, 0] == pytest.approx(np.log(61)) and column(found, "session")[0, 0] == pytest.approx(np.log(2))
    assert column(found, "history")[0, 0] == pytest.approx(np.log(3))


def test_a_user_is_folded_into_the_right_camp():
    sequences = camps()
    model = Opinions.fit(sequences, 8, Grading.of(sequences, EVENTS, TYPES), OpinionConfig(dim=3, ridge=1.0))
    query = Queries.from_lists([[0, 4], [0, 4]], [[RATING] * 2] * 2, values=[[5, 1], [1, 5]])
    agreement = column(model.features(query, np.tile(np.arange(8), (2, 1)), NO_TABLE, NO_TABLE), "agreement")
    assert agreement[0, :4].min() > 0.2 > -0.2 > agreement[0, 4:].max()
    assert agreement[1, 4:].min() > 0.2 > -0.2 > agreement[1, :4].max()


def test_likes_of_near_items_count():
    sequences = camps()
    model = Opinions.fit(sequences, 8, Grading.of(sequences, EVENTS, TYPES), OpinionConfig(near=2))
    table = np.eye(2, dtype=np.float32)[[0, 0, 0, 0, 1, 1, 1, 1]] * 3
    query = Queries.from_lists([[5, 5, 0, 4]], [[RATING] * 4], values=[[1, 1, 5, 1]])
    found = model.features(query, np.array([[1, 5]]), table, NO_TABLE)
    assert column(found, "near_mass")[0].tolist() == [1, 1], "of the last two, one is alike each"
    assert column(found, "near_grade")[0, 0] > 0 > column(found, "near_grade")[0, 1]
    assert not column(found, "content_mass").any()


def test_a_batch_says_what_its_queries_say_alone():
    sequences = camps()
    model = Opinions.fit(sequences, 8, Grading.of(sequences, EVENTS, TYPES))
    table = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)
    queries = Queries.stack([sequences.queries_before(np.array([1, 13, 23])), Queries.from_lists([[]])])
    items = np.array([[3, 4, 5], [0, 1, 2], [6, 7, 0], [1, 5, 3]])
    together = model.features(queries, items, table, table)
    assert np.isfinite(together).all()
    for row in range(4):
        alone = np.stack(
            [model.features(queries.take(np.array([row])), items[row : row + 1, k : k + 1], table, table)[0, 0] for k in range(3)]
        )
        np.testing.assert_allclose(alone, together[row], atol=1e-4)


def test_new_events_count_and_new_items_have_rows():
    sequences = camps(6)
    grading = Grading.of(sequences, EVENTS, TYPES)
    model = Opinions.fit(sequences, 8, grading, OpinionConfig(user_prior=1e9))
    more = rated([[0, 1, 8]], [[1, 5, 5]])
    bigger = model.grown(1).update(more, np.array([False, True, True]))
    assert (bigger.counts[:8] - model.counts).tolist() == [0, 1, 0, 0, 0, 0, 0, 0] and bigger.counts[8] == bigger.likes[8] == 1
    assert bigger.residuals[8] == pytest.approx(grading.grade(np.array([RATING]), np.array([5.0]))[0], abs=1e-5)
    arrays, meta = bigger.to_arrays()
    assert all(np.isfinite(array).all() for array in arrays.values()), "the learner publishes nothing else"
    back = Opinions.from_arrays(arrays, meta)
    query = Queries.from_lists([[0, 1]], [[RATING] * 2], values=[[1, 5]])
    table = np.zeros((9, 0), np.float32)
    np.testing.assert_array_equal(*(one.features(query, np.array([[8, 2]]), table, table) for one in (back, bigger)))
