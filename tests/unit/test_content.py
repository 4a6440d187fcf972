import numpy as np
import pytest

from raysys.models.content import ContentConfig, ContentNeighbours
from raysys.queries import Queries

EAST, NORTH, NONE = [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]


def uncentred(vectors, decay=0.5, max_history=20) -> ContentNeighbours:
    vectors = np.array(vectors, np.float32)
    return ContentNeighbours(vectors, np.zeros(vectors.shape[1], np.float32), ContentConfig(decay=decay, max_history=max_history))


def test_profile_is_the_decayed_mean_by_hand():
    """North then East at decay 1/2: (1, 1/2), of length sqrt(5) / 2."""
    profile = uncentred([EAST, NORTH]).user_vectors(Queries.from_lists([[1, 0]]))
    np.testing.assert_allclose(profile, [[2 / 5**0.5, 1 / 5**0.5]], rtol=1e-6)


def test_scores_are_cosines_with_the_profile():
    scores = uncentred([EAST, NORTH, NONE]).scores(Queries.from_lists([[1, 0], [0], [2], []]))
    np.testing.assert_allclose(scores, [[2 / 5**0.5, 1 / 5**0.5, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]], rtol=1e-6)


def test_an_item_twice_in_the_history_counts_twice():
    """North, East, East: weights 1/4 north, 1/2 + 1 east."""
    profile = uncentred([EAST, NORTH]).user_vectors(Queries.from_lists([[1, 0, 0]]))[0]
    assert profile[1] / profile[0] == pytest.approx(0.25 / 1.5)


def test_only_the_last_events_make_the_profile():
    profile = uncentred([EAST, NORTH], max_history=1).user_vectors(Queries.from_lists([[1, 1, 1, 0]]))
    np.testing.assert_allclose(profile, [EAST])


def test_what_all_items_share_is_taken_out():
    """Vectors that differ only in their second place become opposite; the mean ignores items without content."""
    model = ContentNeighbours.fit(np.array([[1, 0.1], [1, -0.1], [0, 0]], np.float32))
    np.testing.assert_allclose(model.item_vectors, [[0, 1], [0, -1], [0, 0]], atol=1e-6)


def test_a_new_item_lands_where_it_would_have_been():
    raw = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    model = ContentNeighbours.fit(raw)
    np.testing.assert_allclose(model.transform(raw[4:6]), model.item_vectors[4:6], atol=1e-6)
    assert not model.transform(np.zeros((1, 8), np.float32)).any()


def test_no_item_has_content():
    model = ContentNeighbours.fit(np.zeros((3, 4), np.float32))
    assert not model.scores(Queries.from_lists([[0, 1]])).any()


def test_senseless_decay_is_refused():
    with pytest.raises(ValueError, match="decay"):
        ContentConfig(decay=0)
