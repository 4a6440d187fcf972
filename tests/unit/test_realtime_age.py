"""What benchmarks/realtime/replay.py times over HTTP, against the real API in this process."""

import runpy
from pathlib import Path

import pytest

from tests import planted
from tests.world import World

REPLAY = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "realtime" / "replay.py"))


class InProcess:
    """The calls of `simulate.Client`, on an application in this process."""

    def __init__(self, world: World):
        self.http = world.client

    def call(self, method, path, body=None):
        answer = self.http.request(method, path, json=body)
        return answer.status_code, answer.json()

    def post(self, path, body):
        status, answer = self.call("POST", path, body)
        assert status == 200, answer
        return answer


@pytest.fixture
def client(tmp_path, planted_bundle):
    world = World(tmp_path, planted_bundle)
    yield InProcess(world)
    world.store.close()


def like(item: int) -> dict:
    row = planted.items_table().select(["title", "categories"]).slice(item, 1).to_pylist()[0]
    return dict(row)


def test_an_event_changes_the_next_answer(client):
    client.post("/v1/events", {"events": [{"user_id": "ann", "item_id": "item-020", "event": "rating", "value": 5}]})
    assert 0 <= REPLAY["until_changed_ms"](client, "ann") < 1000


def test_a_new_item_is_recommended_and_taken_back(client):
    assert REPLAY["until_recommended_s"](client, "age-1", "item-020", like(20)) < 5
    answer = client.post("/v1/recommend", {"history": ["item-020"], "n": 50})
    assert "age-1" not in [one["item_id"] for one in answer["items"]]


def test_an_item_that_never_appears_counts_as_long_as_was_waited(client, monkeypatch):
    monkeypatch.setitem(REPLAY["until_recommended_s"].__globals__, "APPEAR_S", 0.05)
    assert REPLAY["until_recommended_s"](client, "age-2", "item-020", {"title": "qqqq", "available": False}) > 0.3
