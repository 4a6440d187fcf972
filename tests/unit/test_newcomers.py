"""Items without events take the place that their content gives them."""

import numpy as np
import pytest
import torch

from raysys.models.interest import NO_EVIDENCE, InterestConfig, InterestEncoder, InterestRetriever
from raysys.models.newcomers import neighbour_weights, placed
from raysys.queries import Queries

CONTENT = np.array([[1, 0], [0.8, 0.6], [0, 1], [0.6, 0.8], [1, 0], [0, 0]], np.float32)
WARM = np.array([True, True, True, True, False, False])


def test_weights_are_cosines_with_known_items_that_share_something():
    weights = neighbour_weights(CONTENT[:4], np.array([[1, 0], [0, 0]], np.float32), np.array([True, True, True, False]))
    assert weights[0] == pytest.approx([1 / 1.8, 0.8 / 1.8, 0, 0])
    assert weights[1] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0]), "content says nothing: all known items alike"
    assert neighbour_weights(None, np.zeros((1, 0)), WARM)[0] == pytest.approx([0.25] * 4 + [0, 0])


def test_a_cold_item_stands_among_its_neighbours_and_the_others_stay():
    torch.manual_seed(0)
    encoder = InterestEncoder(6, 2, InterestConfig(dim=8, num_layers=1, num_heads=1, max_length=4, dropout=0.0))
    before = InterestRetriever(encoder, WARM)
    after = placed(before, CONTENT)
    assert after.warm.tolist() == [True] * 5 + [False], "an item without content stays silent"
    expected = neighbour_weights(CONTENT, CONTENT[4:5], WARM)[0] @ before.item_vectors
    np.testing.assert_allclose(after.item_vectors[4], expected / np.linalg.norm(expected), atol=1e-5)
    query = Queries.from_lists([[0, 1], [2]])
    np.testing.assert_array_equal(after.scores(query)[:, :4], before.scores(query)[:, :4])
    assert (after.scores(query)[:, 4] > -100).all() and (before.scores(query)[:, 4] == NO_EVIDENCE).all()
    assert placed(after, CONTENT) is after, "nobody is left to place"
