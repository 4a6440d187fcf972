"""What a client sees while things break, over real HTTP. The table of docs/serving.md is made of these tests."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raysys.registry import Registry
from raysys.serve.launch import running_service
from tests import planted
from tests.planted import cluster_of
from tests.ray.test_serve import gcs_address
from tests.service import apart_config, call, free_port, published, replica_pids
from tests.traffic import Traffic

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def two_ingresses(folder: Path, **args) -> str:
    """serve_config.yaml with two ingress replicas, so that one is there while the other is not."""
    values = apart_config()  # stages that can die alone
    values["applications"][0]["args"] |= args
    values["applications"][0]["deployments"][0]["autoscaling_config"] |= {"min_replicas": 2}
    path = folder / f"two-{len(list(folder.glob('two-*')))}.json"
    path.write_text(json.dumps(values))
    return str(path)


@pytest.fixture(scope="module")
def places(tmp_path_factory, planted_bundle):
    return published(tmp_path_factory.mktemp("faults"), planted_bundle)


@pytest.fixture(scope="module")
def base_url(places, tmp_path_factory):
    with running_service(**places, port=free_port(), config_path=two_ingresses(tmp_path_factory.mktemp("config"))) as url:
        with Traffic(url) as traffic:
            traffic.wait_until_sound()
        yield url


def hang(deployment: str, seconds: float) -> float:
    """Stop all replicas of a deployment for so long; the monotonic time when it began."""
    victims, stopped = replica_pids(deployment), time.monotonic()
    for pid in victims:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    for pid in victims:
        os.kill(pid, signal.SIGCONT)
    return stopped


@pytest.mark.parametrize("stage", ["Retrieval", "Ranking"])
def test_a_killed_model_replica_costs_quality_and_no_answer(base_url, stage):
    with Traffic(base_url) as traffic:
        traffic.wait_until_sound()
        killed = time.monotonic()
        for pid in replica_pids(stage):
            os.kill(pid, signal.SIGKILL)
        worse = traffic.wait_until(lambda seen: any(one.degraded for one in seen), since=killed)
        traffic.wait_until_sound()
    assert traffic.statuses() == {200}
    reasons = {one.reason for one in worse if one.degraded}
    assert all(reason.startswith(f"{stage.lower()} failed") for reason in reasons)
    if stage == "Retrieval":
        answers = [one.body for one in traffic.since(killed) if one.degraded]
        assert {answer["strategy"] for answer in answers} == {"fallback"}
        assert all(len(answer["items"]) == 5 for answer in answers)
        assert {source for answer in answers for item in answer["items"] for source in item["sources"]} >= {"covisit"}


def test_a_killed_ingress_replica_is_replaced_by_the_other(base_url):
    with Traffic(base_url) as traffic:
        traffic.wait_until_sound()
        assert len(pids := replica_pids("Ingress")) >= 2
        os.kill(pids[0], signal.SIGKILL)
        time.sleep(3)
        traffic.wait_until_sound()
    failed = [one for one in traffic.seen if one.status != 200]
    assert not failed, f"{len(failed)} of {len(traffic.seen)}: {failed[:3]}"


def test_requests_at_a_killed_ingress_are_asked_again_though_their_body_came_after_their_headers(base_url):
    """HAProxy repeats only what it had whole when it first sent it; else it closes the client's connection without a word."""
    with Traffic(base_url, clients=8, pause_s=0.0, body_after_s=0.004) as traffic:
        for _ in range(3):
            traffic.wait_until(lambda _: len(replica_pids("Ingress")) >= 2)
            time.sleep(4)  # HAProxy has heard of the new one
            traffic.wait_until_sound(in_a_row=200)
            os.kill(replica_pids("Ingress")[0], signal.SIGKILL)
        traffic.wait_until(lambda _: len(replica_pids("Ingress")) >= 2)
        traffic.wait_until_sound()
    failed = [one for one in traffic.seen if one.status != 200]
    assert not failed, f"{len(failed)} of {len(traffic.seen)}: {failed[:3]}"


def test_a_ranker_that_hangs_for_two_seconds_costs_nobody_two_seconds(base_url):
    """SIGSTOP: the replica is alive, connected and silent. After some late answers it is not waited for."""
    with Traffic(base_url, deadline_ms=400) as traffic:
        traffic.wait_until_sound()
        stopped = hang("Ranking", 2)
        meanwhile = [one for one in traffic.since(stopped) if one.degraded]
        traffic.wait_until_sound()
    assert traffic.statuses() == {200}
    assert len(meanwhile) > 5 and {one.reason.partition(" (")[0] for one in meanwhile} == {"ranking failed"}
    assert max(one.ms for one in meanwhile) < 1000, "the deadline was 400 ms"
    own = [cluster_of(item["item_id"]) for one in meanwhile for item in one.body["items"]]
    assert len(own) == 5 * len(meanwhile), "retrieval's order answers"


def test_a_hanging_ranker_is_left_alone_when_it_failed_in_a_row(base_url):
    """Without a deadline of the client each would wait `ranking_ms`; the stage is left alone long before that adds up."""
    with Traffic(base_url, clients=8) as traffic:
        traffic.wait_until_sound()
        stopped = hang("Ranking", 5)
        meanwhile = [one for one in traffic.since(stopped) if one.degraded]
        traffic.wait_until_sound()
    assert traffic.statuses() == {200}
    skipped = [one for one in meanwhile if one.reason == "ranking failed (StageUnavailable)"]
    assert len(skipped) > len(meanwhile) / 2 and sorted(one.ms for one in skipped)[len(skipped) // 2] < 500


def test_a_damaged_version_is_not_taken_and_the_one_before_answers_on(base_url, places, tmp_path):
    registry = Registry(places["registry"])
    before = registry.current().version
    planted.build_bundle(seed=7).write(str(tmp_path / "next"), manifest=planted.manifest())
    with Traffic(base_url) as traffic:
        traffic.wait_until_sound()
        current = Path(places["registry"]) / "current.json"
        pointer = current.read_bytes()
        version = registry.publish(str(tmp_path / "next")).version
        moved = current.read_bytes()
        current.write_bytes(pointer)  # back, before anybody looks once a second; damaged, then named again
        weights = Path(places["registry"]) / "versions" / version / "ranker.safetensors"
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 0xFF
        weights.write_bytes(content)
        current.write_bytes(moved)
        time.sleep(6)
        status, models = call(base_url, "GET", "/v1/models")
        current.write_bytes(pointer)
        time.sleep(2)
        traffic.wait_until_sound()
    assert traffic.statuses() == {200} and not [one for one in traffic.seen if one.degraded]
    assert models["current"] == before and {one.body["model_version"] for one in traffic.seen} == {before}


def test_a_rollback_keeps_what_follows_the_last_items(base_url, places, tmp_path):
    """The ingress opens a bundle of its own for that, also of a version that it served before."""
    registry = Registry(places["registry"])
    before = registry.current().version
    planted.build_bundle(seed=7).write(str(tmp_path / "next"), manifest=planted.manifest())
    with Traffic(base_url, clients=8) as traffic:
        traffic.wait_until_sound()
        version = registry.publish(str(tmp_path / "next")).version
        traffic.wait_until(lambda seen: all_of(seen[-20:], version), since=time.monotonic())
        assert registry.rollback().version == before
        traffic.wait_until(lambda seen: all_of(seen[-20:], before), since=time.monotonic())
        stopped = hang("Retrieval", 5)
        meanwhile = [one.body for one in traffic.since(stopped) if one.degraded]
        traffic.wait_until_sound()
    registry.publish(registry.bundle_uri(before), unpin=True)  # for whoever publishes next
    assert traffic.statuses() == {200}
    assert len(meanwhile) > 5 and {body["model_version"] for body in meanwhile} == {before}
    assert {source for body in meanwhile for item in body["items"] for source in item["sources"]} >= {"covisit"}


def all_of(seen, version: str) -> bool:
    """Whether both ingress replicas, by twenty answers, have taken a version."""
    return len(seen) == 20 and all(one.body.get("model_version") == version and not one.degraded for one in seen)


def test_a_deploy_under_load_fails_no_request(base_url, places, tmp_path, own_home):
    """Other arguments, so every replica is replaced: the new ones answer before the old ones go."""
    with Traffic(base_url) as traffic:
        traffic.wait_until_sound()
        before = set(replica_pids("Ingress"))
        values = json.loads(Path(two_ingresses(tmp_path, **places, history_events=400, ranking_ms=900)).read_text())
        values["http_options"]["port"] = int(base_url.rpartition(":")[2])
        path = tmp_path / "again.json"
        path.write_text(json.dumps(values))
        deploy = subprocess.Popen(
            [sys.executable, "-m", "ray.serve.scripts", "run", str(path)],
            env={**os.environ, "RAY_ADDRESS": gcs_address(own_home)},
            stdout=(tmp_path / "log").open("wb"),
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + 90
            while set(replica_pids("Ingress")) & before:
                assert time.monotonic() < deadline and deploy.poll() is None, (tmp_path / "log").read_text()[-2000:]
                time.sleep(0.5)
            traffic.wait_until_sound()
        finally:
            deploy.kill()  # a polite end would shut Serve down
            deploy.wait()
    failed = [one for one in traffic.seen if one.status != 200]
    assert not failed, f"{len(failed)} of {len(traffic.seen)}: {failed[:3]}"
