"""The formulas against numbers worked by hand, and training against a planted truth.

By hand, N = 2 items, D = 2 interests, W = [[ln 3, 0], [0, 0]], E = [[1, 0], [0.2, 0.6]]:

    h = (1, 0)       W h = (ln 3, 0)      u = (3, 1) / 4 = (0.75, 0.25)
    r_0 = 0.75 * 1 + 0.25 * 0 = 0.75      r_1 = 0.75 * 0.2 + 0.25 * 0.6 = 0.3
    h = (1/2, 1/2)   W h = (ln 3 / 2, 0)  u = (sqrt 3, 1) / (sqrt 3 + 1) = (0.633975, 0.366025)

    labels (1, 0):   MSE = ((0.75 - 1)^2 + (0.3 - 0)^2) / 2 = (0.0625 + 0.09) / 2 = 0.07625
    p = sigmoid(r):  sigmoid(0.75) = 0.679179, sigmoid(0.3) = 0.574443
                     CE = -(ln 0.679179 + ln 0.425557) / 2 = (0.386871 + 0.854355) / 2 = 0.620613
"""

import numpy as np
import pytest

from raysys.models.dot_product import DotProduct, DotProductConfig, cross_entropy, interest_vector, mse
from raysys.queries import Queries
from tests.unit.test_covisit import sequences

W = np.array([[np.log(3), 0], [0, 0]])
E = np.array([[1, 0], [0.2, 0.6]])


@pytest.fixture
def model() -> DotProduct:
    return DotProduct(W, E, (1.0, 0.0), DotProductConfig(dim=2))


def test_interest_vector_is_the_softmax_by_hand():
    np.testing.assert_allclose(interest_vector(np.array([1.0, 0.0]), W), [0.75, 0.25])
    np.testing.assert_allclose(interest_vector(np.array([0.5, 0.5]), W), [0.633975, 0.366025], atol=1e-6)


def test_interest_vector_survives_large_weights():
    np.testing.assert_allclose(interest_vector(np.array([1.0]), np.array([[1000.0], [0.0]])), [1, 0])


def test_scores_by_hand(model):
    np.testing.assert_allclose(model.scores(Queries.from_lists([[0]])), [[0.75, 0.3]], rtol=1e-6)


def test_the_model_uses_the_formula(model):
    users = model.user_vectors(Queries.from_lists([[0], [0, 1], []]))
    by_formula = [interest_vector(np.array(h), W) for h in ([1.0, 0.0], [0.5, 0.5], [0.0, 0.0])]
    np.testing.assert_allclose(users, by_formula, rtol=1e-6)


def test_probability_by_hand(model):
    np.testing.assert_allclose(model.probabilities([0.75, 0.3]), [0.679179, 0.574443], atol=1e-6)
    calibrated = DotProduct(W, E, (2.0, -1.5), DotProductConfig(dim=2))
    np.testing.assert_allclose(calibrated.probabilities([0.75]), [0.5])


def test_losses_by_hand(model):
    assert mse([0.75, 0.3], [1, 0]) == pytest.approx(0.07625)
    assert cross_entropy(model.probabilities([0.75, 0.3]), [1, 0]) == pytest.approx(0.620613, abs=1e-6)
    assert cross_entropy([0.5, 0.5], [1, 0]) == pytest.approx(np.log(2))


def test_only_the_last_events_count():
    model = DotProduct(W, E, (1.0, 0.0), DotProductConfig(dim=2, max_history=1))
    np.testing.assert_allclose(model.scores(Queries.from_lists([[1, 0]])), [[0.75, 0.3]], rtol=1e-6)


@pytest.fixture(scope="module")
def camps():
    """Users stay among the even or among the odd items of 0..9."""
    rng = np.random.default_rng(0)
    return sequences([(2 * rng.integers(0, 5, 8) + user % 2).tolist() for user in range(60)])


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_learns_planted_camps(camps, loss):
    model = DotProduct.fit(camps, 10, DotProductConfig(dim=4, loss=loss, steps=300, batch_size=64))
    even, odd = model.scores(Queries.from_lists([[0, 2], [1, 3]]))
    assert even[::2].min() > even[1::2].max()
    assert odd[1::2].min() > odd[::2].max()


def test_mse_probabilities_are_calibrated_on_what_training_draws(camps):
    """Half of all items are of the user's own camp; those are next with 1/5 each, against 8 uniform draws labelled 0."""
    model = DotProduct.fit(camps, 10, DotProductConfig(dim=4, loss="mse", steps=600, batch_size=64))
    probabilities = model.probabilities(model.scores(Queries.from_lists([[0, 2]])))[0]
    expected = (1 / 5) / (1 / 5 + 8 / 10)
    assert probabilities[::2].mean() == pytest.approx(expected, abs=0.06)
    assert probabilities[1::2].mean() < 0.1


def test_same_seed_same_model(camps):
    config = DotProductConfig(dim=4, steps=10)
    first, second, other = (DotProduct.fit(camps, 10, config, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.weights, second.weights)
    assert not np.array_equal(first.weights, other.weights)


def test_large_catalogues_are_sampled_and_still_learnt(camps, monkeypatch):
    monkeypatch.setattr("raysys.models.dot_product.MAX_SOFTMAX_ITEMS", 6)
    model = DotProduct.fit(camps, 10, DotProductConfig(dim=4, steps=200, batch_size=64))
    even = model.scores(Queries.from_lists([[0, 2]]))[0]
    assert even[::2].min() > even[1::2].max()


def test_nothing_to_learn_from_gives_an_untrained_model():
    model = DotProduct.fit(sequences([[0], [1]]), 2, DotProductConfig(dim=2))
    assert np.isfinite(model.scores(Queries.from_lists([[0]]))).all()
