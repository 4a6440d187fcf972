"""What every user state promises, against each implementation; the lines for one only say so."""

import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from raysys.errors import ConfigError, ServeOverloaded, StateBehind, StateError
from raysys.events.embedded_state import EmbeddedState
from raysys.events.identity import PSEUDONYM, user_key
from raysys.events.log import Span, open_log
from raysys.events.redis_state import RedisState
from raysys.events.state import StateLimits, open_state
from raysys.events.store import EventStore


def event(user: str, item: str, at: float = 0.0, **more) -> dict:
    return {"kind": "event", "user_id": user, "item_id": item, "event": "view", "timestamp": at, **more}


def erase(user: str, at: float) -> dict:
    return {"kind": "erase", "user_key": user_key(user).hex(), "at": at}


def apply(state, *records) -> list[bool]:
    at = state.applied("segment")
    return state.apply(list(records), Span("segment", at, at + 1))


def items(state, user: str) -> list[str]:
    return [entry.item_id for entry in state.history(user)]


def opened(location: str, clock=None, **limits):
    kind = RedisState if location.startswith("redis") else EmbeddedState
    return kind(location, StateLimits(**limits), **({"clock": clock} if clock else {}))


@pytest.fixture
def state(place):
    state = opened(place("state"), max_events=5, max_seen=20, event_id_window_s=100.0)
    yield state
    state.close()


def test_histories_are_bounded_and_in_order_of_time(state):
    apply(state, *(event("u", f"i{n}", n) for n in range(8)))
    assert items(state, "u") == ["i3", "i4", "i5", "i6", "i7"]
    apply(state, event("u", "late", 4.5))
    assert items(state, "u") == ["i4", "late", "i5", "i6", "i7"]
    assert state.history("somebody") == []


def test_events_of_the_same_moment_keep_their_order_and_their_values(state):
    apply(state, event("u", "b", 5, value=4.5), event("u", "a", 5), event("u", "b", 5))
    apply(state, event("u", "a", 5.25, event="click"))
    assert items(state, "u") == ["b", "a", "b", "a"]
    first, last = state.history("u")[0], state.history("u")[-1]
    assert (first.value, first.timestamp, last.event, last.timestamp) == (4.5, 5, "click", 5.25)


def test_impressions_are_no_history(state):
    apply(state, event("u", "i", event="impression"))
    assert state.history("u") == [] and state.popular(5) == [] and state.seen("u") == set()
    assert state.counters("u") == {"impression": 1}


def test_seen_items_outlast_the_last_events_and_know_their_event_types(state):
    apply(state, *(event("u", f"i{n}", n) for n in range(12)), event("u", "i0", 20, event="purchase"), event("v", "other"))
    assert len(state.history("u")) == 5
    assert state.seen("u") == {f"i{n}" for n in range(12)}
    assert state.seen("u", ["purchase"]) == {"i0"} and state.seen("u", ["purchase", "view"]) == state.seen("u")
    assert state.seen("u", []) == set() and state.seen("nobody") == set()


def test_seen_items_are_bounded_and_those_of_longest_ago_go_first(state):
    for first in range(0, 60, 4):
        apply(state, *(event("u", f"i{n}", n) for n in range(first, first + 4)))
    seen = state.seen("u")
    assert 15 <= len(seen) <= 20 and seen == {f"i{n}" for n in range(60 - len(seen), 60)}


def test_counters_count_by_type(state):
    apply(state, event("u", "a"), event("u", "b", event="click"), event("u", "a", event_id="e"), event("u", "a", event_id="e"))
    assert state.counters("u") == {"view": 2, "click": 1} and state.counters("v") == {}


def test_an_event_id_counts_once_inside_its_window(place):
    now = [1000.0]
    state = opened(place("state"), clock=lambda: now[0], event_id_window_s=100.0)
    assert apply(state, event("u", "i", event_id="e"), event("u", "i", event_id="e"), event("u", "i", event_id="f")) == [True, False, True]
    now[0] += 99
    assert apply(state, event("u", "i", event_id="e")) == [False] and state.known_event("e")
    now[0] += 2
    apply(state, event("u", "i", event_id="g"))  # any commit forgets what is too old
    assert not state.known_event("e")
    assert apply(state, event("u", "i", event_id="e")) == [True]
    assert apply(state, event("u", "i", event_id="long" * 100), event("u", "i", event_id="long" * 100)) == [True, False]


def test_a_span_counts_once_and_a_gap_is_told(state):
    records = [event("u", "i", 1), event("u", "j", 2)]
    assert state.apply(records, Span("s", 0, 10)) == [True, True]
    assert state.apply(records, Span("s", 0, 10)) == [True, True], "sent again, for want of an answer"
    assert items(state, "u") == ["i", "j"] and state.counters("u") == {"view": 2} and state.applied("s") == 10
    with pytest.raises(StateBehind, match="up to 10"):
        state.apply(records, Span("s", 11, 20))
    assert state.applied("s") == 10 and state.applied("other") == 0


def test_items_are_fed_in_order_of_change_and_merged(state):
    assert state.item_sequence() == 0 and state.items_since(0) == []
    apply(state, {"kind": "item", "item_id": "x", "attributes": {"title": "a", "year": 1}})
    apply(state, {"kind": "item", "item_id": "y", "attributes": {"tags": ["p", "q"], "price": 1.5, "old": None}})
    apply(state, {"kind": "item", "item_id": "x", "attributes": {"year": 2}})
    assert [name for name, _ in state.items_since(0)] == ["y", "x"] and state.item_sequence() == 3
    (changed,) = state.items_since(2)
    assert changed[0] == "x" and changed[1].attributes == {"title": "a", "year": 2}
    assert state.item("y").attributes == {"tags": ["p", "q"], "price": 1.5, "old": None}, "null removes what the bundle says"
    apply(state, {"kind": "item", "item_id": "x", "attributes": {"title": "b"}, "replace": True})
    assert state.item("x").attributes == {"title": "b"}
    apply(state, {"kind": "item_delete", "item_id": "x"})
    assert state.item("x").deleted and state.item("z") is None


def test_popular_items_are_the_most_frequent(state):
    apply(state, *(event(f"u{n}", item) for item, count in (("b", 3), ("d", 1), ("a", 1), ("c", 2)) for n in range(count)))
    assert state.popular(3) == ["b", "c", "a"] and state.popular(10) == ["b", "c", "a", "d"]


def test_users_are_merged_replaced_and_erased(state):
    apply(state, {"kind": "user", "user_id": "u", "attributes": {"age": 3, "town": "Bonn"}}, event("u", "i", session_id="s"))
    apply(state, {"kind": "user", "user_id": "u", "attributes": {"town": None, "lang": "de"}})
    assert state.user("u") == {"age": 3, "lang": "de"} and state.user("v") is None
    assert [entry.item_id for entry in state.session_history("s")] == ["i"]
    apply(state, {"kind": "user", "user_id": "u", "attributes": {"x": 1.5}, "replace": True})
    assert state.user("u") == {"x": 1.5}
    apply(state, erase("u", 5.0))
    assert not state.user("u") and state.history("u") == [] and state.session_history("s") == [] and state.erased_at("u") == 5.0
    assert state.seen("u") == set() and state.counters("u") == {} and state.erased_at("v") is None
    apply(state, event("u", "again", received=6.0))
    assert items(state, "u") == ["again"], "the same id may come back"


def test_an_erasure_reaches_sessions_that_the_last_events_no_longer_tell(state):
    apply(state, event("u", "i", 1, session_id="long ago"), event("v", "j", 1, session_id="theirs"))
    apply(state, *(event("u", f"i{n}", 2 + n, session_id="now") for n in range(9)))
    assert len(state.session_history("long ago")) == 1 and len(state.session_history("now")) == 5
    apply(state, erase("u", 5.0))
    assert state.session_history("long ago") == state.session_history("now") == []
    assert len(state.session_history("theirs")) == 1


def test_sessions_without_events_are_forgotten(place):
    now = [1_700_000_000.0]
    state = opened(place("state"), clock=lambda: now[0], session_window_s=0.3)
    apply(state, event("u", "i", session_id="s"))
    assert len(state.session_history("s")) == 1
    time.sleep(0.4)  # Redis goes by its own clock
    now[0] += 3601
    apply(state, event("v", "i", session_id="t"))
    assert state.session_history("s") == [] and len(state.session_history("t")) == 1 and items(state, "u") == ["i"]
    state.close()


def test_what_comes_late_for_an_erased_user_has_no_effect(state):
    apply(state, erase("u", 5.0))
    apply(
        state,
        event("u", "old", 4.0, received=4.9, session_id="s"),
        {"kind": "user", "user_id": "u", "attributes": {"a": 1}, "received": 5.0},
    )
    assert state.history("u") == [] and not state.user("u") and state.session_history("s") == [] and state.seen("u") == set()
    apply(state, event("u", "new", 4.0, received=5.1))
    assert items(state, "u") == ["new"], "when it happened does not matter, when it was told does"
    apply(state, erase("u", 5.0), erase("u", 3.0))
    assert items(state, "u") == ["new"], "an erasure that is carried out already takes nothing that came after"
    state.bury({user_key("u"): 7.0})
    assert state.history("u") == [] and state.erased_at("u") == 7.0


def test_a_pseudonym_is_the_user(state):
    apply(state, event(PSEUDONYM + user_key("u").hex(), "i"))
    assert items(state, "u") == ["i"]


def test_what_one_process_commits_the_next_read_of_another_sees(place):
    code = """
import sys
from raysys.events.state import open_state
state = open_state(sys.argv[1])
for line in sys.stdin:
    print(len(state.history("u")), flush=True)
"""
    state = open_state(place("shared"))
    reader = subprocess.Popen([sys.executable, "-c", code, place("shared")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for count in range(1, 30):
        apply(state, event("u", f"i{count}", count))
        reader.stdin.write("read\n")
        reader.stdin.flush()
        assert int(reader.stdout.readline()) == count
    reader.stdin.close()
    reader.wait()
    state.close()


def store_at(place, **more) -> EventStore:
    return EventStore(open_log(place("log"), writable=True), open_state(place("state")), **more)


def test_a_store_replays_what_the_state_has_not_seen(place):
    log = open_log(place("log"), writable=True)
    log.append([event("u", "i1", 1, event_id="a"), event("u", "i2", 2, event_id="b")])  # crashed before the state commit
    store = store_at(place)
    assert store.replayed == 2 and items(store.state, "u") == ["i1", "i2"]
    assert store.submit([event("u", "i2", 2, event_id="b"), event("u", "i3", 3, event_id="c")]).result() == [False, True]
    store.close()
    again = store_at(place)
    assert again.replayed == 0 and len(again.state.history("u")) == 3
    assert again.log.read(again.log.committed("state"))[0] == [], "its place in the log is known to retention"
    again.close()


def test_the_place_of_the_state_is_noted_also_when_nothing_more_comes(place, monkeypatch):
    monkeypatch.setattr("raysys.events.store.COMMIT_EVERY_S", 0.1)
    store = store_at(place)
    store.submit([event("u", "i", event_id="a")]).result()
    deadline = time.monotonic() + 5
    while store.log.read(store.log.committed("state"))[0] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert store.log.read(store.log.committed("state"))[0] == []
    store.close()


def test_a_state_that_is_lost_comes_back_from_the_log_while_the_service_runs(place, tmp_path):
    store = store_at(place)
    for n in range(5):
        store.submit([event("u", f"i{n}", n, event_id=str(n))]).result()
    if place("state").startswith("redis"):
        client = store.state._server.client
        client.delete(*client.keys(store.state._key("*")))
    else:
        store.state.close()
        shutil.rmtree(place("state"))
        store.state = open_state(place("state"))
    assert items(store.state, "u") == []
    assert store.submit([event("u", "i5", 5, event_id="5")]).result() == [True]
    assert items(store.state, "u") == [f"i{n}" for n in range(6)] and store.state.counters("u") == {"view": 6}
    store.close()


def test_a_rebuilt_state_knows_no_erased_user_in_whatever_order_segments_come(place):
    """The first segment has the erasure last; the second began earlier and has what came before and after it."""
    early, late = open_log(place("log"), writable=True), open_log(place("log"), writable=True)
    early.append([event("x", "first", 1, received=1.0)])
    late.append([event("u", "before", 2, received=2.0)])
    late.append([erase("u", 3.0)])
    early.append([event("u", "under-way", 3, received=2.9), event("u", "after", 4, received=4.0)])
    store = store_at(place)
    assert items(store.state, "u") == ["after"] and store.state.counters("u") == {"view": 1}
    store.close()


def test_log_records_of_a_user_can_be_exported_and_hidden(place):
    store = store_at(place, pseudonyms=True)
    store.submit([event("my own name", "i", 1, session_id="my session", received=1.0), event("v", "j", 1)]).result()
    assert items(store.state, "my own name") == ["i"] and len(store.state.session_history("my session")) == 1
    (record,) = store.records_of("my own name")
    assert record["item_id"] == "i" and record["user_id"] == PSEUDONYM + user_key("my own name").hex()
    assert "my " not in repr(store.log.read()[0])
    store.submit([erase("my own name", 2.0)]).result()
    assert store.records_of("my own name") == [] and items(store.state, "my own name") == []
    store.close()


def test_a_failing_disk_is_told_to_every_waiting_request(place, monkeypatch):
    store = store_at(place)

    def broken(records):
        raise StateError("event log: cannot write, disk full")

    with monkeypatch.context() as patch:
        patch.setattr(store.log, "append", broken)
        with pytest.raises(StateError, match="disk full"):
            store.submit([event("u", "i")]).result()
    assert store.submit([event("u", "i")]).result() == [True]
    store.close()


def test_waiting_writes_are_bounded_and_one_that_nobody_waits_for_is_left_out(place, monkeypatch):
    monkeypatch.setattr("raysys.events.store.MAX_WAITING", 3)
    store = store_at(place)
    gate, append = threading.Event(), store.log.append
    monkeypatch.setattr(store.log, "append", lambda records: gate.wait(10) and append(records))
    futures = []
    with pytest.raises(ServeOverloaded):
        for n in range(20):
            futures.append(store.submit([event("u", f"i{n}", n)]))
    assert futures[-1].cancel()
    gate.set()
    assert all(future.result(timeout=10) == [True] for future in futures[:-1]) and len(futures) <= 5
    assert store.submit([event("u", "last", 99)]).result(timeout=10) == [True], "the writer lives"
    assert items(store.state, "u") == [*(f"i{n}" for n in range(len(futures) - 1)), "last"]
    store.close()


def test_a_batch_larger_than_what_may_wait_is_taken_when_nothing_else_waits(place, monkeypatch):
    monkeypatch.setattr("raysys.events.store.MAX_WAITING", 3)
    store = store_at(place)
    assert store.submit([event("u", f"i{n}", n) for n in range(10)]).result() == [True] * 10
    store.close()


def test_wrong_places_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="local folder .* or redis://"):
        open_state("memcached://localhost")
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="memory-mapped"):
        open_state(str(tmp_path / "file"))
    assert os.path.exists(tmp_path / "file")
