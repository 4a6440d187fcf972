import numpy as np
import pytest

from raysys.models.fusion import Fusion, judge_fusion
from raysys.online.mixture import Evidence

N = 50


def evidence(num_events, seed=0):
    """Targets, and two sources: `knows` puts the target first three times in four, `stale` says something about other items."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, N, num_events)
    knows, stale = (rng.normal(size=(num_events, N)).astype(np.float32) for _ in range(2))
    told = rng.random(num_events) < 0.75
    knows[told, targets[told]] += 6.0
    stale[np.arange(num_events), (targets + 7) % N] += 6.0
    allowed = np.ones((num_events, N), bool)
    sources = {"knows": lambda rows: knows[rows], "stale": lambda rows: stale[rows], "popularity": lambda rows: np.zeros_like(knows[rows])}
    return sources, targets, lambda rows: allowed[rows]


PRESENT = Fusion.of({"knows": 0.04, "stale": 0.95, "popularity": 0.01}, {"knows": 1.0, "stale": 1.0, "popularity": 1.0})


def refitted(fusion, arguments, **options):
    return Evidence(fusion, *arguments).refitted(**options)


def test_weight_goes_to_the_source_that_knows_what_happens_now():
    arguments = evidence(400)
    moved = refitted(PRESENT, arguments, prior_events=50)
    assert moved.weights["knows"] > 10 * PRESENT.weights["knows"], "and what is wrong is flattened, at least"
    unseen = evidence(400, seed=1)
    assert judge_fusion(moved, *unseen)["fused"] > judge_fusion(PRESENT, *unseen)["fused"] + 0.2
    assert moved == refitted(PRESENT, arguments, prior_events=50), "the same events give the same mixture"


def test_a_few_events_move_it_a_little_and_none_not_at_all():
    few = refitted(PRESENT, evidence(3), prior_events=200)
    assert abs(few.weights["knows"] - PRESENT.weights["knows"]) < 0.05
    of_all = Evidence(PRESENT, *evidence(400)).refitted(prior_events=200, first=3)
    assert of_all.weights["knows"] < 0.2, "what follows the first three is not looked at"
    sources, _, allowed = evidence(5)
    assert refitted(PRESENT, (sources, np.full(5, -1), allowed), prior_events=200) is PRESENT


def test_a_source_of_weight_zero_can_come_back_and_a_temperature_is_mended():
    flat = Fusion.of({"knows": 0.0, "stale": 1.0, "popularity": 0.01}, {"knows": 8.0, "stale": 1.0, "popularity": 1.0})
    moved = refitted(flat, evidence(400), prior_events=20)
    assert moved.weights["knows"] > 0.5 and moved.temperatures["knows"] < 4.0
    assert sum(moved.weights.values()) == pytest.approx(1.0) and moved.temperatures["popularity"] > 0
