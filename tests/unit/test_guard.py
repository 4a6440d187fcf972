"""Keys, rates, deadlines, the ladder and what browsers of other sites get."""

import asyncio
import time

import numpy as np
import pytest
from fastapi.testclient import TestClient

from raysys.bundle import Bundle
from raysys.errors import ConfigError, DeadlineExceeded, StageUnavailable
from raysys.queries import Queries
from raysys.serve.fallback import Followers
from raysys.serve.http import create_app
from raysys.serve.keys import LOOK_EVERY_S, Keys
from raysys.serve.launch import running_service
from raysys.serve.rate import Rate, RateLimit
from raysys.serve.request import Budget, Deadline
from raysys.serve.stage import FAILURES, PAUSE_S, Stage
from tests.planted import cluster_of
from tests.world import LocalWriter, World


@pytest.fixture
def world(tmp_path, planted_bundle):
    world = World(tmp_path, planted_bundle)
    yield world
    world.store.close()


def client_of(world, **settings) -> TestClient:
    return TestClient(create_app(world.recommender, LocalWriter(world.store, None), models=list, not_ready=lambda: None, **settings))


def test_keys_from_a_file_can_be_rotated_without_a_restart(world, tmp_path, monkeypatch):
    path = tmp_path / "keys"
    path.write_text("old-key\n\nnew-key\n")
    monkeypatch.setenv("RAYSYS_API_KEY_FILE", str(path))
    now = [0.0]
    keys = Keys(clock=lambda: now[0])
    assert keys.required and keys.owner(b"old-key") and keys.owner(b"new-key") and keys.owner(b"old-key") != keys.owner(b"new-key")
    assert keys.owner(b"") is None and keys.owner(b"old-key\n") is None and keys.owner(b"old-keyy") is None
    client = client_of(world)
    assert client.get("/v1/recommend/u", headers={"X-API-Key": "new-key"}).status_code == 200
    assert client.get("/v1/recommend/u", headers={"X-API-Key": "other"}).status_code == 401
    path.write_text("new-key\n")
    assert keys.owner(b"old-key"), "looked at again only after a while"
    now[0] += LOOK_EVERY_S
    assert keys.owner(b"old-key") is None and keys.owner(b"new-key")
    path.unlink()
    now[0] += LOOK_EVERY_S
    assert keys.owner(b"new-key"), "a file that went away locks nobody out"


def test_a_key_from_the_environment_counts_beside_the_file(tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("one\n")
    monkeypatch.setenv("RAYSYS_API_KEY", "two")
    keys = Keys(path=str(tmp_path / "keys"))
    assert keys.owner(b"one") and keys.owner(b"two") and not keys.owner(b"three")


@pytest.mark.parametrize("content, message", [(None, "No such file"), ("\n \n", "found none")])
def test_a_file_without_keys_is_an_error_at_the_start(tmp_path, content, message):
    if content is not None:
        (tmp_path / "keys").write_text(content)
    with pytest.raises(ConfigError, match=f"RAYSYS_API_KEY_FILE.*{message}"):
        Keys(path=str(tmp_path / "keys"))


def test_another_host_needs_a_key_or_a_file_of_keys(monkeypatch):
    monkeypatch.delenv("RAYSYS_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="RAYSYS_API_KEY or RAYSYS_API_KEY_FILE"), running_service(host="0.0.0.0"):
        pass


def test_a_bucket_fills_with_time_and_clients_do_not_share_it():
    now = [0.0]
    limit = RateLimit(Rate(per_s=0.5, burst=3), clock=lambda: now[0])
    assert [limit.wait_s(b"a") for _ in range(4)] == [0, 0, 0, 2], "the next token comes after two seconds"
    assert limit.wait_s(b"b") == 0
    now[0] += 2
    assert limit.wait_s(b"a") == 0 and limit.wait_s(b"a") == 2
    now[0] += 1000
    assert [limit.wait_s(b"a") for _ in range(4)] == [0, 0, 0, 2], "a long quiet time gives no more than the burst"


def test_the_table_of_clients_is_bounded_and_forgets_the_quiet_one():
    limit = RateLimit(Rate(per_s=0.001, burst=1, max_clients=3), clock=lambda: 0.0)
    assert [limit.wait_s(name) for name in (b"a", b"b", b"c")] == [0, 0, 0]
    assert limit.wait_s(b"a") > 0
    assert limit.wait_s(b"d") == 0 and limit.wait_s(b"a") > 0 and limit.wait_s(b"b") == 0, "b was quiet the longest"


def test_too_many_requests_of_one_client_get_429_and_the_time_to_wait(world):
    client = client_of(world, rate=Rate(per_s=0.1, burst=2), api_key="k")
    statuses = [client.get("/v1/recommend/u", headers={"X-API-Key": "k"}) for _ in range(3)]
    assert [answer.status_code for answer in statuses] == [200, 200, 429]
    assert 1 <= int(statuses[2].headers["retry-after"]) <= 10 and statuses[2].json()["error"]["type"] == "rate_limited"
    assert client.get("/health/ready").status_code == 200
    assert world.recommender.metrics.refused.values == {("rate_limited",): 1}


def test_without_keys_clients_are_told_apart_by_what_the_proxy_in_front_says(world):
    client = client_of(world, rate=Rate(per_s=0.1, burst=1))
    ask = lambda address: client.get("/v1/recommend/u", headers={"X-Forwarded-For": address}).status_code  # noqa: E731
    assert [ask("10.0.0.1"), ask("6.6.6.6, 10.0.0.1"), ask("10.0.0.2")] == [200, 429, 200], "what a client writes itself does not count"


def test_other_sites_are_not_let_in(world):
    origin = {"Origin": "https://elsewhere.example"}
    answer = world.client.get("/v1/recommend/u", headers=origin)
    preflight = world.client.options("/v1/recommend", headers={**origin, "Access-Control-Request-Method": "POST"})
    assert preflight.status_code == 405
    for response in (answer, preflight):
        assert not [name for name in response.headers if name.startswith("access-control-")]


def test_a_deadline_cuts_a_slow_stage_and_the_answer_says_so(world):
    world.recommender.budget = Budget()
    world.backend.slow_s = 0.8
    started = time.perf_counter()
    answer = world.client.post("/v1/recommend", json={"user_id": "user-1"}, headers={"X-Deadline-Ms": "200"}).json()
    assert time.perf_counter() - started < 0.7
    assert answer["degraded"] and "ranking failed (TimeoutError)" in answer["degraded_reason"] and len(answer["items"]) == 10
    patient = world.client.post("/v1/recommend", json={"user_id": "user-1"}, headers={"X-Deadline-Ms": "5000"}).json()
    assert not patient["degraded"]


@pytest.mark.parametrize("value", ["0", "-5", "soon", "1.5", "60001", "9" * 30, ""])
def test_a_deadline_that_is_none_is_refused(world, value):
    answer = world.client.get("/v1/recommend/u", headers={"X-Deadline-Ms": value})
    assert answer.status_code == 400 and answer.json()["error"]["field"] == "X-Deadline-Ms"


def test_what_a_stage_may_take_is_what_is_left():
    async def run():
        stage, started = Stage("ranking"), time.perf_counter()
        with pytest.raises(TimeoutError):
            await stage.ask(Deadline.after(0.05), 10.0, lambda: asyncio.sleep(5))
        with pytest.raises(DeadlineExceeded):
            await stage.ask(Deadline.after(-0.01), 10.0, lambda: asyncio.sleep(0))
        assert await stage.ask(Deadline.after(5), 5.0, lambda: asyncio.sleep(0, "done")) == "done"
        assert time.perf_counter() - started < 1

    asyncio.run(run())


def test_a_stage_that_fails_in_a_row_is_left_alone_and_tried_again():
    now, calls = [0.0], []

    async def broken():
        calls.append("broken")
        raise RuntimeError

    async def sound():
        return "answer"

    async def run():
        stage, due = Stage("ranking", clock=lambda: now[0]), Deadline.after(60)
        for _ in range(FAILURES):
            with pytest.raises(RuntimeError):
                await stage.ask(due, 1.0, broken)
        with pytest.raises(StageUnavailable, match="ranking failed 5 times"):
            await stage.ask(due, 1.0, broken)
        assert len(calls) == FAILURES
        now[0] += PAUSE_S
        with pytest.raises(RuntimeError):
            await stage.ask(due, 1.0, broken)
        with pytest.raises(StageUnavailable):
            await stage.ask(due, 1.0, sound)
        now[0] += PAUSE_S
        assert [await stage.ask(due, 1.0, sound) for _ in range(3)] == ["answer"] * 3

    asyncio.run(run())


def test_clients_in_a_hurry_do_not_close_a_stage_for_the_others():
    async def run():
        stage = Stage("ranking")
        for _ in range(3 * FAILURES):
            with pytest.raises(TimeoutError):
                await stage.ask(Deadline.after(0.002), 1.0, lambda: asyncio.sleep(1))
        assert await stage.ask(Deadline.after(60), 1.0, lambda: asyncio.sleep(0, "answer")) == "answer"

    asyncio.run(run())


def test_followers_are_what_the_model_scores_highest(planted_bundle):
    """Wide enough, the table gives the model's own scores; cut, the best of them."""
    model = Bundle.open(planted_bundle).models["covisit"]
    query = Queries.from_lists([[3, 24, 61, 62]])
    rows, scores = Followers.of(model, model.num_items).next_items(query)
    dense = model.scores(query)[0]
    assert set(rows) == set(np.flatnonzero(dense > 0)) and scores == pytest.approx(dense[rows], rel=1e-5)
    assert (np.diff(scores) <= 0).all()
    best, _ = Followers.of(model, 5).next_items(Queries.from_lists([[62]]))
    assert len(best) == 5 and set(model.scores(Queries.from_lists([[62]]))[0][best]) == set(np.sort(model.similar(62))[-5:])


def test_followers_of_nobody_are_nothing(planted_bundle):
    followers = Followers.of(Bundle.open(planted_bundle).models["covisit"], 10)
    assert len(followers.next_items(Queries.from_lists([[]]))[0]) == 0


def test_the_ladder_goes_down_step_by_step(world):
    """Ranked, then retrieval's order, then what follows the last items, then what is popular."""
    by = lambda: next(reversed(world.recommender.metrics.answers.values))[2]  # noqa: E731
    world.ask(user_id="user-1", n=10)
    assert by() == "ranking"
    world.backend.fail = {"ranking"}
    world.ask(user_id="user-1", n=10)
    assert by() == "retrieval"
    world.backend.fail = {"ranking", "retrieval"}
    followed = world.ask(user_id="user-1", n=10)
    assert by() == "covisit" and followed["strategy"] == "fallback" and followed["degraded_reason"] == "retrieval failed (RuntimeError)"
    near = [item for item in followed["items"] if item["sources"] == ["covisit"]]
    assert len(near) >= 5 and all(cluster_of(item["item_id"]) == 1 and item["score"] > 0 for item in near)
    seen = {event["item_id"] for event in world.recommender.held_about("user-1")["training_events"]}
    assert seen and not seen & {item["item_id"] for item in followed["items"]}
    world.ask(user_id="nobody", n=10)
    assert by() == "popularity"


def test_the_ladder_heeds_filters_exclusions_and_deletions(world):
    world.backend.fail = {"retrieval"}
    everything = world.ids(user_id="user-1", n=100)
    assert len(everything) == len(set(everything)) == 100 and "item-005" not in everything
    world.client.delete(f"/v1/items/{everything[0]}")
    assert everything[0] not in world.ids(user_id="user-1", n=100)
    assert world.ids(user_id="user-1", n=5, exclude=everything[:3])[0] == everything[3]
    assert set(world.ids(user_id="user-1", n=50, include=everything[4:7])) == set(everything[4:7])
    assert {item for item in world.ids(history=["item-019"], n=50, filter={"year": 1983})} == {
        f"item-{row:03d}" for row in range(3, 120, 20)
    }
    ranked = world.client.post("/v1/rank", json={"user_id": "user-1", "candidates": ["item-100", everything[1], "item-070"]}).json()
    assert ranked["items"][0]["item_id"] == everything[1] and ranked["degraded"]


def test_followers_can_be_switched_off(planted_bundle):
    from raysys.serve.catalogue import Catalogue
    from raysys.serve.recommender import Version

    bundle = Bundle.open(planted_bundle)
    assert Version.of(bundle, Catalogue(bundle.items), 0).followers is None
