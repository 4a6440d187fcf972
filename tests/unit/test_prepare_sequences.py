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
    stable_order,
)
from raysys.prepare.vocabulary import Stats, merge_stats, order_users, partition_stats
from raysys.schema import DEFAULT_EVENT_TYPES, EventType

NAN = float("nan")


def rows(*events) -> pa.Table:
    """Rows of (user, item, time, event, value, event_id) in the order of their files."""
    columns = [pa.array(list(column), getattr(field.type, "value_type", field.type)) for column, field in zip(zip(*events), CLEAN_SCHEMA)]
    return pa.table([c.dictionary_encode() if pa.types.is_dictionary(f.type) else c for c, f in zip(columns, CLEAN_SCHEMA)], CLEAN_SCHEMA)


def lists(table: pa.Table, column: str) -> dict:
    found: dict[str, list] = {}
    for user, value in zip(table["user_id"].to_pylist(), table[column].to_pylist()):
        found.setdefault(user, []).append(value)
    return found


def kept(*tables: pa.Table) -> pa.Table:
    """What of some ordered rows reaches the sequences, as a table for `lists`."""
    flat = split_partition(order_partition(tables), SplitRule("none"))
    users = [user for user, count in zip(flat.users.to_pylist(), np.diff(flat.indptr)) for _ in range(count)]
    return pa.table({"user_id": users, "item_id": flat.items.to_pylist(), "time": flat.times, "value": flat.values})


def test_events_come_in_time_order_and_ties_in_source_order():
    table = rows(
        ("a", "first", 5, "view", NAN, None),
        ("b", "late", 20, "view", NAN, None),
        ("b", "early", 10, "view", NAN, None),
        ("a", "second", 5, "view", NAN, None),
    )
    ordered = order_partition([table])
    assert lists(ordered, "item_id") == {"a": ["first", "second"], "b": ["early", "late"]}
    assert ordered["user_id"].to_pylist() == ["a", "a", "b", "b"]
    assert order_partition([table.slice(1), table.slice(0, 1)])["item_id"].to_pylist()[:2] == ["second", "first"]


@pytest.mark.parametrize("scale", [1, 1_000_000, 10**15])  # small keys, whole seconds, and more than one 64-bit key holds
def test_the_order_is_that_of_user_time_and_row(scale):
    rng = np.random.default_rng(0)
    user, time = rng.integers(0, 50_000, 2000).astype(np.int32), rng.integers(-500, 500, 2000) * scale
    assert stable_order(user, time).tolist() == sorted(range(2000), key=lambda row: (user[row], time[row], row))


def test_duplicates_by_event_id_and_by_content():
    table = rows(
        ("a", "x", 1, "view", 1.0, "e1"),
        ("a", "y", 2, "view", 2.0, "e1"),  # the same event id: the earlier one stays
        ("a", "x", 1, "view", 9.0, "e2"),  # the same user, item, time and event
        ("a", "x", 1, "click", 3.0, None),  # another event
        ("a", "x", 4, "view", 4.0, None),  # another time
        ("b", "x", 1, "view", 5.0, "e1"),  # another user
    )
    assert lists(kept(table), "value") == {"a": [1.0, 3.0, 4.0], "b": [5.0]}


def test_rows_without_event_id_are_not_duplicates_of_each_other():
    table = rows(*(("a", f"i{n}", n, "view", NAN, "only" if n == 0 else None) for n in range(4)))
    assert len(lists(kept(table), "item_id")["a"]) == 4


def test_a_late_event_with_a_known_id_brings_back_what_the_known_one_hid():
    first = rows(("a", "x", 5, "view", 1.0, "e1"), ("a", "x", 5, "view", 2.0, "e2"))
    late = rows(("a", "z", 1, "view", 3.0, "e1"))
    assert lists(kept(first), "value") == {"a": [1.0]}
    assert lists(kept(order_partition([first]), late), "value") == lists(kept(first, late), "value") == {"a": [3.0, 2.0]}


def test_the_id_of_a_hidden_event_is_not_forgotten():
    first = rows(("a", "y", 1, "click", 1.0, None), ("a", "y", 1, "click", 2.0, "q"))
    late = rows(("a", "x", 1, "view", 3.0, "q"))
    assert lists(kept(order_partition([first]), late), "value") == lists(kept(first, late), "value") == {"a": [1.0]}


EVENT_ROWS = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from("xy"), st.integers(0, 3), st.sampled_from(["view", "click"]), st.sampled_from("pqr*")),
    max_size=14,
)


@settings(deadline=None, max_examples=200)
@given(EVENT_ROWS, st.lists(st.integers(0, 14), max_size=3))
def test_ordering_in_several_calls_gives_what_one_call_gives(events, cuts):
    table = rows(*((u, i, t, e, float(n), None if k == "*" else k) for n, (u, i, t, e, k) in enumerate(events))) if events else None
    if table is None:
        return
    bounds = [0, *sorted(min(cut, len(events)) for cut in cuts), len(events)]
    by_calls = CLEAN_SCHEMA.empty_table()
    for first, last in zip(bounds, bounds[1:]):
        parts = [part for part in (by_calls, table.slice(first, last - first)) if part.num_rows]
        by_calls = order_partition(parts)
    once = kept(table)
    assert kept(by_calls).to_pydict() == once.to_pydict()
    # And both are what the rule says, row by row.
    wanted, ids, contents = [], set(), set()
    for number, (u, i, t, e, k) in sorted(enumerate(events), key=lambda pair: (pair[1][0], pair[1][2], pair[0])):
        if k == "*" or (u, k) not in ids:
            ids.add((u, k))
            if (u, i, t, e) not in contents:
                contents.add((u, i, t, e))
                wanted.append(float(number))
    assert once["value"].to_pylist() == wanted


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
    table = order_partition([rows(*((u, i, t, "view", NAN, None) for u, i, t in events))])
    flat = split_partition(table, SplitRule("leave-one-out", min_user_events=2))
    assert flat.users.to_pylist() == ["long"]
    assert flat.items.to_pylist() == ["a", "b", "c", "d"]
    assert flat.indptr.tolist() == [0, 4]
    assert flat.split.tolist() == [0, 0, 1, 2]


def vocabulary(items, *, rare=(), ordinal=True, events=("other", "click", "view")) -> Vocabulary:
    return Vocabulary(
        pl.DataFrame({"item_id": items}).with_row_index("item_idx").to_arrow(),
        list(events),
        DEFAULT_EVENT_TYPES,
        pa.array(rare, pa.large_string()),
        ordinal,
    )


def test_encoding_with_unknown_items_and_events():
    table = order_partition(
        [rows(("u", "a", 1, "view", NAN, None), ("u", "new", 2, "click", 2.0, None), ("u", "b", 3, "strange", NAN, None))]
    )
    encoded = encode_partition(split_partition(table, SplitRule("none")), np.array([7]), vocabulary(["b", "a"]))
    row = encoded.to_pylist()[0]
    assert row["user_idx"] == 7
    assert row["item_idx"] == [1, -1, 0]
    assert row["event"] == [2, 1, 0]
    assert row["positive"] == [False, True, False]
    assert row["timestamp"] == [1, 2, 3]


def test_microseconds_become_whole_seconds():
    table = order_partition([rows(("u", "a", 1_700_000_000_999_999, "view", NAN, None))])
    encoded = encode_partition(split_partition(table, SplitRule("none")), np.array([0]), vocabulary(["a"], ordinal=False))
    assert encoded["timestamp"].to_pylist() == [[1_700_000_000]]


def test_rare_items_lose_training_events_and_keep_targets():
    events = [("u", "rare", 1), ("u", "a", 2), ("u", "a", 3), ("u", "rare", 4), ("v", "rare", 1)]
    table = order_partition([rows(*((u, i, t, "view", NAN, None) for u, i, t in events))])
    encoded = encode_partition(
        split_partition(table, SplitRule("leave-one-out")), np.array([0, 1]), vocabulary(["a", "rare"], rare=["rare"])
    )
    assert encoded["user_idx"].to_pylist() == [0]
    assert encoded["item_idx"].to_pylist() == [[0, 0, 1]]
    assert encoded["split"].to_pylist() == [[0, 1, 2]]


def test_positives_follow_type_and_value():
    types = {"click": EventType(1.0, positive=True), "rating": EventType(1.0, positive=True, min_value=4.0), "view": EventType()}
    events = pa.array(["click", "rating", "rating", "rating", "view"]).dictionary_encode()
    values = np.array([NAN, 4.0, 3.9, NAN, 5.0], np.float32)
    assert positives(events, values, types).tolist() == [True, True, False, False, False]


@settings(deadline=None)  # the first example pays for Polars' first query
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("wxyz"), st.integers(0, 30)), min_size=1, max_size=60, unique=True),
    st.randoms(use_true_random=False),
)
def test_content_does_not_depend_on_row_order_or_partition(events, random):
    # Times are unique within a user, so that no tie is left to the source order.
    events = [(u, i, t * 4 + "wxyz".index(i)) for u, i, t in events]
    vocab = vocabulary(list("wxyz"))

    def encoded(some):
        flat = split_partition(order_partition([rows(*((u, i, t, "view", NAN, None) for u, i, t in some))]), SplitRule("leave-one-out"))
        return encode_partition(flat, np.array(["abcd".index(user) for user in flat.users.to_pylist()]), vocab)

    whole = content_sums(encoded(events))
    shuffled = events[:]
    random.shuffle(shuffled)
    assert content_sums(encoded(shuffled)) == whole
    parts = [[event for event in shuffled if event[0] in users] for users in ("ab", "cd")]
    sums = [content_sums(encoded(part)) for part in parts if part]
    assert [sum(lane) % 2**64 for lane in zip(*sums)] == whole


def test_every_field_is_part_of_the_content():
    table = order_partition([rows(("u", "a", 1, "view", NAN, None), ("u", "b", 2, "click", 1.0, None))])
    base = encode_partition(split_partition(table, SplitRule("none")), np.array([0]), vocabulary(["a", "b"]))
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
    ordered = order_partition([])
    assert ordered.num_rows == 0
    flat = split_partition(ordered, SplitRule(kind, min_user_events=1))
    assert encode_partition(flat, np.array([], np.int32), vocabulary(["a"])).num_rows == 0
    assert partition_stats(flat, DEFAULT_EVENT_TYPES, 0)["item_id"].to_pylist() == [[]]


def test_counts_add_up_whatever_the_grouping():
    def stats(*events):
        flat = split_partition(order_partition([rows(*((u, i, t, e, NAN, None) for u, i, t, e in events))]), SplitRule("leave-one-out"))
        return partition_stats(flat, DEFAULT_EVENT_TYPES, len(events))

    parts = [
        stats(("a", "x", 1, "view"), ("a", "y", 2, "click")),  # train x, test y
        stats(("b", "x", 5, "click"), ("b", "x", 6, "view"), ("b", "z", 7, "view"), ("b", "z", 8, "view")),
        stats(("c", "y", 9, "click")),
        partition_stats(split_partition(order_partition([]), SplitRule("none")), DEFAULT_EVENT_TYPES, 0),
    ]
    total = Stats.of(merge_stats(parts))
    assert dict(total.items.iter_rows()) == {"x": 3, "y": 1, "z": 0}
    assert total.events == {"view": 2, "click": 2}
    assert (total.watermark, total.interactions, total.positive) == (9, 7, 2)
    tree = Stats.of(merge_stats([merge_stats(parts[:2]), merge_stats(parts[2:])]))
    assert tree.items.equals(total.items) and (tree.events, tree.watermark) == (total.events, total.watermark)


def test_users_are_numbered_by_id_over_all_partitions():
    order, rows_of = order_users([pl.Series(["b", "d"]), pl.Series([], dtype=pl.String), pl.Series(["a", "c"])], pl.Series(["z", "c", "e"]))
    assert order["user_id"].to_list() == ["a", "b", "c", "d", "e", "z"]
    assert [part.tolist() for part in rows_of] == [[1, 3], [], [0, 2]]
