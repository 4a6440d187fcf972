"""What every user state promises, against each implementation (one so far)."""

import itertools
import subprocess
import sys

import pytest

from raysys.errors import ConfigError, ServeOverloaded, StateError
from raysys.events.embedded_log import EmbeddedLog
from raysys.events.embedded_state import EmbeddedState
from raysys.events.log import Span
from raysys.events.state import StateLimits, open_state
from raysys.events.store import EventStore

POSITIONS = itertools.count(1)


def event(user: str, item: str, at: float = 0.0, **more) -> dict:
    return {"kind": "event", "user_id": user, "item_id": item, "event": "view", "timestamp": at, **more}


def apply(state, *records) -> list[bool]:
    stop = next(POSITIONS)
    return state.apply(list(records), Span("segment", stop - 1, stop))


@pytest.fixture
def state(tmp_path):
    state = EmbeddedState(str(tmp_path / "state"), StateLimits(max_events=5, event_id_window_s=100.0))
    yield state
    state.close()


def test_histories_are_bounded_and_in_order_of_time(state):
    apply(state, *(event("u", f"i{n}", n) for n in range(8)))
    assert [e.item_id for e in state.history("u")] == ["i3", "i4", "i5", "i6", "i7"]
    apply(state, event("u", "late", 4.5))
    assert [e.item_id for e in state.history("u")] == ["i4", "late", "i5", "i6", "i7"]
    assert state.history("somebody") == []


def test_impressions_are_no_history(state):
    apply(state, event("u", "i", event="ignored") | {"event": "impression"})
    assert state.history("u") == [] and state.popular(5) == []


def test_an_event_id_counts_once_inside_its_window(tmp_path):
    now = [1000.0]
    state = EmbeddedState(str(tmp_path / "s"), StateLimits(event_id_window_s=100.0), clock=lambda: now[0])
    assert apply(state, event("u", "i", event_id="e"), event("u", "i", event_id="e"), event("u", "i", event_id="f")) == [True, False, True]
    now[0] += 99
    assert apply(state, event("u", "i", event_id="e")) == [False] and state.known_event("e")
    now[0] += 2
    apply(state, event("u", "i", event_id="g"))  # any commit forgets what is too old
    assert not state.known_event("e")
    assert apply(state, event("u", "i", event_id="e")) == [True]
    assert apply(state, event("u", "i", event_id="long" * 100), event("u", "i", event_id="long" * 100)) == [True, False]


def test_a_span_is_folded_in_once(state):
    span = Span("other-segment", 0, 10)
    state.apply([event("u", "i")], span)
    state.apply([event("u", "i")], span)
    assert len(state.history("u")) == 1 and state.applied("other-segment") == 10


def test_items_are_fed_in_order_of_change(state):
    item = {"kind": "item", "attributes": {"title": "a", "year": 1}}
    apply(state, {**item, "item_id": "x"}, {**item, "item_id": "y"})
    assert [name for name, _ in state.items_since(0)] == ["x", "y"] and state.item_sequence() == 2
    apply(state, {"kind": "item", "item_id": "x", "attributes": {"year": 2}})
    assert [name for name, _ in state.items_since(0)] == ["y", "x"]
    (changed,) = state.items_since(2)
    assert changed[0] == "x" and changed[1].attributes == {"title": "a", "year": 2}
    apply(state, {"kind": "item", "item_id": "x", "attributes": {"title": "b"}, "replace": True})
    assert state.item("x").attributes == {"title": "b"}
    apply(state, {"kind": "item_delete", "item_id": "x"})
    assert state.item("x").deleted and state.item("z") is None


def test_users_are_merged_replaced_and_erased(state):
    apply(state, {"kind": "user", "user_id": "u", "attributes": {"age": 3, "town": "Bonn"}}, event("u", "i", session_id="s"))
    apply(state, {"kind": "user", "user_id": "u", "attributes": {"town": None, "lang": "de"}})
    assert state.user("u") == {"age": 3, "lang": "de"} and state.user("v") is None
    from raysys.events.identity import user_key

    apply(state, {"kind": "erase", "user_key": user_key("u").hex(), "at": 5.0})
    assert state.user("u") is None and state.history("u") == [] and state.session_history("s") == [] and state.erased("u")
    apply(state, event("u", "again"))
    assert [e.item_id for e in state.history("u")] == ["again"], "the same id may come back"


def test_what_one_process_commits_the_next_read_of_another_sees(tmp_path):
    folder = str(tmp_path / "shared")
    code = """
import sys
from raysys.events.embedded_state import EmbeddedState
from raysys.events.state import StateLimits
state = EmbeddedState(sys.argv[1], StateLimits())
for line in sys.stdin:
    print(len(state.history("u")), flush=True)
"""
    state = EmbeddedState(folder, StateLimits())
    reader = subprocess.Popen([sys.executable, "-c", code, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for count in range(1, 30):
        apply(state, event("u", f"i{count}", count))
        reader.stdin.write("read\n")
        reader.stdin.flush()
        assert int(reader.stdout.readline()) == count
    reader.stdin.close()
    reader.wait()
    state.close()


def test_a_store_replays_what_the_state_has_not_seen(tmp_path):
    log = EmbeddedLog(str(tmp_path / "log"), writable=True)
    log.append([event("u", "i1", 1, event_id="a"), event("u", "i2", 2, event_id="b")])  # crashed before the state commit
    store = EventStore(EmbeddedLog(str(tmp_path / "log"), writable=True), open_state(str(tmp_path / "state")))
    assert store.replayed == 2 and [e.item_id for e in store.state.history("u")] == ["i1", "i2"]
    assert store.submit([event("u", "i2", 2, event_id="b"), event("u", "i3", 3, event_id="c")]).result() == [False, True]
    store.close()
    again = EventStore(EmbeddedLog(str(tmp_path / "log"), writable=True), open_state(str(tmp_path / "state")))
    assert again.replayed == 0 and len(again.state.history("u")) == 3
    again.close()


def test_a_failing_disk_is_told_to_every_waiting_request(tmp_path, monkeypatch):
    store = EventStore(EmbeddedLog(str(tmp_path / "log"), writable=True), open_state(str(tmp_path / "state")))

    def broken(records):
        raise StateError("event log: cannot write, disk full")

    with monkeypatch.context() as patch:
        patch.setattr(store.log, "append", broken)
        with pytest.raises(StateError, match="disk full"):
            store.submit([event("u", "i")]).result()
    assert store.submit([event("u", "i")]).result() == [True]
    store.close()


def test_waiting_writes_are_bounded(tmp_path, monkeypatch):
    import threading

    monkeypatch.setattr("raysys.events.store.MAX_WAITING", 3)
    store = EventStore(EmbeddedLog(str(tmp_path / "log"), writable=True), open_state(str(tmp_path / "state")))
    gate, append = threading.Event(), store.log.append
    monkeypatch.setattr(store.log, "append", lambda records: gate.wait(10) and append(records))
    futures = []
    with pytest.raises(ServeOverloaded):
        for _ in range(20):
            futures.append(store.submit([event("u", "i")]))
    gate.set()
    assert all(future.result() == [True] for future in futures) and len(futures) <= 5
    store.close()


def test_wrong_places_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="local folder"):
        open_state("redis://localhost")
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="memory-mapped"):
        open_state(str(tmp_path / "file"))
