"""Forgetting a user over HTTP: at once everywhere a request looks, and told place by place in a signed receipt."""

import pytest

from raysys.bundle import Bundle
from raysys.events.identity import PSEUDONYM, is_genuine, user_key
from raysys.lake.compact import compact
from raysys.online.config import OnlineConfig
from raysys.online.feed import read_fresh
from raysys.online.learner import Learner
from raysys.registry import Registry
from raysys.serve.catalogue import Catalogue, live_encoder
from raysys.serve.recommender import Version
from tests.world import NOW, World

NAME = "user-0"


@pytest.fixture(params=[False, True], ids=["plain", "pseudonyms"])
def world(request, tmp_path, planted_bundle, place):
    world = World(tmp_path, planted_bundle, place=place, pseudonyms=request.param)
    world.place = place
    yield world
    world.store.close()


def fill(world) -> None:
    event = {"user_id": NAME, "item_id": "item-001", "event": "click", "session_id": "s-1", "event_id": "e-1"}
    world.client.put(f"/v1/users/{NAME}", json={"age": 30})
    assert world.client.post("/v1/events", json=event).json()["accepted"] == 1
    world.client.post("/v1/events", json={"user_id": NAME, "nonsense": 1})
    world.ask(user_id=NAME, n=2)
    world.client.post("/v1/events", json={"user_id": "somebody-else", "item_id": "item-002", "event_id": "e-2"})


def held(world, log: bool = False) -> dict:
    return world.client.get(f"/v1/users/{NAME}{'?log=true' if log else ''}").json()


def test_the_export_has_all_that_is_held(world):
    fill(world)
    export = held(world, log=True)
    assert export["attributes"] == {"age": 30} and export["training_events"] and export["erasure"] is None
    assert [event["item_id"] for event in export["events"]] == ["item-001"] and export["seen"] == ["item-001"]
    assert export["counters"] == {"click": 1}
    assert {record["kind"] for record in export["log"]} >= {"event", "user"}
    answer = world.client.get(f"/v1/users/{NAME}?log=perhaps")
    assert answer.status_code == 400 and answer.json()["error"]["field"] == "log"


def test_the_receipt_names_every_place_and_cannot_be_forged(world):
    fill(world)
    receipt = world.client.delete(f"/v1/users/{NAME}").json()
    assert receipt["erased"] and receipt["user_key"] == user_key(NAME).hex() and receipt["at"] == NOW
    places = {"state", "caches", "index", "log", "dead_letters", "lake", "replay_buffer", "embedding_row", "models", "data_folders"}
    assert set(receipt["places"]) == places and NAME not in repr(receipt)
    models = receipt["places"]["models"]
    assert models["version"] == world.recommender.version.bundle.version and models["first_version_without"] is None
    assert is_genuine(receipt) and not is_genuine({**receipt, "at": receipt["at"] + 1}) and not is_genuine({**receipt, "more": 1})
    stranger = world.client.delete("/v1/users/never-heard-of").json()["places"]["models"]
    assert stranger["first_version_without"] == stranger["version"], "the version in use has no history of theirs"


def test_nothing_of_an_erased_user_is_left_for_an_answer_a_replay_a_learner_or_a_lake(world, tmp_path):
    fill(world)
    world.now = NOW + 1
    world.client.delete(f"/v1/users/{NAME}")
    export = held(world, log=True)
    assert export["events"] == export["training_events"] == export["log"] == export["seen"] == []
    assert export["attributes"] == export["counters"] == {} and export["erasure"] == {"at": NOW + 1, "first_version_without": None}
    assert world.ask(user_id=NAME, n=3)["strategy"] == "cold_start" and world.ask(session_id="s-1", n=3)["strategy"] == "cold_start"
    world.now = NOW + 2
    world.client.post("/v1/events", json={"user_id": NAME, "item_id": "item-003", "event_id": "e-3"})

    fresh = read_fresh(world.store.log, world.recommender.version.bundle, None, max_events=100)
    assert fresh.num_events == 2 and fresh.erased == {user_key(NAME)}, "somebody else's, and what came after"

    refused = tmp_path / "events"
    compact(world.place("events"), str(tmp_path / "lake"), dead_letters=str(refused), clock=lambda: NOW + 10 * 86400)
    from raysys.lake.layout import load, read_files

    rows = read_files(str(tmp_path / "lake"), list(load(str(tmp_path / "lake")).of("interactions")))
    assert sorted(rows["event_id"]) == ["e-2", "e-3"]
    assert NAME.encode() not in b"".join(path.read_bytes() for path in refused.glob("dead-letter-*"))
    raw = [record for segment in world.store.log.segments() for record in world.store.log.read_raw(segment, 0)[0]]
    assert not [
        r for r in raw if r.get("user_id") in (NAME, PSEUDONYM + user_key(NAME).hex()) and r.get("received", r.get("at")) <= NOW + 1
    ]
    assert [event["item_id"] for event in held(world)["events"]] == ["item-003"], "the same name may come back"


def test_a_retry_of_what_was_erased_does_not_bring_it_back(world):
    fill(world)
    world.client.delete(f"/v1/users/{NAME}")
    again = {"user_id": NAME, "item_id": "item-001", "event": "click", "event_id": "e-1"}
    assert world.client.post("/v1/events", json=again).json() == {"accepted": 0, "duplicates": 1, "rejected": []}
    assert held(world)["events"] == []


def test_a_bundle_that_no_longer_knows_the_user_is_named(world, planted_bundle, tmp_path):
    import dataclasses

    world.client.delete(f"/v1/users/{NAME}")
    version = world.recommender.version
    histories = version.bundle.histories
    keys = histories.table["user_key"].to_pylist()
    without = dataclasses.replace(histories, table=histories.table.filter([key != user_key(NAME) for key in keys]))
    bundle = Bundle(
        version.bundle.items, version.bundle.models, version.bundle.fusion, without, {**version.bundle.manifest, "version": "next"}
    )
    world.recommender.version = dataclasses.replace(version, bundle=bundle)
    assert held(world)["erasure"] == {"at": NOW, "first_version_without": "next"}


def test_a_rollback_to_a_version_that_holds_the_user_does_not_answer_from_it(world, planted_bundle, tmp_path):
    registry = Registry(tmp_path / "registry")
    registry.publish(planted_bundle)
    first = registry.current().version
    world.client.delete(f"/v1/users/{NAME}")
    learner = Learner(registry.uri, world.place("events"), OnlineConfig(epochs=0))
    assert learner.round()["status"] == "published"
    registry.rollback()
    back = Bundle.open(registry.bundle_uri(registry.current().version))
    assert back.version == first and back.histories.lookup(NAME) is not None, "the version of before still has the row"
    world.recommender.version = Version.of(back, Catalogue(back.items, live_encoder(back)))
    assert world.ask(user_id=NAME, n=3)["strategy"] == "cold_start" and held(world)["training_events"] == []
    assert world.ask(user_id="user-1", n=3)["strategy"] == "personalized", "nobody else is forgotten"
    registry.publish(registry.bundle_uri(first), unpin=True)
    report = learner.round()
    assert report["status"] == "published", "what is learnt from there on forgets the user again"
    assert Bundle.open(registry.bundle_uri(report["version"])).histories.lookup(NAME) is None
    learner.log.close()
