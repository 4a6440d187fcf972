"""The HTTP API over real models, log and state, in one process: what Serve adds is tested in tests/ray."""

import json
import re

import numpy as np
import pytest
from fastapi.testclient import TestClient

from raysys.bundle import Bundle
from raysys.serve.api import LIMITS
from raysys.serve.http import create_app
from raysys.serve.request import Budget
from tests.planted import CLUSTER_ITEMS, cluster_of
from tests.world import NOW, LocalWriter, World


@pytest.fixture
def world(tmp_path, planted_bundle):
    world = World(tmp_path, planted_bundle)
    yield world
    world.store.close()


def test_known_user_gets_the_next_items_of_the_own_cluster(world):
    for user in range(6):
        answer = world.ask(user_id=f"user-{user}", n=5)
        assert answer["strategy"] == "personalized" and not answer["degraded"]
        assert [cluster_of(item["item_id"]) for item in answer["items"]].count(user) >= 4
        assert [item["rank"] for item in answer["items"]] == [1, 2, 3, 4, 5]
        scores = [item["score"] for item in answer["items"]]
        assert scores == sorted(scores, reverse=True)
        assert all(0 <= item["probability"] <= 1 and item["sources"] for item in answer["items"])


def test_seen_items_are_hidden_unless_asked_for(world):
    seen = {"item-040", "item-041", "item-042"}
    history = sorted(seen)
    assert not seen & set(world.ids(history=history, n=20))
    assert seen & set(world.ids(history=history, n=20, exclude_seen=False))
    events = [{"item_id": item, "event": "view"} for item in history]
    assert not seen & set(world.ids(history=events, n=20, exclude_seen=["view"]))
    assert seen & set(world.ids(history=events, n=20, exclude_seen=["purchase"]))


def test_inline_history_is_a_session_and_a_stranger_is_a_cold_start(world):
    assert world.ask(history=["item-060"], n=3)["strategy"] == "session"
    cold = world.ask(user_id="nobody", n=3)
    assert cold["strategy"] == "cold_start" and len(cold["items"]) == 3
    assert all(item["probability"] is None and item["sources"] == ["popularity"] for item in cold["items"])
    assert world.ask(history=["never-heard-of"], n=3)["strategy"] == "cold_start"


def test_own_event_moves_the_next_answer_towards_its_neighbours(world):
    everything = {"user_id": "user-0", "n": 100}
    before = {item["item_id"]: item["score"] for item in world.ask(**everything)["items"]}
    control_before = {item["item_id"]: item["score"] for item in world.ask(user_id="user-1", n=100)["items"]}
    world.client.post("/v1/events", json={"user_id": "user-0", "item_id": "item-070", "event": "rating", "value": 5})
    after = {item["item_id"]: item["score"] for item in world.ask(**everything)["items"]}
    control_after = {item["item_id"]: item["score"] for item in world.ask(user_id="user-1", n=100)["items"]}

    def gain(new, old):
        both = [item for item in new if item in old]
        near = [new[item] - old[item] for item in both if cluster_of(item) == 3]
        far = [new[item] - old[item] for item in both if cluster_of(item) in (2, 4, 5)]
        return np.mean(near) - np.mean(far)

    assert gain(after, before) > 0.3
    assert abs(gain(control_after, control_before)) < 1e-3
    assert "item-070" not in after


def test_anonymous_session_events_are_seen_by_its_next_request(world):
    event = {"user_id": "anon-1", "session_id": "s-1", "item_id": "item-100", "event": "view"}
    assert world.client.post("/v1/events", json=event).json()["accepted"] == 1
    answer = world.ask(session_id="s-1", n=5)
    assert answer["strategy"] == "session"
    assert [cluster_of(item["item_id"]) for item in answer["items"]].count(5) >= 4


def test_new_item_reaches_those_whom_it_fits_and_nobody_else(world):
    item = {"title": "space battle rockets galaxy", "categories": ["space"]}
    assert world.client.put("/v1/items/brand-new", json=item).status_code == 200
    assert "brand-new" in world.ids(user_id="user-0", n=20)
    for user in (1, 2, 3, 4, 5):
        assert "brand-new" not in world.ids(user_id=f"user-{user}", n=20)
    found = next(i for i in world.ask(user_id="user-0", n=20, return_metadata=True)["items"] if i["item_id"] == "brand-new")
    assert found["sources"] == ["new"] and found["metadata"]["title"] == item["title"] and found["probability"] is None
    assert "brand-new" not in world.ids(user_id="user-0", n=20, exclude=["brand-new"])
    assert world.client.delete("/v1/items/brand-new").status_code == 200
    assert "brand-new" not in world.ids(user_id="user-0", n=20)
    assert world.client.get("/v1/items/brand-new").status_code == 404


def test_content_is_compared_only_where_a_new_item_could_be_placed(world, monkeypatch):
    wanted, retrieve = [], world.backend.retrieve

    async def noted(*arguments):
        wanted.append(arguments[-1])
        return await retrieve(*arguments)

    monkeypatch.setattr(world.backend, "retrieve", noted)
    world.ids(user_id="user-1")
    world.client.put("/v1/items/brand-new", json={"title": "space battle rockets galaxy"})
    world.ids(user_id="user-1")
    world.ids(user_id="nobody")
    assert wanted[0] == wanted[2] == 0 < wanted[1]


def test_deleted_and_unavailable_items_never_come_back(world):
    victims = world.ids(user_id="user-2", n=3)
    world.client.delete(f"/v1/items/{victims[0]}")
    world.client.patch(f"/v1/items/{victims[1]}", json={"available": False})
    answer = world.ids(user_id="user-2", n=50)
    assert not set(victims[:2]) & set(answer) and victims[2] in answer
    assert "item-005" not in world.ids(user_id="user-0", n=100, exclude_seen=False)  # unavailable in the catalogue itself
    world.client.patch(f"/v1/items/{victims[1]}", json={"available": True})
    assert victims[1] in world.ids(user_id="user-2", n=50)


@pytest.mark.parametrize(
    "rule, keeps",
    [
        ({"year": 1983}, lambda row: row % CLUSTER_ITEMS == 3),
        ({"year": {"equals": 1983}}, lambda row: row % CLUSTER_ITEMS == 3),
        ({"year": {"range": {"min": 1990}}}, lambda row: row % CLUSTER_ITEMS >= 10),
        ({"year": {"range": {"min": 1985, "max": 1986}}}, lambda row: row % CLUSTER_ITEMS in (5, 6)),
        ({"categories": {"any": ["piano", "murder"]}}, lambda row: row // CLUSTER_ITEMS in (3, 5)),
        ({"categories": {"not": {"equals": "space"}}}, lambda row: row // CLUSTER_ITEMS != 0),
        ({"year": {"in": [1981, 1982]}, "categories": ["cooking"]}, lambda row: row in (41, 42)),
    ],
)
def test_filters_keep_exactly_the_items_that_match(world, rule, keeps):
    answer = world.ids(history=["item-019"], n=200, filter=rule)
    expected = {f"item-{row:03d}" for row in range(120) if keeps(row) and row not in (5, 19)}
    assert set(answer) == expected


def test_filters_see_attributes_set_over_http(world):
    world.client.patch("/v1/items/item-050", json={"mood": "calm"})
    assert world.ids(user_id="user-0", n=10, filter={"mood": "calm"}) == ["item-050"]


def test_include_exclude_and_offset(world):
    ten = world.ids(user_id="user-3", n=10)
    assert world.ids(user_id="user-3", n=4, offset=3) == ten[3:7]
    assert world.ids(user_id="user-3", n=9, exclude=ten[:1]) == ten[1:]
    assert set(world.ids(user_id="user-3", n=10, include=ten[4:6])) == set(ten[4:6])


def test_diversity_spreads_the_answer(world):
    plain = world.ids(user_id="user-0", n=10)
    spread = world.ids(user_id="user-0", n=10, diversity=0.9)
    assert len({cluster_of(item) for item in spread}) > len({cluster_of(item) for item in plain})
    assert world.ids(user_id="user-0", n=10, diversity=0.0) == plain


def test_reasons_name_a_past_item(world):
    answer = world.ask(history=["item-060", "item-061"], n=5, explain=True)
    reasons = [item["reasons"][0] for item in answer["items"]]
    assert all(reason["text"] for reason in reasons)
    assert {reason["item_id"] for reason in reasons} & {"item-060", "item-061"}


def test_rank_orders_the_given_items_and_puts_unknown_ones_last(world):
    body = {"user_id": "user-4", "candidates": ["item-010", "no-such-item", "item-085", "item-110"]}
    items = world.client.post("/v1/rank", json=body).json()["items"]
    assert {item["item_id"] for item in items} == set(body["candidates"])
    assert items[0]["item_id"] == "item-085"
    assert items[-1] == {"item_id": "no-such-item", "rank": 4, "score": None, "probability": None, "sources": []}


def test_similar_items_come_from_the_same_cluster(world):
    items = world.client.get("/v1/items/item-030/similar?n=5").json()["items"]
    assert [cluster_of(item["item_id"]) for item in items].count(1) >= 4
    assert "item-030" not in [item["item_id"] for item in items]


def test_similar_to_a_brand_new_item_goes_by_content(world):
    world.client.put("/v1/items/brand-new", json={"title": "space battle rockets galaxy", "categories": ["space"]})
    items = world.client.get("/v1/items/brand-new/similar?n=5").json()["items"]
    assert [cluster_of(item["item_id"]) for item in items] == [0] * 5 and items[0]["sources"] == ["content"]
    stranger = world.client.get("/v1/items/no-such-item/similar?n=5").json()
    assert stranger["strategy"] == "cold_start" and len(stranger["items"]) == 5


def test_histories_under_another_key_are_said_and_marked(world, monkeypatch):
    assert world.client.get("/health/ready").json()["warnings"] == []
    monkeypatch.setenv("RAYSYS_USER_KEY", "another key than the one of training")
    assert "user key" in world.client.get("/health/ready").json()["warnings"][0]
    answer = world.ask(user_id="user-1", n=3)
    assert answer["strategy"] == "cold_start" and answer["degraded"] and "user key" in answer["degraded_reason"]
    assert not world.ask(history=["item-001"], n=3)["degraded"]


def test_get_recommend_equals_post(world):
    assert [i["item_id"] for i in world.client.get("/v1/recommend/user-5?n=7").json()["items"]] == world.ids(user_id="user-5", n=7)


def test_answer_equals_the_pipeline(world, planted_bundle):
    """The final metric of `evaluate` is a statement about this list."""
    bundle = Bundle.open(planted_bundle)
    from raysys.pipeline import recommend_user

    for user in range(30):
        offline = [bundle.item_ids[row] for row in recommend_user(bundle, f"user-{user}", 10).items]
        assert world.ids(user_id=f"user-{user}", n=10) == offline


def test_late_or_failing_stages_degrade_and_say_so(world):
    ranked = world.ids(user_id="user-1", n=10)
    world.backend.slow_s = 1.0
    late = world.ask(user_id="user-1", n=10)
    assert late["degraded"] and "ranking" in late["degraded_reason"] and len(late["items"]) == 10
    world.backend.slow_s, world.backend.fail = 0.0, {"ranking"}
    assert world.ask(user_id="user-1", n=10)["degraded"]
    world.backend.fail = {"retrieval"}
    fallen = world.ask(user_id="user-1", n=10)
    assert fallen["strategy"] == "fallback" and fallen["degraded"] and len(fallen["items"]) == 10
    world.backend.fail = set()
    assert world.ids(user_id="user-1", n=10) == ranked
    assert any(name.startswith("degraded_") for name in world.client.get("/v1/models").json()["counts"])


def test_what_nobody_foresaw_still_has_the_one_shape(world):
    world.store.state.close()  # every read fails from here on
    answer = world.client.get("/v1/users/u")
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "internal"


def test_events_are_counted_once_and_bad_ones_kept_apart(world):
    good = {"user_id": "u", "item_id": "item-001", "event": "view", "event_id": "e-1"}
    bad = {"user_id": "u", "event": "view"}
    first = world.client.post("/v1/events", json={"events": [good, bad, good]}).json()
    assert first["accepted"] == 1 and first["duplicates"] == 1
    assert first["rejected"] == [{"index": 1, "field": "item_id", "reason": "expected a value, the field is missing"}]
    assert world.client.post("/v1/events", json=good).json() == {"accepted": 0, "duplicates": 1, "rejected": []}
    letters = [json.loads(line) for path in (world.folder / "events").glob("dead-letter-*") for line in path.read_text().splitlines()]
    assert [letter["record"] for letter in letters] == [bad]
    assert len(world.client.get("/v1/users/u").json()["events"]) == 1


def test_erased_user_is_gone_also_from_the_bundle(world):
    world.client.put("/v1/users/user-0", json={"age": 30})
    world.client.post("/v1/events", json={"user_id": "user-0", "item_id": "item-001"})
    held = world.client.get("/v1/users/user-0").json()
    assert held["attributes"] == {"age": 30} and len(held["events"]) == 1 and held["training_events"]
    receipt = world.client.delete("/v1/users/user-0").json()
    assert receipt["erased"] and len(receipt["signature"]) == 64
    gone = world.client.get("/v1/users/user-0").json()
    assert gone["attributes"] == {} and gone["events"] == [] and gone["training_events"] == []
    assert world.ask(user_id="user-0", n=3)["strategy"] == "cold_start"


def test_erasure_reaches_the_sessions_of_the_user(world):
    world.client.post("/v1/events", json={"user_id": "u", "session_id": "s-9", "item_id": "item-001"})
    assert world.ask(session_id="s-9", n=3)["strategy"] == "session"
    world.client.delete("/v1/users/u")
    assert world.ask(session_id="s-9", n=3)["strategy"] == "cold_start"


def test_more_requests_than_agreed_are_shed_in_our_shape(world):
    import threading

    world.recommender.budget = Budget(ranking_s=5.0)
    world.backend.slow_s = 0.5
    app = create_app(world.recommender, LocalWriter(world.store, None), models=list, not_ready=lambda: None, max_in_flight=2)
    answers = []
    with TestClient(app) as client:
        threads = [
            threading.Thread(target=lambda: answers.append(client.post("/v1/recommend", json={"user_id": "user-1"}))) for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = [answer.status_code for answer in answers]
        assert statuses.count(200) >= 2 and statuses.count(503) >= 1 and set(statuses) == {200, 503}
        shed = next(answer for answer in answers if answer.status_code == 503)
        assert shed.headers["retry-after"] == "1" and shed.json()["error"]["type"] == "overloaded"
        assert client.post("/v1/recommend", json={"user_id": "user-1"}).status_code == 200


def test_state_is_rebuilt_from_the_log(tmp_path, planted_bundle):
    world = World(tmp_path, planted_bundle)
    world.client.post("/v1/events", json={"user_id": "u", "item_id": "item-001", "event_id": "e"})
    world.client.put("/v1/items/brand-new", json={"title": "space battle"})
    world.client.delete("/v1/users/user-1")
    world.store.close()
    import shutil

    shutil.rmtree(tmp_path / "state")
    again = World(tmp_path, planted_bundle)
    assert [event["item_id"] for event in again.client.get("/v1/users/u").json()["events"]] == ["item-001"]
    assert again.client.get("/v1/items/brand-new").json()["title"] == "space battle"
    assert again.ask(user_id="user-1", n=3)["strategy"] == "cold_start"
    again.store.close()


def test_without_a_bundle_it_says_what_to_do_and_answers_from_live_popularity(tmp_path):
    world = World(tmp_path, None)
    ready = world.client.get("/health/ready")
    assert ready.status_code == 503 and "raysys publish" in ready.json()["error"]["message"] and ready.headers["retry-after"]
    assert world.client.get("/health/live").status_code == 200
    for item, count in (("a", 1), ("b", 3), ("c", 2)):
        for at in range(count):
            world.client.post("/v1/events", json={"user_id": f"u{at}", "item_id": item})
    answer = world.ask(user_id="new", n=2)
    assert [item["item_id"] for item in answer["items"]] == ["b", "c"]
    assert answer["strategy"] == "fallback" and answer["degraded"] and answer["model_version"] is None
    world.store.close()


def test_api_key_is_asked_for(tmp_path, planted_bundle, monkeypatch):
    monkeypatch.setenv("RAYSYS_API_KEY", "secret-of-the-test")
    world = World(tmp_path, planted_bundle)
    assert world.client.post("/v1/recommend", json={"user_id": "u"}).status_code == 401
    assert world.client.post("/v1/recommend", json={"user_id": "u"}, headers={"X-API-Key": "wrong"}).status_code == 401
    assert world.client.post("/v1/recommend", json={"user_id": "u"}, headers={"X-API-Key": "secret-of-the-test"}).status_code == 200
    assert world.client.get("/health/ready").status_code == 200
    world.store.close()


def test_openapi_describes_every_call(world):
    description = world.client.get("/openapi.json").json()
    paths = description["paths"]
    for path in (
        "/v1/recommend",
        "/v1/recommend/{user_id}",
        "/v1/rank",
        "/v1/items/{item_id}/similar",
        "/v1/events",
        "/v1/items",
        "/v1/items/{item_id}",
        "/v1/users/{user_id}",
    ):
        assert path in paths
        for verb, call in paths[path].items():
            assert ("requestBody" in call) == (verb in ("post", "put", "patch")), (verb, path)
    references = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(description)))
    assert references <= set(description["components"]["schemas"]), "a reference leads nowhere"


def test_the_page_of_the_api_needs_no_other_host(world):
    page = world.client.get("/docs").text
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert sources and not [source for source in sources if "//" in source]
    assert all(world.client.get(source).status_code == 200 for source in sources)


LONG = "x" * (LIMITS.max_id_length + 1)
WRONG = [
    # method, path, body, status, field, part of the message
    ("POST", "/v1/recommend", {"user_id": "u", "n": 0}, 400, "n", "greater than or equal to 1"),
    ("POST", "/v1/recommend", {"user_id": "u", "n": -3}, 400, "n", "greater than or equal to 1"),
    ("POST", "/v1/recommend", {"user_id": "u", "n": LIMITS.max_n + 1}, 400, "n", str(LIMITS.max_n)),
    ("POST", "/v1/recommend", {"user_id": "u", "n": "ten"}, 400, "n", "integer"),
    ("POST", "/v1/recommend", {"user_id": "u", "n": 2.5}, 400, "n", "integer"),
    ("POST", "/v1/recommend", {"user_id": "u", "n": 3, "k": 4}, 400, None, "one of n, k and top_k"),
    ("POST", "/v1/recommend", {"user_id": "u", "offset": -1}, 400, "offset", "greater than or equal to 0"),
    ("POST", "/v1/recommend", {"user_id": "u", "offset": LIMITS.max_offset + 1}, 400, "offset", str(LIMITS.max_offset)),
    ("POST", "/v1/recommend", {"user_id": ""}, 400, "user_id", "at least 1"),
    ("POST", "/v1/recommend", {"user_id": LONG}, 400, "user_id", str(LIMITS.max_id_length)),
    ("POST", "/v1/recommend", {"user_id": ["u"]}, 400, "user_id", "string"),
    ("POST", "/v1/recommend", {"user_id": True}, 400, "user_id", "string"),
    ("POST", "/v1/recommend", {"user": "u"}, 400, "user", "unknown field 'user'"),
    ("POST", "/v1/recommend", {"user_id": "u", "limit": 5}, 400, "limit", "unknown field 'limit'"),
    ("POST", "/v1/recommend", {"history": "item-001"}, 400, "history", "list"),
    ("POST", "/v1/recommend", {"history": [{"event": "view"}]}, 400, None, ""),
    ("POST", "/v1/recommend", {"history": ["i"] * (LIMITS.max_history + 1)}, 400, "history", str(LIMITS.max_history)),
    ("POST", "/v1/recommend", {"user_id": "u", "exclude": "item-001"}, 400, "exclude", "list"),
    ("POST", "/v1/recommend", {"user_id": "u", "exclude_seen": 5}, 400, None, ""),
    ("POST", "/v1/recommend", {"user_id": "u", "diversity": 1.5}, 400, "diversity", "less than or equal to 1"),
    ("POST", "/v1/recommend", {"user_id": "u", "filter": ["year"]}, 400, "filter", "dictionary"),
    ("POST", "/v1/recommend", {"user_id": "u", "filter": {"colour": "red"}}, 400, "filter", "'colour'"),
    ("POST", "/v1/recommend", {"user_id": "u", "filter": {"year": {"above": 3}}}, 400, "filter.year", "range"),
    ("POST", "/v1/recommend", {"user_id": "u", "filter": {"year": {"range": 3}}}, 400, "filter.year.range", "min and/or max"),
    ("POST", "/v1/recommend", {"user_id": "u", "filter": {"year": {"in": []}}}, 400, "filter.year.in", "non-empty list"),
    ("POST", "/v1/recommend", {"user_id": "u", "context": "mobile"}, 400, "context", "dictionary"),
    ("POST", "/v1/recommend", {"user_id": "u", "explain": "maybe"}, 400, "explain", "boolean"),
    ("POST", "/v1/recommend", b"{not json", 400, None, "JSON"),
    ("POST", "/v1/recommend", b"", 400, None, "JSON"),
    ("POST", "/v1/recommend", [1, 2], 400, None, ""),
    ("POST", "/v1/recommend", b"\xff\xfe\x00", 400, None, "JSON"),
    ("POST", "/v1/recommend", b'{"user_id": "u", "diversity": NaN}', 400, None, "JSON"),
    ("GET", "/v1/recommend/u?n=0", None, 400, "n", "greater than or equal to 1"),
    ("GET", "/v1/recommend/u?n=abc", None, 400, "n", "integer"),
    ("GET", "/v1/recommend/u?limit=5", None, 400, "limit", "unknown parameter 'limit'"),
    ("GET", "/v1/recommend/u?n=5&k=6", None, 400, None, "one of n, k and top_k"),
    ("GET", "/v1/items/item-001/similar?k=5", None, 400, "k", "unknown parameter 'k'"),
    ("GET", "/v1/items/item-001/similar?n=five", None, 400, "n", "whole number"),
    ("GET", "/v1/items/item-001/similar?n=0", None, 400, "n", "from 1 to"),
    ("POST", "/v1/rank", {"user_id": "u"}, 400, "candidates", "missing"),
    ("POST", "/v1/rank", {"user_id": "u", "candidates": []}, 400, "candidates", "at least 1 item"),
    ("POST", "/v1/rank", {"user_id": "u", "candidates": "item-001"}, 400, "candidates", "list"),
    ("POST", "/v1/events", {"events": []}, 400, "events", "non-empty list"),
    ("POST", "/v1/events", {"events": {"user_id": "u"}}, 400, "events", "non-empty list"),
    ("POST", "/v1/events", {"events": [{}], "source": "web"}, 400, None, "source"),
    ("POST", "/v1/events", {"events": [{"user_id": "u", "item_id": "i"}] * (LIMITS.max_batch + 1)}, 400, "events", str(LIMITS.max_batch)),
    ("PUT", "/v1/items/i", [], 400, None, "item attributes"),
    ("PUT", "/v1/items/i", {"title": 5}, 400, "title", "text"),
    ("PUT", "/v1/items/i", {"categories": "space"}, 400, "categories", "list of strings"),
    ("PUT", "/v1/items/i", {"available": "no"}, 400, "available", "true or false"),
    ("PUT", "/v1/items/i", {"price": {"eur": 3}}, 400, "price", "number"),
    ("PUT", "/v1/items/i", {"item_id": "j"}, 400, "item_id", "reserved"),
    ("PUT", f"/v1/items/{LONG}", {"title": "t"}, 400, "item_id", str(LIMITS.max_id_length)),
    ("POST", "/v1/items", {"title": "t"}, 400, "items", "at least one item"),
    ("POST", "/v1/items", {"items": []}, 400, "items", "at least one item"),
    ("PATCH", "/v1/items/no-such-item", {"title": "t"}, 404, "item_id", "PUT creates one"),
    ("PUT", "/v1/users/u", "text", 400, None, "user attributes"),
    ("GET", "/v1/nothing", None, 404, None, "/docs"),
    ("DELETE", "/v1/recommend", None, 405, None, "DELETE"),
    ("POST", "/v1/recommend", b"x" * (LIMITS.max_body_bytes + 1), 413, None, str(LIMITS.max_body_bytes)),
]


def test_a_body_without_a_stated_length_is_cut_off_too(shared_world):
    chunks = (b"x" * 65536 for _ in range(LIMITS.max_body_bytes // 65536 + 1))
    answer = shared_world.client.post("/v1/recommend", content=chunks)
    assert answer.status_code == 413 and answer.json()["error"]["type"] == "too_large"


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory, planted_bundle):
    world = World(tmp_path_factory.mktemp("wrong"), planted_bundle)
    yield world
    world.store.close()


@pytest.mark.parametrize("method, path, body, status, field, message", WRONG, ids=[f"{w[0]}-{n}" for n, w in enumerate(WRONG)])
def test_wrong_requests_are_refused_with_a_clear_error(shared_world, method, path, body, status, field, message):
    content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    answer = shared_world.client.request(method, path, content=content)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"type", "field", "message"}
    assert message in error["message"]
    if field is not None:
        assert error["field"] == field


WRONG_EVENTS = [
    ({"item_id": "i"}, "user_id", "missing"),
    ({"user_id": "u"}, "item_id", "missing"),
    ({"user_id": "", "item_id": "i"}, "user_id", "at least 1"),
    ({"user_id": "u", "item_id": "\N{SNOWMAN}" * 200}, "item_id", "1 to 400 bytes, got 600"),
    ({"user_id": "u", "item_id": "i", "timestamp": "yesterday"}, "timestamp", "ISO 8601"),
    ({"user_id": "u", "item_id": "i", "timestamp": -5}, "timestamp", "epoch"),
    ({"user_id": "u", "item_id": "i", "timestamp": NOW + 10 * 86400}, "timestamp", "future"),
    ({"user_id": "u", "item_id": "i", "value": "five"}, "value", "number"),
    ({"user_id": "u", "item_id": "i", "position": -1}, "position", "greater"),
    ({"user_id": "u", "item_id": "i", "rating": 5}, "rating", "unknown field"),
    ({"user_id": "u", "item_id": "i", "event": ""}, "event", "at least 1"),
    ("text", None, "object"),
]


@pytest.mark.parametrize("event, field, reason", WRONG_EVENTS, ids=range(len(WRONG_EVENTS)))
def test_wrong_events_are_rejected_alone(shared_world, event, field, reason):
    good = {"user_id": "u", "item_id": "item-001"}
    answer = shared_world.client.post("/v1/events", json={"events": [event, good]}).json()
    assert answer["accepted"] == 1
    (rejected,) = answer["rejected"]
    assert rejected["index"] == 0 and rejected["field"] == field and reason in rejected["reason"]


@pytest.mark.parametrize(
    "timestamp", [NOW, NOW * 1000, str(NOW), "2023-11-17T05:46:40Z", "2023-11-17T05:46:40", "2023-11-17T06:46:40+01:00"]
)
def test_timestamps_of_every_kind_mean_the_same_moment(shared_world, timestamp):
    user = f"clock-{timestamp!r}"
    assert shared_world.client.post("/v1/events", json={"user_id": user, "item_id": "i", "timestamp": timestamp}).json()["accepted"] == 1
    (event,) = shared_world.client.get(f"/v1/users/{user}").json()["events"]
    assert event["timestamp"] == pytest.approx(NOW, abs=0.01)
