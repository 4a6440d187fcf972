import json

import numpy as np
import pyarrow as pa
import pytest

from raysys import storage
from raysys.bundle import Bundle, Histories
from raysys.errors import ConfigError, SchemaError
from raysys.evaluate.run import evaluate, summary_rows
from raysys.evaluate.stages import Stages
from raysys.models.fusion import Fusion
from raysys.models.popularity import Popularity, PopularityConfig
from raysys.online.feed import flat_sequences
from raysys.pipeline import Pipeline, seen_mask
from raysys.prepare.dataset import FORMAT, SEQUENCE_SCHEMA
from raysys.queries import Queries

COUNTS = [7, 6, 5, 4, 3, 2]
"""Training events of items a to f: popularity ranks them in this order."""
ITEM_IDS = list("abcdef")
# One row a user: items, of which the last is the test target. -1 is an item that the training window does not know.
USERS = [[0, 2], [1, 2, 0], [0, 0], [3, -1], [5]]
MASKED_RANKS = [2, 1, 0, 0, 6]  # the third has seen its target before
UNMASKED_RANKS = [3, 1, 1, 0, 6]


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("RAYSYS_USER_KEY", "a key only for tests")


def write_prepared(uri, users=USERS, events=("other", "view"), codes=None, positive=None):
    codes = codes or [[1] * len(items) for items in users]
    rows = {
        "user_idx": range(len(users)),
        "item_idx": users,
        "event": codes,
        "timestamp": [list(range(len(items))) for items in users],
        "value": [[float("nan")] * len(items) for items in users],
        "positive": positive or [[False] * len(items) for items in users],
        "split": [[0] * (len(items) - 1) + [2] for items in users],
    }
    storage.write_table(storage.join(uri, "sequences/part-0.parquet"), pa.table(rows, schema=SEQUENCE_SCHEMA))
    items = pa.table({"item_idx": pa.array(range(6), pa.int32()), "item_id": ITEM_IDS, "num_train": pa.array(COUNTS, pa.int64())})
    storage.write_table(storage.join(uri, "items.parquet"), items)
    manifest = {
        "format": FORMAT,
        "events": list(events),
        "fingerprint": "f",
        "split": "leave-one-out",
        "time": "utc",
        "counts": {"items": 6},
    }
    storage.write_json(storage.join(uri, "manifest.json"), manifest)
    return uri


def popularity_bundle(order=range(6), fit="train"):
    counts = np.array(COUNTS)[list(order)]
    flat = np.repeat(np.arange(6), counts)
    popularity = Popularity.fit(flat_sequences(flat, flat, flat, np.array([0, len(flat)])), 6, PopularityConfig())
    items = pa.table({"item_idx": pa.array(range(6), pa.int32()), "item_id": [ITEM_IDS[i] for i in order], "num_train": counts})
    nobody = Histories.build(flat_sequences(np.array([]), np.array([]), np.array([]), np.array([0])), [], max_events=5)
    fusion = {"mixture": {"weights": {"popularity": 1.0}, "temperatures": {"popularity": 1.0}}, "ranker_weight": 0.0}
    return Bundle(items, {"popularity": popularity}, fusion, nobody, {"events": ["other", "view"], "fit": fit})


def write_bundle(uri, **options):
    bundle = popularity_bundle(**options)
    bundle.write(uri, manifest=bundle.manifest)
    return uri


@pytest.fixture
def prepared(tmp_path):
    return write_prepared(str(tmp_path / "prepared"))


@pytest.fixture
def model(tmp_path):
    return write_bundle(str(tmp_path / "bundle"))


def by_hand(ranks):
    """NDCG@10, Recall@5, MRR@10 of ranks, 0 for a miss."""
    hits = np.array([rank for rank in ranks if rank])
    return [sum(1 / np.log2(hits + 1)) / len(ranks), (hits <= 5).sum() / len(ranks), sum(1 / hits) / len(ranks)]


def figures(stage):
    return [stage["ndcg@10"], stage["recall@5"], stage["mrr@10"]]


def test_every_stage_by_hand(prepared, model):
    result = evaluate(prepared, model, bootstrap=100)
    for stage in (result["final"], result["retrieval"], result["sources"]["popularity"], result["baselines"]["popularity"]):
        assert figures(stage) == pytest.approx(by_hand(MASKED_RANKS))
        assert stage["ndcg@10_interval"][0] < stage["ndcg@10"] < stage["ndcg@10_interval"][1]
    for stage in ("final", "retrieval", "popularity"):
        assert figures(result["unmasked"][stage]) == pytest.approx(by_hand(UNMASKED_RANKS))
    assert (result["users"], result["targets"], result["unknown_targets"], result["repeated_targets"]) == (5, 5, 1, 1)
    assert result["empty_histories"] == 1
    assert result["coverage"] == 1.0 and result["ranker"]["auc"] is None
    assert result["final_minus_retrieval"]["ndcg@10"] == 0
    assert json.loads(json.dumps(result)) == result


def test_without_mask_the_unmasked_figures_are_the_figures(prepared, model):
    result = evaluate(prepared, model, mask=False, bootstrap=0)
    assert figures(result["final"]) == pytest.approx(by_hand(UNMASKED_RANKS))
    assert result["unmasked"] == {} and "ndcg@10_interval" not in result["final"]


def test_final_is_what_the_pipeline_recommends(prepared, model):
    pipeline = Pipeline(Bundle.open(model))
    queries = Queries.from_lists([items[:-1] for items in USERS])
    lists = pipeline.recommend(queries, 10, allowed=seen_mask(queries, 6))[0]
    ranks = [next((rank for rank, item in enumerate(row, start=1) if item == user[-1] != -1), 0) for row, user in zip(lists, USERS)]
    assert ranks == MASKED_RANKS


def test_batches_do_not_change_the_figures(prepared, model):
    whole, single = (evaluate(prepared, model, bootstrap=20, batch_size=size) for size in (256, 1))
    assert {**whole, "seconds": 0} == {**single, "seconds": 0}


def test_a_bundle_with_another_order_of_items_is_matched_by_name(prepared, model, tmp_path):
    other = write_bundle(str(tmp_path / "other"), order=[3, 1, 5, 0, 2, 4])
    assert evaluate(prepared, other, bootstrap=0)["final"] == evaluate(prepared, model, bootstrap=0)["final"]


def test_a_sample_of_users_is_seeded(prepared, model):
    first, again = (evaluate(prepared, model, bootstrap=0, max_users=2, seed=3) for _ in range(2))
    assert first["users"] == 2 and first["final"] == again["final"]
    assert evaluate(prepared, model, bootstrap=0, max_users=100)["users"] == 5


def test_shown_items_are_neither_targets_nor_history(tmp_path, model):
    # "view b, view c, impression a | view a": a was only shown, so it may be recommended and is a hit.
    users, codes = [[1, 2, 0, 0], [1, 3]], [[1, 1, 2, 1], [1, 2]]
    prepared = write_prepared(str(tmp_path / "shown"), users, ("other", "view", "impression"), codes)
    bundle = popularity_bundle()
    bundle.write(str(tmp_path / "with_impressions"), manifest={**bundle.manifest, "events": ["other", "view", "impression"]})
    result = evaluate(prepared, str(tmp_path / "with_impressions"), bootstrap=0)
    assert result["targets"] == 1 and result["repeated_targets"] == 0
    assert result["final"]["recall@1"] == 1.0


def test_what_cannot_be_evaluated_is_refused(prepared, model, tmp_path):
    with pytest.raises(SchemaError, match="expected events in the valid part"):
        evaluate(prepared, model, split="valid")
    with pytest.raises(ConfigError, match="fitted on train\\+valid"):
        evaluate(prepared, write_bundle(str(tmp_path / "refit"), fit="train+valid"), split="valid")
    with pytest.raises(ConfigError, match="expected 'test' or 'valid', got 'train'"):
        evaluate(prepared, model, split="train")
    stranger = popularity_bundle()
    stranger.items = stranger.items.set_column(1, "item_id", [[f"x{i}" for i in range(6)]])
    stranger.write(str(tmp_path / "stranger"), manifest=stranger.manifest)
    with pytest.raises(SchemaError, match="none of its 6 items is in bundle"):
        evaluate(prepared, str(tmp_path / "stranger"))


class GivenProbabilities:
    """A ranker that knows P(positive) of each item, but nothing about users without history."""

    sources, judge = (), None

    def __init__(self, probabilities):
        self.probabilities = np.array(probabilities, np.float32)

    def score(self, queries, candidates):
        chosen = np.where(candidates.items >= 0, self.probabilities[candidates.items], 0)
        return np.log(chosen + 1e-9), np.where(queries.lengths[:, None] == 0, np.nan, chosen)


def stages_with_ranker(probabilities, ranker_weight=0.0):
    bundle = popularity_bundle()
    bundle.models["ranker"] = GivenProbabilities(probabilities)
    bundle.fusion["ranker_weight"] = ranker_weight
    return Stages(Pipeline(bundle), mask=True, list_k=10, seed=0)


def test_ranker_on_logged_events_by_hand():
    stages = stages_with_ranker([0.8, 0.4, 0.6, 0.2, 0.5, 0.5])
    stages.add(Queries.from_lists([[5], [5], [4]]), np.array([0, 1, -1]))  # events on a, b and an unknown item
    stages.add_shown(Queries.from_lists([[5], [5]]), np.array([2, 3]))  # shown c and d
    result = stages.ranker_figures(np.array([True, False, True, False, False]))
    assert result["label"] == "positive event" and result["negatives"] == "logged events that are not positive"
    assert result["examples"] == 4 and result["base_rate"] == 0.25
    assert result["auc"] == 1.0
    assert result["logloss"] == pytest.approx(-np.log([0.8, 0.6, 0.4, 0.8]).mean(), rel=1e-5)


def test_ranker_on_candidates_where_no_logged_negatives_exist():
    stages = stages_with_ranker([0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    stages.add(Queries.from_lists([[0], []]), np.array([1, 2]))  # candidates b to f, b is taken; and one without probabilities
    result = stages.ranker_figures(np.array([True, True]))
    assert result["label"] == "held-out item" and result["examples"] == 5
    assert result["auc"] == 1.0 and result["base_rate"] == 0.2


def test_the_ranker_reorders_candidates_and_final_shows_it():
    stages = stages_with_ranker([0.01, 0.02, 0.05, 0.1, 0.3, 0.9], ranker_weight=5.0)
    stages.add(Queries.from_lists([[0]]), np.array([5]))
    assert stages.ranks["retrieval"][0].tolist() == [5]
    assert stages.ranks["final"][0].tolist() == [1]


def test_sources_that_fusion_does_not_use_are_measured_too():
    bundle = popularity_bundle()
    bundle.models["dot_product"] = bundle.models["popularity"]
    stages = Stages(Pipeline(bundle), mask=True, list_k=10, seed=0)
    stages.add(Queries.from_lists([[0]]), np.array([1]))
    assert stages.source_names == ["popularity", "dot_product"]
    assert stages.ranks["dot_product"][0].tolist() == [1]


class GivenScores:
    """A retrieval source that says the same to everybody."""

    name = "dot_product"

    def __init__(self, scores):
        self.given = np.array(scores, np.float32)

    def scores(self, queries):
        return np.tile(self.given, (len(queries), 1))


def test_what_each_source_adds_by_hand():
    """Popularity puts item 5 last of the five that are left, the other source puts it first."""
    bundle = popularity_bundle()
    bundle.models["dot_product"] = GivenScores([0, 1, 2, 3, 4, 5])
    even = {"popularity": 1.0, "dot_product": 1.0}
    bundle.fusion["mixture"] = Fusion.of(even, even).to_dict()
    stages = Stages(Pipeline(bundle), mask=True, list_k=10, seed=0)
    stages.add(Queries.from_lists([[0]]), np.array([5]))
    assert stages.ranks["without dot_product"][0].tolist() == [5]
    assert stages.ranks["without popularity"][0].tolist() == [1]
    assert stages.ranks["union"][0].tolist() == [1]


def test_the_closing_table_names_stages_and_figures(prepared, model):
    rows = dict(summary_rows(evaluate(prepared, model, bootstrap=10)))
    assert "0.3974" in rows["final"] and rows["final"] == rows["retrieval (fused)"] == rows["popularity"]
    assert rows["targets"].startswith("5 in ") and "95% interval" in rows["final ndcg@10"]
