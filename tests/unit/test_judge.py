"""The judge learns what is liked, from features that have not seen the answer."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import roc_auc_score

from raysys.bundle import HISTORY_SCHEMA, Bundle, Histories
from raysys.models.base import Candidates
from raysys.models.fusion import Fusion
from raysys.models.grading import Grading
from raysys.models.judge import JudgeConfig
from raysys.models.opinions import FEATURES, OpinionConfig
from raysys.models.popularity import Popularity
from raysys.models.ranker import Ranker, RankerConfig, RankerNetwork
from raysys.pipeline import Pipeline
from raysys.queries import Queries
from raysys.train.calibration import figures, platt
from raysys.train.judge import answers, calibrate, learn_judge, of_folds
from raysys.train.parts import Held
from tests.unit.test_opinions import EVENTS, RATING, TYPES, rated

N = 40
CONFIG = JudgeConfig(width=8, hidden=16, members=1, epochs=6, batch_size=128, opinions=OpinionConfig(dim=4))


class Vectors:
    """A source that only has item vectors, as the ranker wants them."""

    name = "dot_product"

    def __init__(self, item_vectors):
        self.item_vectors = item_vectors

    def scores(self, queries):
        return np.zeros((len(queries), len(self.item_vectors)), np.float32)


def world(*, random_values: bool):
    """Users of two camps over N items in two halves; or ratings that mean nothing."""
    rng = np.random.default_rng(3)
    histories = [rng.permutation(N)[:20].tolist() for _ in range(150)]
    values = [
        [
            float(rng.integers(1, 6)) if random_values else (5.0 if ((item < N // 2) == (user % 2 == 0)) != (rng.random() < 0.1) else 2.0)
            for item in row
        ]
        for user, row in enumerate(histories)
    ]
    everything = rated(histories, values)
    from_end = everything.indptr[1:][everything.rows] - 1 - np.arange(len(everything.items))
    fit = everything.where(from_end >= 4)
    held = Held.at(everything, np.flatnonzero((from_end >= 2) & (from_end < 4)))
    choice = Held.at(everything, np.flatnonzero(from_end < 2))
    models = {"popularity": Popularity.fit(fit, N), "dot_product": Vectors(rng.normal(size=(N, 4)).astype(np.float32))}
    even = {name: 1.0 for name in models}
    table = pa.table({"item_idx": pa.array(range(N), pa.int32())})
    bundle = Bundle(table, models, {"mixture": Fusion.of(even, even).to_dict()}, Histories(HISTORY_SCHEMA.empty_table(), 1))
    return fit, held, choice, Pipeline(bundle)


def learnt(random_values: bool = False):
    fit, held, choice, pipeline = world(random_values=random_values)
    grading = Grading.of(fit, EVENTS, TYPES)
    said = answers(pipeline, held)
    judge = learn_judge(pipeline, fit, held, said, choice, grading=grading, ordinal_time=True, config=CONFIG, seed=0)
    return judge, pipeline, fit, choice


@pytest.fixture(scope="module")
def camps():
    judge, pipeline, _, choice = learnt()
    judge, report = calibrate(judge, pipeline, choice)
    return judge, pipeline, choice, report


def test_taste_is_learnt_and_calibrated(camps):
    judge, _, choice, report = camps
    assert report["positions"] == len(choice) == 300
    assert report["auc"] > 0.85, "one rating in ten is noise"
    assert report["ece"] < 0.1


def test_an_answer_is_in_none_of_the_features_of_its_position():
    """Ratings without meaning: whoever can tell them apart has looked."""
    judge, _, fit, _ = learnt(random_values=True)
    positions = of_folds(judge, fit, ordinal_time=True, seed=0)
    for column, name in enumerate(FEATURES):
        values = positions.examples.dense[:, 0, column]
        assert abs(roc_auc_score(positions.liked, values) - 0.5) < 0.06, name
    assert np.isnan(positions.examples.dense[:, 0, len(FEATURES) :]).all(), "retrieval has seen these positions"


def test_without_both_kinds_there_is_no_judge():
    fit, held, choice, pipeline = world(random_values=False)
    all_liked = dataclasses.replace(fit, values=np.full(len(fit.items), 5, np.float32), positive=np.ones(len(fit.items), bool))
    grading = Grading.of(all_liked, EVENTS, TYPES)
    said = answers(pipeline, held)
    assert learn_judge(pipeline, all_liked, held, said, choice, grading=grading, ordinal_time=True, config=CONFIG, seed=0) is None


def pair(pipeline, items):
    queries = Queries.from_lists([[0, 1, 25], [30, 2]], [[RATING] * 3, [RATING] * 2], values=[[5, 5, 1], [5, 2]])
    return queries, pipeline.candidates_of(queries, items)


def test_one_item_alone_gets_the_probability_that_it_has_in_a_list(camps):
    judge, pipeline, _, _ = camps
    queries, candidates = pair(pipeline, np.array([[3, 33, 7], [4, 34, 9]]))
    together = judge.probabilities(queries, candidates)
    assert together[0, 0] > 0.6 > 0.4 > together[0, 1] and together[1, 0] < 0.4 < 0.6 < together[1, 1]
    for column in range(3):
        _, alone = pair(pipeline, candidates.items[:, column : column + 1])
        np.testing.assert_allclose(judge.probabilities(queries, alone)[:, 0], together[:, column], atol=1e-5)


def test_a_ranker_carries_its_judge_to_disk_and_to_new_items(camps):
    judge, pipeline, _, _ = camps
    padded = torch.from_numpy(np.concatenate([judge.vectors, np.zeros((1, 4), np.float32)]))
    network = RankerNetwork(padded, torch.zeros(N + 1, 0), torch.zeros(N + 1), 2, RankerConfig())
    ranker = Ranker(network, judge.sources, calibration=None, judge=judge)
    arrays, meta = ranker.to_arrays()
    back = Ranker.from_arrays(arrays, meta)
    queries, candidates = pair(pipeline, np.array([[3, 33], [4, 34]]))
    before = ranker.judged(queries, candidates)
    np.testing.assert_allclose(back.judged(queries, candidates), before, atol=5e-3)  # vectors in half precision
    assert back.label == judge.label == "positive event, given that the user took the item"
    bigger = back.grown(np.full((1, N), 1 / N, np.float32), np.zeros((1, 0), np.float32))
    np.testing.assert_allclose(bigger.judged(queries, candidates), back.judged(queries, candidates), atol=1e-5)
    new = Candidates(np.array([[N, -1]] * 2, np.int32), candidates.fused, candidates.log_probs, candidates.sources)
    found = bigger.judged(queries, new)
    assert np.isfinite(found[:, 0]).all() and np.isnan(found[:, 1]).all()
    liked = rated([[0, N], [1, N], [2, N]], [[5, 5], [5, 5], [5, 5]])
    counted = bigger.counted(liked, np.array([False, True] * 3))
    assert counted.judge.opinions.counts[N] == counted.judge.opinions.likes[N] == 3
    assert counted.judge.opinions.offsets[N] > 0 and bigger.judge.opinions.counts[N] == 0
    assert np.isfinite(counted.judged(queries, new)[:, 0]).all()


def test_the_first_places_of_an_answer_get_probabilities(camps, monkeypatch):
    judge, pipeline, _, _ = camps
    padded = torch.from_numpy(np.concatenate([judge.vectors, np.zeros((1, 4), np.float32)]))
    network = RankerNetwork(padded, torch.zeros(N + 1, 0), torch.zeros(N + 1), 2, RankerConfig())
    monkeypatch.setattr(pipeline, "ranker", Ranker(network, judge.sources, calibration=None, judge=judge))
    monkeypatch.setattr("raysys.pipeline.JUDGED", 2)
    queries, candidates = pair(pipeline, np.array([[3, 33, 7], [4, 34, 9]]))
    scores, probabilities = pipeline.rank(queries, candidates)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :2]
    np.testing.assert_array_equal(scores, candidates.fused)
    np.testing.assert_allclose(
        np.take_along_axis(probabilities, best, 1), np.take_along_axis(judge.probabilities(queries, candidates), best, 1), atol=1e-5
    )
    assert np.isnan(probabilities).sum(axis=1).tolist() == [1, 1]


def test_platt_by_hand():
    logits, truth = np.repeat([-1.0, 1.0], 100), np.concatenate([np.arange(100) % 4 == 0, np.arange(100) % 4 > 0])
    slope, intercept = platt(logits, truth)
    assert (slope, intercept) == (pytest.approx(np.log(3), abs=1e-3), pytest.approx(0, abs=1e-3))
    found = figures((slope, intercept), logits, truth)
    assert found["auc"] == pytest.approx(0.75) and found["ece"] < 0.05
    assert platt(logits, np.ones(200, bool)) is None and platt(-logits, truth)[0] == 0.0
