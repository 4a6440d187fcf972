"""A Redis that would lose acknowledged events is refused; one that is away for a moment is waited for."""

import logging
import threading
import time

import pytest

from raysys.errors import StateError
from raysys.events.erasure import erase_record
from raysys.events.log import open_log
from raysys.events.state import open_state
from raysys.events.store import EventStore
from tests.redis_process import RedisProcess


@pytest.fixture
def server(tmp_path, request):
    server = RedisProcess(tmp_path / "redis", **getattr(request, "param", {}))
    yield server
    server.stop()


RECORD = {"kind": "event", "event_id": "a", "user_id": "u", "item_id": "i", "event": "view", "timestamp": 1.0}


@pytest.mark.parametrize(
    "server, message",
    [
        ({"appendonly": "no"}, "appendonly yes, found no"),
        ({"appendfsync": "everysec"}, "appendfsync always, found everysec"),
        ({"maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"}, "noeviction, found allkeys-lru"),
    ],
    indirect=["server"],
)
def test_a_server_that_would_lose_events_is_refused(server, message):
    with pytest.raises(StateError, match=message):
        open_log(server.uri, writable=True)


@pytest.mark.parametrize("server", [{"appendfsync": "everysec"}], indirect=True)
def test_a_second_of_loss_can_be_accepted_and_is_said(server, caplog):
    with caplog.at_level(logging.WARNING, "raysys.events"):
        log = open_log(f"{server.uri}?durability=everysec", writable=True)
    assert "may lose a second" in caplog.text
    log.append([RECORD])
    assert len(log.read()[0]) == 1


@pytest.mark.parametrize("server", [{"rename-command": "CONFIG hidden"}], indirect=True)
def test_a_server_that_hides_its_settings_is_used_with_a_warning(server, caplog):
    with caplog.at_level(logging.WARNING, "raysys.events"):
        open_log(server.uri, writable=True).append([RECORD])
    assert "make sure of appendonly yes" in caplog.text


def test_a_server_that_restarts_is_waited_for_and_one_that_is_gone_is_told(server):
    log = open_log(server.uri, writable=True)
    log.append([RECORD])
    server.kill()
    timer = threading.Timer(0.5, server.start)
    timer.start()
    log.append([{**RECORD, "event_id": "b"}])
    timer.join()
    assert [record["event_id"] for record in log.read()[0]] == ["a", "b"]


def test_an_answer_does_not_wait_for_a_server_that_is_gone(server):
    state = open_state(server.uri, patient=False)
    server.kill()
    started = time.monotonic()
    for _ in range(20):
        with pytest.raises(StateError):
            state.history("u")
    assert time.monotonic() - started < 1.0
    server.start()
    time.sleep(1.05)
    assert state.history("u") == []


def test_a_repeated_append_is_there_once(server):
    """What the client does when the answer got lost: the same script with the same positions."""
    log = open_log(server.uri, writable=True)
    script, sent = log._append, []

    def twice(**arguments):
        sent.append(script(**arguments))
        sent.append(script(**arguments))
        return sent[-1]

    log._append = twice
    log.append([RECORD, {**RECORD, "event_id": "b"}])
    assert sent == [1, 0]
    assert [record["event_id"] for record in log.read()[0]] == ["a", "b"]


@pytest.mark.parametrize("server", [{"rdbcompression": "no"}], indirect=True)
def test_no_file_of_the_server_names_an_erased_user_once_the_log_was_overwritten(server, tmp_path):
    """Its append-only file has every event that ever came, until it is written anew."""
    store = EventStore(open_log(server.uri, writable=True), open_state(server.uri))
    store.submit([{**RECORD, "user_id": "a very private name", "session_id": "my phone", "received": 1.0}]).result()
    store.submit([{"kind": "user", "user_id": "a very private name", "attributes": {"town": "Bonn"}, "received": 1.0}]).result()

    store.submit([{**RECORD, "event_id": "b", "user_id": "v", "received": 3.0}]).result()

    def files() -> bytes:
        return b"".join(path.read_bytes() for path in server.folder.rglob("*") if path.is_file())

    assert b"a very private name" in files() and b"my phone" in files()
    store.submit([erase_record("a very private name", 2.0)]).result()
    assert store.log.overwrite_erased() == 2
    client, deadline = store.log._server.client, time.monotonic() + 20
    while time.monotonic() < deadline and (client.info()["aof_rewrite_in_progress"] or b"a very private name" in files()):
        time.sleep(0.05)
    for secret in (b"a very private name", b"my phone", b"Bonn"):
        assert secret not in files()
    assert [record["user_id"] for record in store.log.read()[0] if record["kind"] == "event"] == ["v"]
    store.close()
