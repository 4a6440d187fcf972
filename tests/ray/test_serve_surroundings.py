"""What a client sees while what a service stands on breaks: Redis, the disk, the clock. Each test starts a service of its own.

Apart from `test_serve_faults.py`, whose module's service holds HAProxy's ports all the time.
"""

import os
import subprocess
import time

import pytest

from raysys.serve.launch import running_service
from tests.service import call, free_port, published
from tests.shifted_clock import ShiftedClock
from tests.traffic import Traffic

pytestmark = pytest.mark.slow


def test_redis_killed_and_back(tmp_path, planted_bundle):
    from tests.redis_process import RedisProcess

    server = RedisProcess(tmp_path / "redis")
    places = published(tmp_path, planted_bundle) | {name: f"{server.uri}?prefix={name}" for name in ("events", "state")}
    event = {"user_id": "u", "item_id": "item-001"}
    try:
        with running_service(**places, port=free_port()) as url, Traffic(url) as traffic:
            traffic.wait_until_sound()
            assert call(url, "POST", "/v1/events", {**event, "event_id": "before"})[1]["accepted"] == 1
            killed = time.monotonic()
            server.kill()
            worse = traffic.wait_until(lambda seen: sum(one.degraded for one in seen) > 20, since=killed)
            status, body = call(url, "POST", "/v1/events", {**event, "event_id": "lost?"})
            server.start()
            traffic.wait_until_sound()
            again = call(url, "POST", "/v1/events", {**event, "event_id": "before"})[1]
            held = call(url, "GET", "/v1/users/u")[1]["events"]
    finally:
        server.stop()
    assert traffic.statuses() == {200}
    assert {one.reason for one in worse if one.degraded} == {"state cannot be read (StateError)"}
    assert status == 503 and body["error"]["type"] == "state_unavailable"
    assert again["duplicates"] == 1 and len(held) >= 1


def test_full_disk_refuses_writes_and_answers_on(tmp_path, planted_bundle):
    if os.geteuid() != 0:
        pytest.skip("a size-limited tmpfs needs root")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        places = published(tmp_path, planted_bundle) | {"events": str(small / "events")}
        with running_service(**places, port=free_port()) as url, Traffic(url) as traffic:
            traffic.wait_until_sound()
            assert call(url, "POST", "/v1/events", {"user_id": "u", "item_id": "item-001"})[1]["accepted"] == 1
            filler = small / "filler"
            with filler.open("wb") as file:
                try:
                    while file.write(b"x" * 65536):
                        file.flush()
                except OSError:
                    pass
            full = time.monotonic()
            big = {"user_id": "u", "item_id": "item-002", "event_id": "e-2", "properties": {"filler": "x" * 50_000}}
            status, body = call(url, "POST", "/v1/events", big)
            traffic.wait_until(lambda seen: len(seen) > 50, since=full)
            filler.unlink()
            deadline = time.monotonic() + 30
            while call(url, "POST", "/v1/events", big)[0] != 200:
                assert time.monotonic() < deadline
                time.sleep(0.5)
            held = [event["item_id"] for event in call(url, "GET", "/v1/users/u")[1]["events"]]
        assert status == 503 and body["error"]["type"] == "state_unavailable" and "No space left" in body["error"]["message"]
        assert traffic.statuses() == {200} and not [one for one in traffic.seen if one.degraded]
        assert held == ["item-001", "item-002"]
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_the_clock_jumps_an_hour_back_and_a_day_ahead(tmp_path, planted_bundle, monkeypatch):
    """The wall clock of every process of the service; what is measured by the monotonic clock goes on."""
    clock = ShiftedClock(tmp_path)
    for name, value in clock.environment.items():
        monkeypatch.setenv(name, value)
    places = published(tmp_path, planted_bundle)
    with running_service(**places, port=free_port()) as url:
        for name in clock.environment:
            monkeypatch.delenv(name)
        with Traffic(url) as traffic:
            traffic.wait_until_sound()
            for at, jump in enumerate((-3600, 86_400, 0)):
                clock.shift(jump)
                jumped = time.monotonic()
                event = {"user_id": f"jumper-{at}", "item_id": "item-070", "event": "view"}
                assert call(url, "POST", "/v1/events", event)[1]["accepted"] == 1
                answer = call(url, "POST", "/v1/recommend", {"user_id": f"jumper-{at}", "n": 5})[1]
                assert answer["strategy"] == "personalized" and "item-070" not in [item["item_id"] for item in answer["items"]]
                traffic.wait_until(lambda seen: len(seen) > 100, since=jumped)
            stamps = [call(url, "GET", f"/v1/users/jumper-{at}")[1]["events"][0]["timestamp"] for at in range(3)]
    assert traffic.statuses() == {200} and not [one for one in traffic.seen if one.degraded]
    assert stamps[2] - stamps[0] == pytest.approx(3600, abs=120) and stamps[1] - stamps[2] == pytest.approx(86400, abs=120)
