"""The service over real HTTP with real replicas: what only Serve can break."""

import concurrent.futures
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from raysys.errors import ConfigError
from raysys.registry import Registry
from raysys.serve.launch import require_free, running_service
from raysys.serve.metrics import exported_names
from tests import planted
from tests.planted import cluster_of
from tests.service import call, free_port, ids, replica_pids


@pytest.fixture(scope="module")
def places(tmp_path_factory, planted_bundle):
    folder = tmp_path_factory.mktemp("service")
    registry = str(folder / "registry")
    Registry(registry).publish(planted_bundle)
    return {"registry": registry, "events": str(folder / "events"), "state": str(folder / "state")}


@pytest.fixture(scope="module")
def base_url(places):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")  # else the test of the metrics waits ten seconds
        with running_service(**places, port=free_port()) as url:
            yield url


def gcs_address(own_home: Path) -> str:
    """Of the cluster that this test run started, by its raylet."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                command = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
                mine = f"RAYSYS_HOME={own_home}".encode() in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if mine and command[0].endswith(b"raylet"):
                return next(part.partition(b"=")[2].decode() for part in command if part.startswith(b"--gcs-address="))
    raise AssertionError("no raylet of this test run")


def prometheus_text(own_home: Path) -> str:
    """What Ray exports on this node."""
    from ray._raylet import GcsClient

    (node,) = GcsClient(address=gcs_address(own_home)).get_all_node_info().values()
    with urllib.request.urlopen(f"http://127.0.0.1:{node.metrics_export_port}/metrics", timeout=10) as response:
        return response.read().decode()


def test_known_user_stranger_and_session(base_url):
    status, answer = call(base_url, "POST", "/v1/recommend", {"user_id": "user-2", "n": 5, "explain": True, "return_metadata": True})
    assert status == 200 and answer["strategy"] == "personalized" and not answer["degraded"], answer
    assert [cluster_of(item["item_id"]) for item in answer["items"]].count(2) >= 4
    assert all(item["probability"] is not None and item["reasons"][0]["text"] and item["metadata"]["title"] for item in answer["items"])
    assert call(base_url, "POST", "/v1/recommend", {"user_id": "stranger"})[1]["strategy"] == "cold_start"
    session = call(base_url, "POST", "/v1/recommend", {"history": ["item-060", "item-061"], "n": 5})[1]
    assert session["strategy"] == "session" and [cluster_of(item["item_id"]) for item in session["items"]].count(3) >= 4


def test_served_list_equals_the_pipeline(base_url, planted_bundle):
    from raysys.bundle import Bundle
    from raysys.pipeline import recommend_user

    bundle = Bundle.open(planted_bundle)
    for user in range(100, 110):
        offline = [bundle.item_ids[row] for row in recommend_user(bundle, f"user-{user}", 10).items]
        assert ids(base_url, user_id=f"user-{user}", n=10) == offline


def test_rank_similar_filter_and_errors(base_url):
    ranked = call(base_url, "POST", "/v1/rank", {"user_id": "user-1", "candidates": ["item-100", "item-030", "item-070"]})[1]
    assert ranked["items"][0]["item_id"] == "item-030"
    similar = call(base_url, "GET", "/v1/items/item-030/similar?n=5")[1]["items"]
    assert [cluster_of(item["item_id"]) for item in similar].count(1) >= 4
    assert set(ids(base_url, user_id="user-1", n=20, filter={"year": 1983})) <= {f"item-{row:03d}" for row in range(3, 120, 20)}
    status, body = call(base_url, "POST", "/v1/recommend", {"user_id": "u", "n": 0})
    assert status == 400 and body["error"]["field"] == "n"
    assert call(base_url, "GET", "/nothing")[0] == 404
    with urllib.request.urlopen(f"{base_url}/docs") as response:
        assert b"openapi" in response.read().lower()


def test_own_event_is_in_the_very_next_answer(base_url):
    first = ids(base_url, user_id="user-9", n=5)
    assert (
        call(base_url, "POST", "/v1/events", {"user_id": "user-9", "item_id": first[0], "event": "rating", "value": 5})[1]["accepted"] == 1
    )
    second = ids(base_url, user_id="user-9", n=5)
    assert first[0] not in second
    scores = call(base_url, "POST", "/v1/recommend", {"user_id": "user-9", "n": 5})[1]["items"]
    assert scores[0]["score"] is not None and [item["item_id"] for item in scores] == second


def test_new_item_is_recommended_within_seconds_where_it_fits(base_url):
    call(base_url, "PUT", "/v1/items/fresh", {"title": "piano jazz music evening", "categories": ["piano"]})
    deadline = time.monotonic() + 5
    while "fresh" not in ids(base_url, user_id="user-5", n=20):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "fresh" not in ids(base_url, user_id="user-0", n=20)
    call(base_url, "DELETE", "/v1/items/fresh")
    assert "fresh" not in ids(base_url, user_id="user-5", n=20)


def test_prometheus_has_what_dashboard_and_alerts_ask_for(base_url, own_home):
    """Every kind of thing happens once; a moment later Ray's exporter has a number for each metric."""
    call(base_url, "POST", "/v1/recommend", {"user_id": "user-3", "filter": {"year": 1983}})
    call(base_url, "POST", "/v1/events", {"events": [{"user_id": "user-3", "item_id": "item-001"}, {"user_id": "u"}]})
    assert call(base_url, "POST", "/v1/recommend", {"n": 0})[0] == 400
    # More than HAProxy waits for, so that it hands on what it has.
    request = urllib.request.Request(f"{base_url}/v1/recommend", bytes(1 << 15), {"Content-Length": str(1 << 30)})
    with pytest.raises(urllib.error.HTTPError, match="413"):
        urllib.request.urlopen(request, timeout=10)
    rare = {"ray_raysys_stage_failures_total"}  # nothing has failed here; tests/unit/test_serve_metrics.py makes it
    wanted = set(exported_names()) - rare
    # Of Serve's own, the first is set every ten seconds and forgotten after two reports.
    served = {f"ray_serve_{name}" for name in ("deployment_replica_healthy", "deployment_queued_queries", "replica_processing_queries")}
    seen, deadline = set(), time.monotonic() + 40
    while missing := (wanted | served) - seen:
        assert time.monotonic() < deadline, f"not exported: {sorted(missing)}"
        seen |= set(re.findall(r"^(ray_\w+)\{", text := prometheus_text(own_home), re.M))
        time.sleep(0.5)
    kinds = dict(re.findall(r"^# TYPE (ray_raysys_\w+) (\w+)$", text, re.M))
    assert {name: kind for name, kind in kinds.items() if name in wanted} == {name: exported_names()[name] for name in wanted}

    def value(line: str) -> float:
        return sum(float(found) for found in re.findall(rf"^{line} ([\d.e+-]+)$", text, re.M))

    whole = r'ray_raysys_stage_ms_{}_total\{{[^}}]*stage="whole"[^}}]*\}}'
    assert value(whole.format("count")) >= 1 and value(whole.format("sum")) > 0
    assert value(r'ray_raysys_events_total\{[^}]*outcome="accepted"[^}]*\}') >= 1
    assert value(r'ray_raysys_model_info\{[^}]*version="[^"]+"[^}]*\}') == 1
    assert re.search(r'ray_raysys_batch_size_bucket_total\{[^}]*deployment="Ingress"[^}]*le="\+Inf"', text)


def test_a_request_keeps_the_id_that_its_client_gave_it(base_url):
    request = urllib.request.Request(f"{base_url}/v1/recommend/user-1", headers={"X-Request-Id": "from-the-client"})
    with urllib.request.urlopen(request, timeout=10) as response:
        assert response.headers["x-request-id"] == "from-the-client"
    with urllib.request.urlopen(f"{base_url}/v1/recommend/user-1", timeout=10) as response:
        assert len(response.headers["x-request-id"]) >= 16


def test_publishing_in_mid_traffic_fails_no_request(base_url, places, tmp_path):
    registry = Registry(places["registry"])
    before = registry.current().version
    planted.build_bundle(seed=1).write(str(tmp_path / "next"), manifest=planted.manifest())
    seen, failures, stop = set(), [], time.monotonic() + 25

    def traffic(worker: int) -> None:
        turn = 0
        while time.monotonic() < stop and not (len(seen) > 1 and turn > 200):
            turn += 1
            status, answer = call(base_url, "POST", "/v1/recommend", {"user_id": f"user-{(worker * 31 + turn) % 180}", "n": 5})
            if status != 200 or answer["degraded"]:
                failures.append(answer)
            else:
                seen.add(answer["model_version"])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(traffic, worker) for worker in range(4)]
        time.sleep(1)
        after = registry.publish(str(tmp_path / "next")).version
        for future in running:
            future.result()
    assert failures == []
    assert seen == {before, after}
    assert call(base_url, "GET", "/v1/models")[1]["current"] == after


def test_acknowledged_events_survive_kill_9_of_the_replicas(base_url):
    accepted = []
    for at in range(20):
        events = [{"user_id": f"killed-{at}", "item_id": f"item-{n:03d}", "event_id": f"{at}-{n}"} for n in range(10)]
        status, answer = call(base_url, "POST", "/v1/events", {"events": events})
        assert status == 200
        accepted.append(answer["accepted"])
    assert sum(accepted) == 200
    victims = [pid for name in ("Ingestion", "Ingress") for pid in replica_pids(name)]
    assert len(victims) >= 2
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while True:
        try:
            held = [len(call(base_url, "GET", f"/v1/users/killed-{at}")[1]["events"]) for at in range(20)]
            again = call(base_url, "POST", "/v1/events", {"user_id": "killed-0", "item_id": "item-000", "event_id": "0-0"})[1]
            break
        except (OSError, ValueError, KeyError):
            assert time.monotonic() < deadline, "the service did not come back"
            time.sleep(0.5)
    assert held == [10] * 20
    assert again == {"accepted": 0, "duplicates": 1, "rejected": []}


def test_everything_is_stopped_and_the_port_is_free(tmp_path):
    """Starts without a bundle, says what to do, answers from live popularity, and leaves nothing behind."""
    port = free_port()
    places = {name: str(tmp_path / name) for name in ("registry", "events", "state")}
    with running_service(**places, port=port, fast=False, require_model=False) as url:
        status, body = call(url, "GET", "/health/ready")
        assert status == 503 and "raysys train" in body["error"]["message"] and "raysys publish" in body["error"]["message"]
        call(url, "POST", "/v1/events", {"user_id": "u", "item_id": "only-item"})
        answer = call(url, "POST", "/v1/recommend", {"user_id": "v"})[1]
        assert answer["degraded"] and [item["item_id"] for item in answer["items"]] == ["only-item"]
        with pytest.raises(ConfigError, match=f"port {port}.*holds it"):
            require_free(port)
    require_free(port)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--host", "0.0.0.0"], "RAYSYS_API_KEY"),
        (["--config", "no-such-file.yaml"], "does not exist"),
    ],
)
def test_wrong_serve_commands_print_one_line(arguments, message):
    command = [sys.executable, "-m", "raysys.cli", "serve", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


def test_misspelt_app_argument_is_refused():
    from pydantic import ValidationError

    from raysys.serve.app import AppArgs, build

    assert build.__annotations__["args"] is AppArgs  # a string here would let any key pass
    with pytest.raises(ValidationError, match="regsitry"):
        AppArgs(regsitry="/tmp/x")
    with pytest.raises(ConfigError, match="absolute"):
        build(AppArgs(registry="relative/path"))
