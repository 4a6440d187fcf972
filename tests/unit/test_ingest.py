"""Telling: refused events and what becomes of them, clocks that are wrong, loads that are too large, impressions."""

import asyncio
import json
import os
import socket
import threading
import time

import pytest
import uvicorn

from raysys.errors import ConfigError, RaysysError, ServeOverloaded
from raysys.events.dead_letters import DeadLetters, dead_letter_files, dead_letter_folder, erase_letters, read_letters
from raysys.events.identity import user_key
from raysys.events.state import StateLimits
from raysys.serve.api import LIMITS
from raysys.serve.guard import Guard
from raysys.serve.ingest import ImpressionBuffer, check_events
from raysys.serve.keys import Keys
from raysys.serve.metrics import Metrics
from raysys.serve.rate import Rate, RateLimit
from raysys.serve.resend import resend
from tests.world import NOW, World


@pytest.fixture
def world(tmp_path, planted_bundle):
    world = World(tmp_path, planted_bundle)
    yield world
    world.store.close()


def tell(world, *events: dict) -> dict:
    answer = world.client.post("/v1/events", json={"events": list(events)})
    assert answer.status_code == 200, answer.text
    return answer.json()


def told(world, kind: str = "event") -> list[dict]:
    return [record for record in world.store.log.read()[0] if record["kind"] == kind]


def test_late_events_take_their_place_and_a_clock_ahead_counts_as_now(world):
    events = [("now", NOW), ("late", NOW - 100 * 86400), ("ahead", NOW + 3600), ("between", NOW - 50)]
    assert tell(world, *({"user_id": "u", "item_id": item, "timestamp": at} for item, at in events))["accepted"] == 4
    tell(world, {"user_id": "u", "item_id": "last"})
    assert [entry.item_id for entry in world.store.state.history("u")] == ["late", "between", "now", "ahead", "last"]
    ahead = next(record for record in told(world) if record["item_id"] == "ahead")
    assert (ahead["timestamp"], ahead["stated"], ahead["received"]) == (NOW, NOW + 3600, NOW)
    assert all("stated" not in record for record in told(world) if record["item_id"] != "ahead")


@pytest.mark.parametrize("at, message", [(NOW + 25 * 3600, "24 h in the future"), (5.0, "1990"), (NOW / 1e6, "1990")])
def test_times_that_cannot_be_are_refused(at, message):
    records, refused = check_events({"user_id": "u", "item_id": "i", "timestamp": at}, NOW)
    assert records == [] and message in refused[0]["reason"] and refused[0]["field"] == "timestamp"


def test_refused_events_can_be_mended_and_sent_again(world, monkeypatch):
    tell(world, {"user_id": "u", "itemid": "i"}, {"user_id": "u", "item_id": "ok"}, {"user_id": "v", "item_id": ""}, {"user_id": "w"})
    (path,) = dead_letter_files(str(world.folder / "events"))
    letters = read_letters(path)
    assert [letter["record"].get("user_id") for letter in letters] == ["u", "v", "w"] and letters[0]["received"] == NOW
    letters[0]["record"] = {"user_id": "u", "item_id": "i"}
    letters[1]["record"]["item_id"] = "j"
    with open(path, "w") as file:
        file.write("".join(json.dumps(letter) + "\n" for letter in letters) + "a note of mine\n")
    world.now = NOW + 1000
    with serving(world.app) as url:
        assert resend(path, url) == {"sent": 2, "accepted": 2, "duplicates": 0, "left": 1}
        left = open(path).read().splitlines()
        assert len(left) == 2 and json.loads(left[0])["record"] == {"user_id": "w"} and left[1] == "a note of mine"
        assert resend(path, url)["sent"] == 0
    assert {record["item_id"]: record["timestamp"] for record in told(world)} == {"ok": NOW, "i": NOW, "j": NOW}, "when they came first"


def test_sending_again_after_a_crash_counts_once(world, tmp_path):
    path = tmp_path / "dead-letter-1.jsonl"
    letter = {"index": 0, "field": "item_id", "reason": "missing", "received": NOW, "record": {"user_id": "u", "item_id": "i"}}
    path.write_text(json.dumps(letter) + "\n")
    content = path.read_bytes()
    with serving(world.app) as url:
        assert resend(str(path), url)["accepted"] == 1 and not path.exists()
        path.write_bytes(content)  # the crash came before the file was rewritten
        assert resend(str(path), url) == {"sent": 1, "accepted": 0, "duplicates": 1, "left": 0}
    path.write_bytes(content)
    with pytest.raises(RaysysError, match="expected a running service"):
        resend(str(path), "http://127.0.0.1:1")
    assert path.read_bytes() == content
    with pytest.raises(ConfigError, match="expected a dead-letter file"):
        resend(str(tmp_path / "none.jsonl"), "http://127.0.0.1:1")


def test_dead_letters_are_bounded_and_forget_erased_users_while_they_are_written(tmp_path):
    letters = DeadLetters(str(tmp_path), max_bytes=2000)
    entry = {"index": 0, "field": "x", "reason": "y", "received": 5.0}
    for n in range(100):
        letters.write([{**entry, "record": {"user_id": "ann" if n % 2 else "bob", "n": n}}])
    (path,) = dead_letter_files(str(tmp_path))
    assert 2000 <= os.path.getsize(path) < 2200 and letters.dropped > 50
    count = len(read_letters(path))
    assert erase_letters(str(tmp_path), {user_key("ann"): 4.0}) == 0, "they came after"
    assert erase_letters(str(tmp_path), {user_key("ann"): 6.0}) == count // 2
    letters.write([{**entry, "received": 7.0, "record": {"user_id": "ann"}}])  # the writer goes on in the new file
    assert len(read_letters(path)) == count - count // 2 + 1
    assert dead_letter_folder("redis://x/0", None).endswith("dead-letters") and dead_letter_folder(str(tmp_path)) == str(tmp_path)


def test_ten_megabytes_of_rubbish_cost_next_to_nothing(world):
    def cost(**request) -> tuple[int, float]:
        started = time.process_time()
        status = world.client.post("/v1/events", **request).status_code
        return status, time.process_time() - started

    cost(content=b"{}")  # warm
    rubbish = b"\x00\xffgarbage" * (10 << 20 >> 3)
    assert len(rubbish) > 10e6
    assert cost(content=rubbish)[0] == 413
    status, seconds = cost(content=(rubbish[at : at + 65536] for at in range(0, len(rubbish), 65536)))
    assert status == 413 and seconds < 1.0, "without a length it is read up to the limit and no further"
    status, seconds = cost(content=rubbish[: LIMITS.max_body_bytes])
    assert status == 400 and seconds < 0.5
    status, seconds = cost(json={"events": [{"rubbish": n} for n in range(LIMITS.max_batch)]})
    assert status == 200 and seconds < 2.0, "5,000 refusals, each with its reason"
    assert told(world) == []


def test_bodies_at_once_are_bounded_by_their_bytes():
    gate, statuses = asyncio.Event(), []

    async def slow(scope, receive, send):
        await gate.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def run() -> Guard:
        guard = Guard(slow, Keys(), RateLimit(Rate()), 1000, Metrics())

        async def one(headers: list[tuple[bytes, bytes]]) -> None:
            async def send(message):
                if message["type"] == "http.response.start":
                    statuses.append((message["status"], dict(message["headers"]).get(b"retry-after")))

            await guard({"type": "http", "path": "/v1/events", "headers": headers}, None, send)

        large = [(b"content-length", b"%d" % LIMITS.max_body_bytes)]
        chunked = [(b"transfer-encoding", b"chunked")]
        room = LIMITS.max_bodies_bytes // LIMITS.max_body_bytes
        tasks = [asyncio.create_task(one(large if n % 2 else chunked)) for n in range(room + 3)]
        tasks.append(asyncio.create_task(one([])))  # a GET has no body and needs no room
        await asyncio.sleep(0.05)
        assert statuses == [(503, b"1")] * 3
        gate.set()
        await asyncio.gather(*tasks)
        return guard

    guard = asyncio.run(run())
    assert [status for status, _ in statuses].count(200) == LIMITS.max_bodies_bytes // LIMITS.max_body_bytes + 1
    assert guard.bytes_in_flight == 0 and guard.in_flight == 0


def test_a_disk_that_is_behind_is_told_with_retry_after(world, monkeypatch):
    def behind(records):
        raise ServeOverloaded("the event log is behind; retry in a second")

    monkeypatch.setattr(world.store, "submit", behind)
    answer = world.client.post("/v1/events", json={"user_id": "u", "item_id": "i"})
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1" and answer.json()["error"]["type"] == "overloaded"


def test_impressions_say_what_was_shown_where_and_with_which_chance(world):
    with world.client:  # runs the flushing beside the requests
        answer = world.ask(user_id="user-1", n=3, offset=2)
        world.ask(user_id="user-1", n=1, filter={"year": 2050})  # nothing shown
        deadline = time.monotonic() + 5
        while not told(world, "impression") and time.monotonic() < deadline:
            time.sleep(0.05)
    (shown,) = told(world, "impression")
    assert shown["recommendation_id"] == answer["recommendation_id"] and shown["version"] == answer["model_version"]
    assert shown["items"] == [item["item_id"] for item in answer["items"]] and shown["positions"] == [3, 4, 5]
    assert shown["scores"] == [item["score"] for item in answer["items"]] and shown["propensities"] == [1.0] * 3
    assert shown["strategy"] == "personalized" and shown["user_id"] == "user-1"


def test_impressions_are_bounded_and_the_oldest_go_first():
    sent: list[dict] = []
    buffer = ImpressionBuffer(sent.extend, flush_s=1e9, limit=3)
    item = {"item_id": "i", "rank": 1, "score": 0.5}
    for n in range(5):
        buffer.add({"recommendation_id": str(n), "user_id": "u", "items": [item], "model_version": "v", "strategy": "s"})
    buffer.flush()
    assert [record["recommendation_id"] for record in sent] == ["2", "3", "4"] and buffer.dropped == 2


def test_seen_items_are_hidden_also_beyond_the_last_events(tmp_path, planted_bundle):
    world = World(tmp_path, planted_bundle, limits=StateLimits(max_events=3))
    first = world.ids(user_id="stranger", n=5)
    tell(world, *({"user_id": "stranger", "item_id": item, "event": "view"} for item in first))
    assert len(world.store.state.history("stranger")) == 3
    assert not set(first) & set(world.ids(user_id="stranger", n=100))
    assert set(first) & set(world.ids(user_id="stranger", n=100, exclude_seen=["purchase"]))
    world.store.close()


def test_a_state_that_cannot_be_read_costs_the_history_not_the_answer(tmp_path, planted_bundle):
    from tests.redis_process import RedisProcess

    server = RedisProcess(tmp_path / "redis")
    world = World(tmp_path, planted_bundle, place=lambda name: server.uri if name == "state" else str(tmp_path / name))
    from raysys.events.state import open_state

    world.recommender.state = open_state(server.uri, patient=False)
    assert not world.ask(user_id="user-1", n=5)["degraded"]
    server.kill()
    answer = world.ask(user_id="user-1", n=5)
    assert answer["degraded"] and "state" in answer["degraded_reason"] and len(answer["items"]) == 5
    server.start()
    time.sleep(1.1)
    assert world.ask(user_id="user-1", n=5)["strategy"] == "personalized"
    world.store.close()
    server.stop()


class serving:
    """An app over real HTTP while the block runs."""

    def __init__(self, app):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="error"))
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self) -> str:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{self.port}"

    def __exit__(self, *_) -> None:
        self.server.should_exit = True
        self.thread.join()
