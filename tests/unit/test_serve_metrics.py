"""What the service counts, what dashboard and alerts ask for, and the lines it logs."""

import json
import logging
import re
from pathlib import Path

import pytest
import yaml

from raysys.serve.metrics import COUNT_BUCKETS, MAX_SERIES, OTHER, Counter, Gauge, Histogram, Metrics, exported_names
from raysys.serve.request import Lack
from raysys.serve.trouble import BURST, LINES_PER_S, Trouble
from tests.world import NOW, World

DEPLOY = Path(__file__).parents[2] / "deploy"
NAME = re.compile(r"\bray_raysys_\w+")


@pytest.fixture
def world(tmp_path, planted_bundle):
    world = World(tmp_path, planted_bundle)
    yield world
    world.store.close()


def exported(metric) -> dict[tuple[str, tuple], float]:
    return {(sample.name, sample.labels): sample.value for sample in metric.samples()}


def test_a_counter_adds_up_by_labels():
    counter = Counter("c", "text", "kind")
    counter.add("a")
    counter.add("b", by=3)
    counter.add("a", by=2)
    assert exported(counter) == {("c", (("kind", "a"),)): 3, ("c", (("kind", "b"),)): 3}


def test_a_histogram_becomes_cumulative_buckets():
    """Values 0.5, 1, 3 and 9 in buckets up to 1, 2 and 4: at most 1 are two, at most 2 two, at most 4 three, all four; sum 13.5."""
    histogram = Histogram("h", "text", bounds=(1.0, 2.0, 4.0))
    for value in (0.5, 1.0, 3.0, 9.0):
        histogram.observe(value)
    buckets = {labels[0][1]: value for (name, labels), value in exported(histogram).items() if name == "h_bucket"}
    assert buckets == {"1": 2, "2": 2, "4": 3, "+Inf": 4}
    assert exported(histogram)["h_sum", ()] == 13.5 and exported(histogram)["h_count", ()] == 4


@pytest.mark.parametrize("kind", [Counter, Gauge, Histogram])
def test_label_values_are_bounded(kind):
    metric = kind("m", "text", "error", **({"bounds": COUNT_BUCKETS} if kind is Histogram else {}))
    for at in range(3 * MAX_SERIES):
        {"Counter": lambda n: metric.add(n), "Gauge": lambda n: metric.set(1, n), "Histogram": lambda n: metric.observe(1, n)}[
            kind.__name__
        ](f"error-{at}")
    series = {labels[0] for _, labels in exported(metric)}
    assert len(series) == MAX_SERIES + 1 and ("error", OTHER) in series


def test_a_gauge_of_the_only_version_forgets_the_others():
    gauge = Gauge("g", "text", "version")
    gauge.only(1, "v1")
    gauge.only(1, "v2")
    assert exported(gauge) == {("g", (("version", "v2"),)): 1}


def asked_for() -> set[str]:
    """Names in the dashboard's and the alerts' expressions."""
    dashboard = json.loads((DEPLOY / "grafana/raysys.json").read_text())
    rules = yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    return {name for expression in expressions for name in NAME.findall(expression)}


def test_dashboard_and_alerts_ask_for_what_is_exported_and_for_all_of_it():
    assert asked_for() - set(exported_names()) == set(), "asked for, but never exported"
    left = {name for name in set(exported_names()) - asked_for() if not name.endswith(("_sum_total", "_count_total"))}
    assert left == set(), "exported, but shown nowhere"


def test_counters_are_asked_as_rates_and_gauges_are_not():
    kinds = exported_names()
    dashboard = json.loads((DEPLOY / "grafana/raysys.json").read_text())
    rules = yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    for expression in [*expressions, *(rule["expr"] for group in rules["groups"] for rule in group["rules"])]:
        for found in NAME.finditer(expression):
            if "absent(" not in expression:
                is_rate = re.search(r"(rate|increase)\($", expression[: found.start()]) is not None
                assert is_rate == (kinds[found[0]] == "counter"), expression


def test_every_alert_says_what_to_do_and_how_bad_it_is():
    rules = [rule for group in yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())["groups"] for rule in group["rules"]]
    assert len(rules) >= 10 and len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in ("page", "ticket") and rule["annotations"]["summary"] and rule["annotations"]["description"]


def test_answers_events_and_refusals_are_counted(world):
    metrics = world.recommender.metrics
    world.ask(user_id="user-1", n=5)
    world.ask(user_id="nobody", n=5)
    world.ask(user_id="user-1", n=5, filter={"year": 1983})
    world.ask(user_id="user-2", n=5, filter={"year": 1983})
    world.backend.fail = {"ranking"}
    world.ask(user_id="user-1", n=5)
    event = {"user_id": "u", "item_id": "item-001", "event_id": "e-1"}
    world.client.post("/v1/events", json={"events": [event, event, {"user_id": "u"}]})
    world.client.post("/v1/recommend", json={"n": 0})
    assert metrics.answers.values == {
        ("recommend", "personalized", "ranking", "none"): 3,
        ("recommend", "cold_start", "ranking", "none"): 1,
        ("recommend", "personalized", "retrieval", "ranking"): 1,
    }
    assert metrics.stage_failures.values == {("ranking", "RuntimeError"): 1}
    assert metrics.filter_masks.values == {("made",): 1, ("kept",): 1}
    assert metrics.events.values == {("accepted",): 1, ("duplicate",): 1, ("rejected",): 1}
    assert metrics.responses.values == {("200",): 6, ("400",): 1}
    assert sum(metrics.visible_ms.counts[()]) == 1 and 0 < metrics.visible_ms.sums[()] < 5000
    for stage in ("state", "retrieval", "ranking", "rerank", "whole"):
        assert sum(metrics.stage_ms.counts[(stage,)]) == 5
    assert metrics.stage_ms.sums[("whole",)] >= sum(
        metrics.stage_ms.sums[(stage,)] for stage in ("state", "retrieval", "ranking", "rerank")
    )
    assert world.client.get("/v1/models").json()["counts"] == {
        "strategy_personalized": 4,
        "strategy_cold_start": 1,
        "degraded_ranking_RuntimeError": 1,
    }


def test_gauges_are_of_the_moment_of_export(world):
    metrics = world.recommender.metrics
    version = world.recommender.version.bundle.version
    world.client.get("/health/live")
    found = {sample.name: sample for sample in metrics.samples()}
    assert found["raysys_model_info"].labels == (("version", version),) and found["raysys_in_flight"].value == 0
    assert found["raysys_newest_learnt_event_age_seconds"].value == NOW - 1_700_100_000
    world.now += 60
    assert {s.name: s for s in metrics.samples()}["raysys_newest_learnt_event_age_seconds"].value == NOW - 1_700_100_000 + 60


def test_a_request_that_nobody_foresaw_counts_as_500(world):
    world.store.state.close()
    assert world.client.get("/v1/users/u").status_code == 500
    assert world.recommender.metrics.responses.values[("500",)] == 1


def test_a_degraded_answer_leaves_one_line_with_its_id_and_no_user(world, caplog):
    world.backend.fail = {"ranking"}
    with caplog.at_level(logging.WARNING, logger="ray.serve"):
        answer = world.ask(user_id="user-1", n=3)
        world.ask(user_id="user-1", n=3)
    lines = [record for record in caplog.records if record.message == "degraded answer"]
    assert len(lines) == 2 and lines[0].recommendation_id == answer["recommendation_id"]
    assert (lines[0].lack, lines[0].by, lines[0].strategy) == ("ranking", "retrieval", "personalized")
    assert not any("user-1" in str(vars(record)) for record in lines)


def test_lines_are_bounded_and_what_is_left_out_is_counted(caplog):
    now = [0.0]
    trouble, answer = Trouble(lambda: now[0]), {"recommendation_id": "r", "model_version": "v", "strategy": "fallback"}
    with caplog.at_level(logging.WARNING, logger="ray.serve"):
        for _ in range(BURST + 40):
            trouble.degraded(answer, Lack("retrieval", "retrieval failed"), by="popularity", stages={})
        assert len(caplog.records) == BURST
        now[0] += 1 / LINES_PER_S + 1e-9
        trouble.failed(500, "internal", ValueError("secret"))
    assert caplog.records[-1].lines_left_out == 40 and caplog.records[-1].error == "ValueError"


def test_recording_is_cheap():
    """Everything that one answer records takes less than a tenth of a millisecond, also on a busy machine."""
    import time

    metrics = Metrics()
    best = 1.0
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(100):
            metrics.responses.add("200")
            metrics.answers.add("recommend", "personalized", "ranking", "none")
            metrics.candidates.observe(200)
            for stage in ("state", "retrieval", "ranking", "rerank", "whole"):
                metrics.stage_ms.observe(3.2, stage)
        best = min(best, (time.perf_counter() - started) / 100)
    assert best < 1e-4
