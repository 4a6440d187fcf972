import numpy as np
import pyarrow as pa
import pytest

from raysys.bundle import Bundle, Histories
from raysys.events.embedded_log import EmbeddedLog
from raysys.events.identity import user_key
from raysys.online.feed import flat_sequences, learnable_since, merged_histories, read_fresh, sampled_histories

ITEMS = ["a", "b", "c", "d"]


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("RAYSYS_USER_KEY", "a key only for tests")


@pytest.fixture
def bundle():
    # ann: a@10 b@20; bob: c@15; cid: d@5
    sequences = flat_sequences(np.array([0, 1, 2, 3]), np.array([1, 1, 1, 1]), np.array([10, 20, 15, 5]), np.array([0, 2, 3, 4]))
    histories = Histories.build(sequences, ["ann", "bob", "cid"], max_events=3)
    items = pa.table({"item_idx": pa.array(range(4), pa.int32()), "item_id": ITEMS})
    return Bundle(items, {}, {}, histories, {"events": ["other", "view", "purchase"], "created": "2026-01-01T00:00:00+00:00"})


@pytest.fixture
def log(tmp_path):
    return EmbeddedLog(str(tmp_path / "events"), writable=True)


def event(user, item, time, **more):
    return {"kind": "event", "user_id": user, "item_id": item, "event": "view", "timestamp": float(time), "value": None, **more}


def history(histories, user):
    found = histories.lookup(user)
    return None if found is None else [ITEMS[item] for item in found[0]]


def test_new_events_join_what_the_bundle_knows(bundle, log):
    log.append([event("ann", "c", 30.7), event("new", "d", 31, event="purchase"), event("ann", "a", 32, event="never heard of")])
    fresh = read_fresh(log, bundle, None, max_events=100)
    assert fresh.num_events == 3 and fresh.num_skipped == 0
    assert fresh.keys == [user_key("ann"), user_key("new")]
    assert fresh.sequences.items.tolist() == [0, 1, 2, 0, 3]
    assert fresh.sequences.events.tolist() == [1, 1, 1, 0, 2]
    assert fresh.sequences.times.tolist() == [10, 20, 30, 32, 31]
    assert fresh.arrival.tolist() == [-1, -1, 0, 2, 1]
    merged = merged_histories(bundle.histories, fresh)
    assert history(merged, "ann") == ["b", "c", "a"], "cut to the last three"
    assert history(merged, "new") == ["d"] and history(merged, "bob") == ["c"]
    assert len(merged) == 4


def test_a_late_event_takes_its_place_in_time(bundle, log):
    log.append([event("ann", "c", 15)])
    fresh = read_fresh(log, bundle, None, max_events=100)
    assert fresh.sequences.items.tolist() == [0, 2, 1] and fresh.arrival.tolist() == [-1, 0, -1]


def test_what_cannot_be_learnt_is_skipped_and_counted(bundle, log):
    log.append(
        [
            event("ann", "unknown", 30),
            event("ann", "c", 31, event_id="e1"),
            event("ann", "c", 31, event_id="e1"),
            event("ann", "d", 32, event="impression"),
            {"kind": "impression", "user_id": "ann", "items": ["a"], "at": 33.0},
            {"kind": "item", "item_id": "z", "attributes": {}},
        ]
    )
    fresh = read_fresh(log, bundle, None, max_events=100)
    assert (fresh.num_events, fresh.num_skipped, fresh.num_records) == (1, 2, 6)


def test_offsets_continue_where_the_last_read_ended(bundle, log):
    log.append([event("ann", "c", 30)])
    first = read_fresh(log, bundle, None, max_events=100)
    nothing = read_fresh(log, bundle, first.offset, max_events=100)
    assert nothing.num_events == 0 and len(nothing.sequences) == 0
    log.append([event("bob", "d", 40)])
    second = read_fresh(log, bundle, nothing.offset, max_events=100)
    assert second.keys == [user_key("bob")] and second.num_events == 1


def test_erasure_forgets_history_and_earlier_events_but_not_later_ones(bundle, log):
    log.append([event("ann", "c", 30), event("cid", "a", 30), {"kind": "erase", "user_key": user_key("ann").hex(), "at": 31.0}])
    log.append([{"kind": "erase", "user_key": user_key("bob").hex(), "at": 32.0}, event("ann", "d", 33)])
    fresh = read_fresh(log, bundle, None, max_events=100)
    assert fresh.num_events == 2
    merged = merged_histories(bundle.histories, fresh)
    assert history(merged, "ann") == ["d"], "the same id came back as a new user"
    assert history(merged, "bob") is None
    assert history(merged, "cid") == ["d", "a"]


def test_samples_leave_out_the_users_concerned(bundle):
    sample = sampled_histories(bundle.histories, [user_key("ann")], 10, np.random.default_rng(0))
    assert sorted(sample.items.tolist()) == [2, 3] and sample.indptr.tolist() == [0, 1, 2]
    assert len(sampled_histories(bundle.histories, [], 1, np.random.default_rng(0))) == 1
    nobody = sampled_histories(bundle.histories, [user_key(user) for user in ("ann", "bob", "cid")], 5, np.random.default_rng(0))
    assert len(nobody) == 0 and nobody.indptr.tolist() == [0]


def test_what_came_before_a_time_is_left_out(bundle):
    late = sampled_histories(bundle.histories, [], 10, np.random.default_rng(0), since=15)
    assert sorted(late.items.tolist()) == [0, 1, 2], "all of ann and bob, whose last events are at 20 and 15"
    # Two users: 0 1 | 2 3, and 4 5 |; the event before the first late one is what this followed.
    both = flat_sequences(np.arange(6), np.ones(6), np.array([1, 2, 10, 11, 3, 4]), np.array([0, 4, 6]))
    kept = learnable_since(both, 10)
    assert kept.items.tolist() == [1, 2, 3] and kept.indptr.tolist() == [0, 3, 3]


def test_no_user_id_leaves_the_feed(bundle, log):
    log.append([event("a very private name", "c", 30)])
    fresh = read_fresh(log, bundle, None, max_events=100)
    assert "private" not in repr(fresh) and b"private" not in merged_histories(bundle.histories, fresh).table["user_key"].to_pylist()[-1]
