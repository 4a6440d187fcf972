import numpy as np
import pytest

from raysys.models.linear import Linear, LinearConfig
from raysys.prepare.dataset import Sequences
from raysys.queries import Queries
from tests.histories import sequences


def pieces(histories, events=None) -> list[Sequences]:
    """The users in two pieces, as a streamed training has them."""
    half = len(histories) // 2
    parts = [slice(0, half), slice(half, None)]
    return [sequences(histories[part], None if events is None else events[part]) for part in parts]


def regressed(histories, num_items, config):
    """The same coefficients from the positions one by one, as the definition says."""
    gram, cross = np.zeros((num_items, num_items)), np.zeros((num_items, num_items))
    for history in histories:
        for now in range(len(history) - 1):
            seen, target = np.zeros(num_items), np.zeros(num_items)
            for at in range(now + 1):
                seen[history[at]] += config.decay ** (now - at)
            target[history[now + 1]] = 1
            gram += np.outer(seen, seen)
            cross += np.outer(seen, target)
    own = np.diag(gram).copy()
    coefficients = np.linalg.solve(gram + np.diag(config.own_ridge * own + config.ridge), cross)
    np.fill_diagonal(coefficients, 0)
    return coefficients


def test_pairs_give_what_the_positions_give():
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 7, length).tolist() for length in (5, 1, 0, 8, 2, 6)]
    config = LinearConfig(decay=0.7, ridge=0.5, own_ridge=0.25)
    model = Linear.fit(pieces(histories), 7, config)
    np.testing.assert_allclose(model.matrix.toarray(), regressed(histories, 7, config), rtol=1e-3, atol=1e-5)


def test_scores_are_the_sums_spelt_out():
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 7, length).tolist() for length in (5, 1, 0, 8, 2, 6)]
    model = Linear.fit(pieces(histories), 7, LinearConfig(window=4))
    queries = Queries.from_lists(histories)  # items come twice in some
    scores = model.scores(queries)
    assert scores.dtype == np.float32 and np.count_nonzero(scores) > 20
    np.testing.assert_allclose(scores, model.sums(queries).toarray(), atol=1e-6)


def test_one_pair_by_hand():
    """Item 0 is seen once with its next event: gram 1, penalties 1 + 1, cross 1. A third."""
    model = Linear.fit(pieces([[0, 1]]), 3, LinearConfig(ridge=1.0, own_ridge=1.0))
    np.testing.assert_allclose(model.scores(Queries.from_lists([[0]]))[0], [0, 1 / 3, 0], atol=1e-6)


def test_an_item_gets_no_credit_for_what_another_explains():
    """0 leads to 2; 1 often stands before 0, and leads to 3 where it stands alone. Counting pairs would let 1 speak for 2."""
    histories = [[1, 0, 2]] * 20 + [[1, 3]] * 20 + [[0, 2]] * 20
    model = Linear.fit(pieces(histories), 4, LinearConfig(ridge=0.1, own_ridge=0.0))
    matrix = model.matrix.toarray()
    assert matrix[0, 2] > 0.8 and matrix[1, 3] > 0.3 and matrix[1, 2] < 0.1
    assert model.contributions(Queries.from_lists([[1, 0]]), np.array([2, 3, 0])).tolist() == [0, 1, 1]


def test_only_the_largest_coefficients_are_kept():
    rng = np.random.default_rng(1)
    histories = [rng.integers(0, 9, 12).tolist() for _ in range(30)]
    whole, cut = (Linear.fit(pieces(histories), 9, LinearConfig(neighbours=count)).matrix.toarray() for count in (9, 3))
    assert (np.count_nonzero(cut, axis=1) == 3).all()
    for row, kept in zip(whole, cut):
        assert np.abs(row[kept == 0]).max() <= np.abs(row[kept != 0]).min()
        np.testing.assert_array_equal(row[kept != 0], kept[kept != 0])


def test_events_of_no_weight_are_not_looked_at():
    model = Linear.fit(pieces([[0, 1, 2]], events=[[1, 2, 1]]), 3, event_weights=[1.0, 1.0, 0.0])
    assert model.matrix[0, 2] > 0 and model.matrix[0, 1] == 0


@pytest.mark.parametrize("wrong", [{"decay": 1.0}, {"own_ridge": -1.0}, {"window": 0}, {"ridge": 0.0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        LinearConfig(**wrong)


def test_a_catalogue_that_is_too_large_is_refused():
    with pytest.raises(ValueError, match="max_items"):
        Linear.fit(pieces([[0, 1]]), 3, LinearConfig(max_items=2))
