"""Deduplication, order, splits and encoding on numbers worked by hand."""

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.prepare.fingerprint import content_sums
from raysys.prepare.rows import CLEAN_SCHEMA
from raysys.prepare.sequences import (
    SplitRule,
    Vocabulary,
    encode_partition,
    order_partition,
    positives,
    split_codes,
    split_partition,
)
from raysys.schema import DEFAULT_EVENT_TYPES, EventType

NAN = float("nan")


def rows(*events) -> pa.Table:
    """Rows of (user, item, time, event, value, event_id, source)."""
    return pa.table([list(column) for column in zip(*events)], schema=CLEAN_SCHEMA)


def lists(table: pa.Table, column: str) -> dict:
    return dict(zip(table["user_id"].to_pylist(), table[column].to_pylist()))


def test_events_come_in_time_order_and_ties_in_source_order():
    table = rows(
        ("b", "late", 20, "view", NAN, None, 0),
        ("a", "second", 5, "view", NAN, None, 9),
        ("a", "first", 5, "view", NAN, None, 2),
        ("b", "early", 10, "view", NAN, None, 1),
    )
    ordered = order_partition(table)
    assert lists(ordered, "item_id") == {"a": ["first", "second"], "b": ["early", "late"]}
    assert lists(ordered, "duplicates") == {"a": 0, "b": 0}


def test_duplicates_by_event_id_and_by_content():
    table = rows(
        ("a", "x", 1, "view", 1.0, "e1", 0),
        ("a", "y", 2, "view", 2.0, "e1", 1),  # the same event id: the earlier one stays
        ("a", "x", 1, "view", 9.0, "e2", 2),  # the same user, item, time and event
        ("a", "x", 1, "click", 3.0, None, 3),  # another event
        ("a", "x", 4, "view", 4.0, None, 4),  # another time
        ("b", "x", 1, "view", 5.0, "e1", 5),  # another user
    )
    ordered = order_partition(table)
    assert lists(ordered, "value") == {"a": [1.0, 3.0, 4.0], "b": [5.0]}
    assert lists(ordered, "duplicates") == {"a": 2, "b": 0}


def test_rows_without_event_id_are_not_duplicates_of_each_other():
    table = rows(*(("a", f"i{n}", n, "view", NAN, "only" if n == 0 else None, n) for n in range(4)))
    assert len(lists(order_partition(table), "item_id")["a"]) == 4


def test_leave_one_out_by_hand():
    # users with 1, 2, 3 and 5 events
    indptr = np.array([0, 1, 3, 6, 11])
    codes = split_codes(indptr, np.arange(11), SplitRule("leave-one-out"))
    assert codes.tolist() == [0, 0, 2, 0, 1, 2, 0, 0, 0, 1, 2]


def test_time_split_is_global_and_its_borders_are_inclusive():
    times = np.array([1, 5, 9, 2, 6, 7])
    codes = split_codes(np.array([0, 3, 6]), times, SplitRule("time", valid_from=6, test_from=9))
    assert codes.tolist() == [0, 0, 2, 0, 1, 1]
    assert split_codes(np.array([0, 3, 6]), times, SplitRule("none")).tolist() == [0] * 6


def test_users_with_too_few_training_events_are_left_out():
    events = [("short", "x", 1), ("short", "y", 2), ("long", "a", 1), ("long", "b", 2), ("long", "c", 3), ("long", "d", 4)]
    table = order_partition(rows(*((u, i, t, "view", NAN, None, t) for u, i, t in events)))
    flat = split_partition(table, SplitRule("leave-one-out", min_user_events=2))
    assert flat.users.to_pylist() == ["long"]
    assert flat.items.to_pylist() == ["a", "b", "c", "d"]
    assert flat.indptr.tolist() == [0, 4]
    assert flat.split.tolist() == [0, 0, 1, 2]


def test_a_slice_of_a_partition_is_read_like_the_whole():
    table = order_partition(rows(*((u, f"{u}{t}", t, "view", NAN, None, t) for u in "abc" for t in range(3))))
    flat = split_partition(table.slice(1, 1), SplitRule("none"))
    assert flat.items.to_pylist() == ["b0", "b1", "b2"]
    assert flat.indptr.tolist() == [0, 3]


def vocabulary(items, users, *, rare=(), ordinal=True, events=("other", "click", "view")) -> Vocabulary:
    return Vocabulary(
        pl.DataFrame({"item_id": items}).with_row_index("item_idx").to_arrow(),
        pl.DataFrame({"user_id": users}).with_row_index("user_idx").to_arrow(),
        list(events),
        DEFAULT_EVENT_TYPES,
        pa.array(rare, pa.large_string()),
        ordinal,
    )


def test_encoding_with_unknown_items_and_events():
    table = order_partition(
        rows(("u", "a", 1, "view", NAN, None, 0), ("u", "new", 2, "click", 2.0, None, 1), ("u", "b", 3, "strange", NAN, None, 2))
    )
    encoded = encode_partition(split_partition(table, SplitRule("none")), vocabulary(["b", "a"], ["t", "u"]))
    row = encoded.to_pylist()[0]
    assert row["user_idx"] == 1
    assert row["item_idx"] == [1, -1, 0]
    assert row["event"] == [2, 1, 0]
    assert row["positive"] == [False, True, False]
    assert row["timestamp"] == [1, 2, 3]


def test_microseconds_become_whole_seconds():
    table = order_partition(rows(("u", "a", 1_700_000_000_999_999, "view", NAN, None, 0)))
    encoded = encode_partition(split_partition(table, SplitRule("none")), vocabulary(["a"], ["u"], ordinal=False))
    assert encoded["timestamp"].to_pylist() == [[1_700_000_000]]


def test_rare_items_lose_training_events_and_keep_targets():
    events = [("u", "rare", 1), ("u", "a", 2), ("u", "a", 3), ("u", "rare", 4), ("v", "rare", 1)]
    table = order_partition(rows(*((u, i, t, "view", NAN, None, t) for u, i, t in events)))
    encoded = encode_partition(split_partition(table, SplitRule("leave-one-out")), vocabulary(["a", "rare"], ["u", "v"], rare=["rare"]))
    assert encoded["user_idx"].to_pylist() == [0]
    assert encoded["item_idx"].to_pylist() == [[0, 0, 1]]
    assert encoded["split"].to_pylist() == [[0, 1, 2]]


def test_positives_follow_type_and_value():
    types = {"click": EventType(1.0, positive=True), "rating": EventType(1.0, positive=True, min_value=4.0), "view": EventType()}
    events = pl.Series(["click", "rating", "rating", "rating", "view"])
    values = pl.Series([NAN, 4.0, 3.9, NAN, 5.0], dtype=pl.Float32)
    assert positives(events, values, types).to_list() == [True, True, False, False, False]


@settings(deadline=None)  # the first example pays for Polars' first query
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("wxyz"), st.integers(0, 30)), min_size=1, max_size=60, unique=True),
    st.randoms(use_true_random=False),
)
def test_content_does_not_depend_on_row_order_or_partition(events, random):
    # Times are unique within a user, so that no tie is left to the source order.
    events = [(u, i, t * 4 + "wxyz".index(i)) for u, i, t in events]
    vocab = vocabulary(list("wxyz"), list("abcd"))

    def encoded(some):
        table = rows(*((u, i, t, "view", NAN, None, n) for n, (u, i, t) in enumerate(some)))
        return encode_partition(split_partition(order_partition(table), SplitRule("leave-one-out")), vocab)

    whole = content_sums(encoded(events))
    shuffled = events[:]
    random.shuffle(shuffled)
    assert content_sums(encoded(shuffled)) == whole
    parts = [[event for event in shuffled if event[0] in users] for users in ("ab", "cd")]
    sums = [content_sums(encoded(part)) for part in parts if part]
    assert [sum(lane) % 2**64 for lane in zip(*sums)] == whole


def test_every_field_is_part_of_the_content():
    table = order_partition(rows(("u", "a", 1, "view", NAN, None, 0), ("u", "b", 2, "click", 1.0, None, 1)))
    base = encode_partition(split_partition(table, SplitRule("none")), vocabulary(["a", "b"], ["u"]))
    changed = {
        "user_idx": [1],
        "item_idx": [[1, 0]],
        "event": [[2, 2]],
        "timestamp": [[1, 3]],
        "value": [[NAN, 2.0]],
        "positive": [[True, True]],
        "split": [[0, 1]],
    }
    seen = {tuple(content_sums(base))}
    for name, value in changed.items():
        position = base.column_names.index(name)
        other = base.set_column(position, name, pa.array(value, base.schema.field(name).type))
        seen.add(tuple(content_sums(other)))
    assert len(seen) == len(changed) + 1


@pytest.mark.parametrize("kind", ["leave-one-out", "time", "none"])
def test_an_empty_partition_is_fine(kind):
    ordered = order_partition(CLEAN_SCHEMA.empty_table())
    assert ordered.num_rows == 0
    encoded = encode_partition(split_partition(ordered, SplitRule(kind)), vocabulary(["a"], ["u"]))
    assert encoded.num_rows == 0
