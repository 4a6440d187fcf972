"""The best of each row: the order of a stable sort, whatever is equal."""

import numpy as np
import pytest

from raysys.models.base import top_k


@pytest.mark.parametrize("k", [1, 7, 40, 41])
def test_equal_scores_go_by_column(k):
    scores = np.random.default_rng(0).integers(0, 6, (50, 40)).astype(np.float32)
    scores[0], scores[1] = 1.0, np.arange(40)  # all alike, none alike
    scores[2, 10:] = -np.inf
    np.testing.assert_array_equal(top_k(scores, k), np.argsort(-scores, axis=1, kind="stable")[:, :k])


@pytest.mark.parametrize("ascending", [False, True])
def test_many_items(ascending):
    """More than the sample needs; sorted columns are those that a sample is right about, and all in its gaps those that it is not."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(20, 5000)).round(2).astype(np.float32)
    scores[0] = np.sort(scores[0])
    scores[1] = 0.0
    scores[1, 1::8] = 1.0  # of the 625 best the sample sees none
    scores[2] = np.nan
    scores[3, :4900] = -np.inf
    if ascending:
        scores = scores[:, ::-1]
    np.testing.assert_array_equal(top_k(scores, 100), np.argsort(-scores, axis=1, kind="stable")[:, :100])


def test_what_is_not_a_number_comes_last():
    scores = np.array([[np.nan, 1.0, 3.0, 2.0], [4.0, 1.0, 3.0, 2.0]], np.float32)
    np.testing.assert_array_equal(top_k(scores, 2), [[2, 3], [0, 2]])
