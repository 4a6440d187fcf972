import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.models.fusion import POPULARITY_FLOOR, Fusion, choose_fusion, judge_fusion, log_softmax

LN = np.log


def rows(*values) -> np.ndarray:
    return np.array(values, np.float32)


def test_log_probs_by_hand():
    """Scores (0, 2 ln 3) at temperature 2: softmax of (0, ln 3) is (1/4, 3/4)."""
    fusion = Fusion.of({"a": 1.0}, {"a": 2.0})
    np.testing.assert_allclose(np.exp(fusion.log_probs(rows([0, 2 * LN(3)]), "a")), [[0.25, 0.75]], rtol=1e-6)


def test_log_softmax_survives_large_scores():
    np.testing.assert_allclose(log_softmax(rows([1e4, 0])), [[0, -1e4]])


def test_fuse_by_hand():
    """0.75 * (1/2, 1/2) + 0.25 * (1/4, 3/4) = (7/16, 9/16)."""
    fusion = Fusion.of({"a": 3.0, "b": 1.0}, {"a": 1.0, "b": 1.0})
    fused = fusion.fuse({"a": LN(rows([0.5, 0.5])), "b": LN(rows([0.25, 0.75]))})
    np.testing.assert_allclose(np.exp(fused), [[7 / 16, 9 / 16]], rtol=1e-6)


def test_weights_are_normalised_and_popularity_keeps_its_floor():
    fusion = Fusion.of({"a": 2.0, "b": 2.0, "popularity": 0.0}, {"a": 1.0, "b": 1.0, "popularity": 1.0})
    assert sum(fusion.weights.values()) == pytest.approx(1)
    assert fusion.weights["a"] == fusion.weights["b"]
    assert fusion.weights["popularity"] == pytest.approx(POPULARITY_FLOOR / (4 + POPULARITY_FLOOR))


def test_popularity_orders_what_the_others_score_alike():
    """A source so sure that all but one probability underflow: the others still come by popularity, none is -inf."""
    fusion = Fusion.of({"a": 1.0, "popularity": 0.0}, {"a": 1e-3, "popularity": 1.0})
    log_probs = {"a": fusion.log_probs(rows([5, 0, 0, 0]), "a"), "popularity": fusion.log_probs(rows([0, 1, 3, 2]), "popularity")}
    assert np.argsort(-fusion.fuse(log_probs)[0]).tolist() == [0, 2, 3, 1]


def test_empty_histories_follow_popularity_alone():
    fusion = Fusion.of({"a": 0.9, "popularity": 0.1}, {"a": 1.0, "popularity": 1.0})
    log_probs = {"a": log_softmax(rows([9, 0], [9, 0])), "popularity": log_softmax(rows([0, 1], [0, 1]))}
    fused = fusion.fuse(log_probs, empty=np.array([True, False]))
    np.testing.assert_allclose(fused[0], log_probs["popularity"][0])
    assert fused[1].argmax() == 0


def test_sources_without_weight_are_not_asked():
    fusion = Fusion.of({"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 1.0})
    nonsense = np.full((1, 2), np.nan, np.float32)
    assert np.isfinite(fusion.fuse({"b": nonsense, "a": log_softmax(rows([1, 0]))})).all()


def test_no_weight_at_all_is_refused():
    with pytest.raises(ValueError, match="positive weight"):
        Fusion.of({"a": 0.0}, {"a": 1.0})


def test_dict_round_trip():
    fusion = Fusion.of({"a": 0.3, "popularity": 0.7}, {"a": 0.5, "popularity": 1.0})
    assert Fusion.from_dict(fusion.to_dict()) == fusion


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 1.0), st.floats(0.05, 5.0))
def test_a_mixture_is_a_distribution(seed, weight, temperature):
    scores = np.random.default_rng(seed).normal(size=(2, 3, 7)).astype(np.float32)
    fusion = Fusion.of({"a": weight, "popularity": 1 - weight}, {"a": temperature, "popularity": 1.0})
    fused = fusion.fuse({name: fusion.log_probs(values, name) for name, values in zip(fusion.weights, scores)})
    np.testing.assert_allclose(np.exp(fused).sum(axis=1), 1, rtol=1e-4)


# A world where each of two sources knows the answer of half of the queries, and a third one knows nothing.
V, N = 400, 60


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, N, V)
    noise = rng.normal(size=(4, V, N)).astype(np.float32)
    knows = np.zeros((2, V, N), np.float32)
    first = np.arange(V) < V // 2
    knows[0, np.flatnonzero(first), targets[first]] = 8
    knows[1, np.flatnonzero(~first), targets[~first]] = 8
    scores = {"left": noise[0] + knows[0], "right": 100 * (noise[1] + knows[1]), "noise": noise[2], "popularity": noise[3]}
    return targets, {name: (lambda part, values=values: values[part].copy()) for name, values in scores.items()}


def everything(part: slice) -> np.ndarray:
    return np.ones((part.stop - part.start, N), bool)


def test_choose_finds_the_sources_that_know(world):
    targets, sources = world
    fusion, report = choose_fusion(sources, targets, everything)
    assert report["fused"] > max(report["alone"].values()) + 0.3
    assert fusion.weights["noise"] < 0.02
    assert report["queries"] == V
    assert all(report["left_out"][name] < report["fused"] - 0.3 for name in ("left", "right"))


def test_report_agrees_with_a_full_ranking(world):
    """The pools look at the best of each source only; here is the same figure over the whole catalogue."""
    targets, sources = world
    fusion, report = choose_fusion(sources, targets, everything)
    log_probs = {name: fusion.log_probs(source(slice(0, V)), name) for name, source in sources.items()}
    fused = fusion.fuse(log_probs)
    ranks = (fused > fused[np.arange(V), targets][:, None]).sum(axis=1)
    assert report["fused"] == pytest.approx(np.where(ranks < 10, 1 / np.log2(ranks + 2), 0).mean(), abs=2e-3)
    assert judge_fusion(fusion, sources, targets, everything)["fused"] == pytest.approx(report["fused"])


def test_choice_is_the_same_whatever_the_block(world):
    targets, sources = world
    assert choose_fusion(sources, targets, everything, chunk=37)[0] == choose_fusion(sources, targets, everything)[0]


def test_masked_items_do_not_compete_and_masked_or_unknown_targets_are_misses(world):
    targets, sources = world
    fusion = Fusion.of({"left": 1.0}, {"left": 1.0})
    only = {"left": sources["left"]}

    def target_only(part: slice) -> np.ndarray:
        mask = np.zeros((part.stop - part.start, N), bool)
        mask[np.arange(len(mask)), np.maximum(targets[part], 0)] = True
        return mask

    assert judge_fusion(fusion, only, targets, target_only)["fused"] == 1.0
    assert judge_fusion(fusion, only, targets, lambda part: ~target_only(part))["fused"] == 0.0
    unknown = np.where(np.arange(V) < V // 2, -1, targets)
    assert judge_fusion(fusion, only, unknown, target_only)["fused"] == 0.5


def test_a_source_that_cannot_tell_items_apart_gets_no_credit():
    targets = np.zeros(50, np.int64)
    flat = {"popularity": lambda part: np.zeros((part.stop - part.start, 500), np.float32)}
    assert judge_fusion(Fusion.of({"popularity": 1.0}, {"popularity": 1.0}), flat, targets, lambda part: np.ones((50, 500), bool))[
        "fused"
    ] == pytest.approx(0)


def test_in_doubt_the_encoder_stays_alone_and_is_calmed():
    """120 queries; the encoder knows the target half of the time and is far too sure; the other source helps by one query in forty."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 60, 120)
    interest, other = (rng.normal(size=(120, 60)).astype(np.float32) for _ in range(2))
    rows = np.arange(120)
    interest[rows[:60], targets[:60]] += 5.0
    other[rows[60:63], targets[60:63]] += 5.0
    sources = {"interest": (interest * 10).__getitem__, "other": other.__getitem__}
    arguments = (sources, targets, lambda rows: np.ones((120, 60), bool)[rows])
    eager, _ = choose_fusion(*arguments)
    assert eager.weights["other"] > 0
    cautious, report = choose_fusion(*arguments, doubt=1.0, calm=(1.0, 4.0, 16.0))
    assert cautious.weights["other"] == 0 and cautious.temperatures["interest"] == 16.0
    assert report["fused"] == report["alone"]["interest"], "order within a source does not depend on its temperature"


def test_a_mixture_at_hand_is_kept_unless_another_is_better_beyond_the_doubt():
    """Eighty queries: `left` knows three in four of the targets. What is at hand follows it, or the source that knows nothing."""
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 60, 80)
    left, right = (rng.normal(size=(80, 60)).astype(np.float32) for _ in range(2))
    left[np.arange(60), targets[:60]] += 5.0
    right[np.arange(60, 63), targets[60:63]] += 5.0
    arguments = ({"left": left.__getitem__, "right": right.__getitem__}, targets, lambda rows: np.ones((80, 60), bool)[rows])
    good = Fusion({"left": 0.9, "right": 0.1}, {"left": 0.3, "right": 1.0})
    best, _ = choose_fusion(*arguments, doubt=1.0)
    assert best.weights != good.weights
    kept, _ = choose_fusion(*arguments, doubt=1.0, present=good)
    assert kept == good
    assert choose_fusion(*arguments, doubt=1.0, present=good, calm=(1.0, 2.0))[0].weights == good.weights
    stale, _ = choose_fusion(*arguments, doubt=1.0, present=Fusion({"right": 1.0}, {"right": 1.0}))
    assert stale == best, "what is at hand is no better than luck"
