from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysys.evaluate import metrics

LOG2_3 = np.log2(3)


def test_rank_metrics_by_hand():
    # Ranks 1, 2, 4, miss: NDCG = 1/log2(rank + 1).
    values = {name: array.mean() for name, array in metrics.rank_metrics(np.array([1, 2, 4, 0]), (1, 3, 5)).items()}
    assert values["recall@1"] == Fraction(1, 4)
    assert values["recall@3"] == Fraction(2, 4)
    assert values["recall@5"] == Fraction(3, 4)
    assert values["mrr@3"] == Fraction(3, 8)
    assert values["mrr@5"] == pytest.approx(float(Fraction(7, 16)))  # (1 + 1/2 + 1/4) / 4
    assert values["ndcg@1"] == Fraction(1, 4)
    assert values["ndcg@3"] == pytest.approx((1 + 1 / LOG2_3) / 4)
    assert values["ndcg@5"] == pytest.approx((1 + 1 / LOG2_3 + 1 / np.log2(5)) / 4)


def test_set_metrics_by_hand():
    lists = np.array([[3, 1, 7, 5], [2, 0, -1, -1]])
    targets = np.array([1, 5, 9, 0])  # query 0 wants {1, 5, 9}, query 1 wants {0}
    values = metrics.set_metrics(lists, targets, np.array([0, 3, 4]), (1, 2, 4))
    assert values["recall@2"].tolist() == pytest.approx([1 / 3, 1])
    assert values["recall@4"].tolist() == pytest.approx([2 / 3, 1])
    assert values["hit@1"].tolist() == [0, 0]
    assert values["hit@4"].tolist() == [1, 1]
    assert values["mrr@4"].tolist() == pytest.approx([1 / 2, 1 / 2])
    gain = 1 / LOG2_3
    assert values["ndcg@2"].tolist() == pytest.approx([gain / (1 + gain), gain])
    # Hits at ranks 2 and 4; the best list of length 4 has its three hits at ranks 1, 2, 3.
    assert values["ndcg@4"][0] == pytest.approx((gain + 1 / np.log2(5)) / (1 + gain + 1 / 2))


def test_unknown_targets_count_as_misses_and_padding_never_matches_them():
    lists = np.array([[4, -1]])
    values = metrics.set_metrics(lists, np.array([4, -1]), np.array([0, 2]), (2,))
    assert values["recall@2"].tolist() == [0.5]
    assert metrics.list_ranks(lists, np.array([-1])).tolist() == [0]
    assert metrics.list_ranks(np.array([[4, 9], [4, 9]]), np.array([9, 3])).tolist() == [2, 0]


def test_target_ranks_mask_and_misses():
    scores = np.array([[5.0, 4, 3, 2]] * 4)
    allowed = np.array([[True] * 4, [False, True, True, True], [True, True, False, True], [True] * 4])
    ranks = metrics.target_ranks(scores, np.array([2, 2, 2, -1]), allowed, np.random.default_rng(0))
    assert ranks.tolist() == [3, 2, 0, 0]
    assert metrics.target_ranks(scores, np.array([0, 1, 2, 3]), None, np.random.default_rng(0)).tolist() == [1, 2, 3, 4]


def test_masked_items_do_not_tie_with_a_target_without_score():
    scores = np.array([[-np.inf, -np.inf, 1.0]])
    allowed = np.array([[True, False, True]])
    assert metrics.target_ranks(scores, np.array([0]), allowed, np.random.default_rng(0)).tolist() == [2]


def test_ties_are_broken_uniformly():
    ranks = metrics.target_ranks(np.zeros((20_000, 4)), np.zeros(20_000, int), None, np.random.default_rng(0))
    shares = np.bincount(ranks, minlength=5)[1:] / 20_000
    assert shares == pytest.approx([0.25] * 4, abs=0.015)


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 40))
def test_the_three_forms_agree_on_single_targets(seed, queries, items):
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.arange(queries * items, dtype=float)).reshape(queries, items)
    targets = rng.integers(0, items, queries)
    ranks = metrics.target_ranks(scores, targets, None, rng)
    lists = np.argsort(-scores, axis=1)
    assert (metrics.list_ranks(lists, targets) == ranks).all()
    ks = (1, 3, 10)
    single = metrics.rank_metrics(ranks, ks)
    several = metrics.set_metrics(lists, targets, np.arange(queries + 1), ks)
    for name, values in single.items():
        assert several[name] == pytest.approx(values)
    for k in ks:
        assert (several[f"hit@{k}"] == single[f"recall@{k}"]).all()
        assert (single[f"mrr@{k}"] <= single[f"ndcg@{k}"]).all() and (single[f"ndcg@{k}"] <= single[f"recall@{k}"]).all()
    assert (single["ndcg@3"] <= single["ndcg@10"]).all()


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        hits = (rng.random(300) < 0.3).astype(float)
        low, high = metrics.mean_with_intervals({"hit": hits}, np.arange(300), resamples=300, seed=trial)["hit_interval"]
        covered += low <= 0.3 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_intervals_resample_users_not_queries():
    # 20 users with 100 equal queries each: there are 20 independent observations, not 2,000.
    per_user = np.array([0.0, 1.0] * 10)
    values = {"hit": np.repeat(per_user, 100)}
    low, high = metrics.mean_with_intervals(values, np.repeat(np.arange(20), 100), resamples=2000)["hit_interval"]
    width = high - low
    assert width == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 20), rel=0.15)
    low, high = metrics.mean_with_intervals(values, np.arange(2000), resamples=2000)["hit_interval"]
    assert high - low < width / 5


def test_means_without_resamples_and_without_queries():
    assert metrics.mean_with_intervals({"hit": np.array([1.0, 0.0])}, np.array([7, 7]), resamples=0) == {"hit": 0.5}
    assert metrics.mean_with_intervals({"hit": np.array([])}, np.array([], int)) == {"hit": 0.0}


def test_auc_by_hand():
    # Positives .8, .5; negatives .5, .1: pairs won 1, 1, .5, 1 of 4.
    scores, labels = np.array([0.8, 0.5, 0.5, 0.1]), np.array([True, True, False, False])
    assert metrics.auc(scores, labels) == Fraction(7, 8)
    assert metrics.auc(scores, np.ones(4, bool)) is None


@given(st.integers(0, 2**32 - 1))
def test_auc_equals_the_count_of_pairs_and_flips(seed):
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 5, 30).astype(float), rng.random(30) < 0.4
    positives, negatives = scores[labels], scores[~labels]
    expected = None
    if len(positives) and len(negatives):
        difference = positives[:, None] - negatives
        expected = pytest.approx(((difference > 0) + 0.5 * (difference == 0)).mean())
        assert metrics.auc(-scores, labels) == pytest.approx(1 - metrics.auc(scores, labels))
    assert metrics.auc(scores, labels) == expected


def test_log_loss_by_hand():
    loss = metrics.log_loss(np.array([0.8, 0.4]), np.array([True, False]))
    assert loss == pytest.approx(-(np.log(0.8) + np.log(0.6)) / 2)
    assert metrics.log_loss(np.array([0.0, 1.0]), np.array([True, False])) == pytest.approx(-np.log(1e-7), rel=1e-6)


def test_calibration_error_by_hand():
    # Two bins: predicted .2 with 1 of 4 positive, predicted .6 with 4 of 4 positive.
    probabilities = np.array([0.2] * 4 + [0.6] * 4)
    curve = metrics.reliability(probabilities, np.array([1, 0, 0, 0, 1, 1, 1, 1], bool), bins=2)
    assert curve == {"predicted": pytest.approx([0.2, 0.6]), "observed": [0.25, 1.0], "count": [4, 4]}
    assert metrics.calibration_error(curve) == pytest.approx((0.05 + 0.4) / 2)


def test_equal_predictions_share_a_bin():
    labels = np.arange(1000) % 4 == 0
    curve = metrics.reliability(np.full(1000, 0.25), labels)
    assert curve["count"] == [1000]
    assert metrics.calibration_error(curve) == pytest.approx(0.0)


def test_calibrated_probabilities_have_little_error_and_shifted_ones_do_not():
    rng = np.random.default_rng(0)
    probabilities = rng.beta(1, 4, 50_000)
    labels = rng.random(50_000) < probabilities
    assert metrics.calibration_error(metrics.reliability(probabilities, labels)) < 0.01
    assert metrics.calibration_error(metrics.reliability(probabilities / 2, labels)) == pytest.approx(0.1, abs=0.01)


def test_coverage_novelty_and_percentiles_by_hand():
    lists = np.array([[0, 1], [0, -1]])
    assert metrics.coverage(lists, 8) == Fraction(1, 4)
    # Shares (3 + 1)/8, (1 + 1)/8, (0 + 1)/8 twice: 1, 2, 3, 3 bits (4 items, 4 events).
    popularity = np.array([3, 1, 0, 0])
    assert metrics.novelty(lists, popularity) == pytest.approx(4 / 3)
    assert metrics.popularity_percentiles(popularity).tolist() == [0.875, 0.625, 0.25, 0.25]


def test_gini_by_hand():
    assert metrics.gini(np.array([2, 2, 2])) == 0
    assert metrics.gini(np.array([0, 0, 0, 8])) == Fraction(3, 4)
    assert metrics.gini(np.array([1, 3])) == Fraction(1, 4)
    assert metrics.gini(np.zeros(3)) == 0


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40))
def test_gini_is_scale_free_and_bounded(counts):
    array = np.array(counts)
    assert 0 <= metrics.gini(array) < 1
    assert metrics.gini(array * 7) == pytest.approx(metrics.gini(array))
    assert metrics.popularity_percentiles(array).mean() == pytest.approx(0.5)
