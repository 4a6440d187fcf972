"""Item and user tables, vocabularies and event meanings."""

from collections import Counter

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysys.errors import SchemaError
from raysys.prepare.tables import items_in_order, read_attributes, users_in_order
from raysys.prepare.vocabulary import Stats, event_codes, order_items, resolve_event_types
from raysys.schema import DEFAULT_EVENT_TYPES, EventType


def items_of(tmp_path, **columns):
    pq.write_table(pa.table(columns), tmp_path / "items.parquet")
    return read_attributes([str(tmp_path / "items.parquet")], "item_id")


def order(*ids, num_train=0):
    return pl.DataFrame({"item_id": list(ids), "num_train": [num_train] * len(ids)})


def test_items_without_a_table_get_defaults():
    table = items_in_order(order("a", "b", num_train=3), read_attributes([], "item_id"))
    assert table.column_names == ["item_idx", "item_id", "num_train", "title", "text", "categories", "available", "created_at"]
    assert table.to_pylist()[1] == {
        "item_idx": 1,
        "item_id": "b",
        "num_train": 3,
        "title": "",
        "text": "",
        "categories": [],
        "available": True,
        "created_at": None,
    }
    assert table.schema.field("item_idx").type == pa.int32()
    assert table.schema.field("categories").type == pa.list_(pa.string())


@pytest.mark.parametrize(
    "given",
    [["Drama|Sci-Fi", "Comedy, Drama", None, "", "One"], [["Drama", " Sci-Fi "], ["Comedy", "Drama", ""], None, [], ["One"]]],
)
def test_categories_as_lists_or_text(tmp_path, given):
    table = items_of(tmp_path, item_id=list("abcde"), categories=given)
    ordered = items_in_order(order(*"abcde"), table)
    assert ordered["categories"].to_pylist() == [["Drama", "Sci-Fi"], ["Comedy", "Drama"], [], [], ["One"]]


def test_the_last_row_of_an_item_wins_and_is_counted(tmp_path):
    table = items_of(tmp_path, item_id=["a", "b", "a"], title=["old", "b", "new"])
    assert table.duplicates == 1
    assert items_in_order(order("a", "b"), table)["title"].to_pylist() == ["new", "b"]


def test_items_without_id_are_quarantined(tmp_path):
    table = items_of(tmp_path, item_id=["a", None, " "], title=["x", "y", "z"])
    assert table.quarantine == {"empty item_id, attribute table": 1, "null item_id, attribute table": 1}
    assert table.bad["row"].to_list() == [1, 2]


def test_embeddings_and_attributes_come_through_unchanged(tmp_path):
    vectors = pa.FixedSizeListArray.from_arrays(pa.array([1, 2, 3, 4], pa.float32()), 2)
    table = items_of(tmp_path, item_id=["a", "b"], own_embedding=vectors, price=[1.5, None], brand=["x", "y"])
    ordered = items_in_order(order("b", "nowhere", "a"), table)
    assert ordered.schema.field("own_embedding").type == pa.list_(pa.float32(), 2)
    assert ordered["own_embedding"].to_pylist() == [[3, 4], None, [1, 2]]
    assert ordered["price"].to_pylist() == [None, None, 1.5]
    assert ordered["brand"].to_pylist() == ["y", None, "x"]


@pytest.mark.parametrize("given", [[True, False, None], [1, 0, None], ["yes", "False", None]])
def test_available_in_several_spellings(tmp_path, given):
    table = items_of(tmp_path, item_id=list("abc"), available=given)
    assert items_in_order(order(*"abc"), table)["available"].to_pylist() == [True, False, True]


def test_created_at_is_a_utc_timestamp(tmp_path):
    table = items_of(tmp_path, item_id=["a", "b"], created_at=["2024-01-02", "who knows"])
    created = items_in_order(order("a", "b"), table)["created_at"]
    assert created.type == pa.timestamp("us", "UTC")
    assert [str(moment)[:10] for moment in created.to_pylist()] == ["2024-01-02", "None"]
    assert table.notes == ["1 unreadable created_at of items set to null"]


def test_names_of_neighbours(tmp_path):
    (tmp_path / "items.csv").write_text('ITEM_ID,GENRES,CREATION_TIMESTAMP,"PRICE"\n01,a|b,1700000000,3\n')
    table = read_attributes([str(tmp_path / "items.csv")], "item_id")
    assert table.rows.columns == ["item_id", "categories", "created_at", "PRICE"]
    assert table.rows["item_id"].to_list() == ["01"]
    assert table.rows["PRICE"].to_list() == [3]
    (tmp_path / "users.csv").write_text("USER_ID,Age\nu1,30\n")
    users = read_attributes([str(tmp_path / "users.csv")], "user_id")
    assert users_in_order(pl.DataFrame({"user_id": ["u0", "u1"]}), users).to_pylist() == [
        {"user_idx": 0, "user_id": "u0", "Age": None},
        {"user_idx": 1, "user_id": "u1", "Age": 30},
    ]


def test_text_with_newlines_in_a_csv(tmp_path):
    (tmp_path / "items.csv").write_text('item_id,title\na,"two\nlines"\n')
    assert read_attributes([str(tmp_path / "items.csv")], "item_id").rows["title"].to_list() == ["two\nlines"]


def test_parts_with_different_columns(tmp_path):
    pq.write_table(pa.table({"item_id": ["a"], "title": ["x"]}), tmp_path / "part-0.parquet")
    pq.write_table(pa.table({"item_id": [2], "price": [1.0]}), tmp_path / "part-1.parquet")
    table = read_attributes([str(tmp_path / f"part-{n}.parquet") for n in range(2)], "item_id")
    assert table.rows.rows() == [("a", "x", None), ("2", None, 1.0)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"sku": ["a"]}, "expected a column 'item_id', found sku"),
        ({"item_id": ["a"], "num_train": [1]}, "column 'num_train' is a name that prepare writes itself"),
        ({"item_id": ["a"], "categories": [1]}, "column 'categories': expected lists of text"),
        ({"item_id": ["a"], "available": ["maybe"]}, "column 'available': expected true or false .* 'maybe'"),
        ({"item_id": ["a"], "title": [["x"]]}, "column 'title': expected text"),
        ({"item_id": [[1]]}, "column 'item_id': expected text or whole numbers"),
        ({"item_id": ["a"], "x_embedding": [[1.0]]}, "column 'x_embedding': expected fixed-size lists of floats"),
        ({"item_id": ["a"], "genre": ["x"], "category": ["y"]}, "'genre' and 'category' both mean 'categories'"),
    ],
)
def test_a_wrong_item_table_is_one_clear_error(tmp_path, columns, message):
    with pytest.raises(SchemaError, match=message) as caught:
        items_of(tmp_path, **columns)
    assert "items.parquet" in str(caught.value)


def stats(counts: dict, events: dict | None = None, positive: int = 1) -> Stats:
    items = pl.DataFrame({"item_id": list(counts), "num_train": list(counts.values())})
    return Stats(items, Counter(events or {}), 9, 0, positive)


def test_item_rows_are_warm_then_held_out_then_listed():
    counts = {"few": 1, "many": 5, "also": 5, "held": 0}
    listed = pl.Series(["zz", "many", "aa"])
    leave = order_items(stats(counts), listed, split="leave-one-out", min_item_events=0)
    assert leave.rows["item_id"].to_list() == ["also", "many", "few", "held", "aa", "zz"]
    assert leave.rows["num_train"].to_list() == [5, 5, 1, 0, 0, 0]
    assert leave.num_warm == 3
    timed = order_items(stats(counts), listed, split="time", min_item_events=0)
    assert timed.rows["item_id"].to_list() == ["also", "many", "few", "aa", "zz"]


def test_rare_items_are_cold():
    rare = order_items(stats({"few": 2, "many": 5}), pl.Series([], dtype=pl.String), split="leave-one-out", min_item_events=3)
    assert (rare.rows["item_id"].to_list(), rare.num_warm, rare.rare.to_list(), rare.dropped) == (["many", "few"], 1, ["few"], 2)
    gone = order_items(stats({"few": 2, "many": 5}), pl.Series([], dtype=pl.String), split="time", min_item_events=3)
    assert gone.rows["item_id"].to_list() == ["many"]


def test_event_codes_are_alphabetical_and_bounded():
    assert event_codes(Counter({"view": 9, "click": 1, "held_out_only": 0})) == (["other", "click", "view"], [])
    names, rest = event_codes(Counter({f"e{n:03d}": n for n in range(1, 131)}))
    assert len(names) == 127
    assert rest == ["e004", "e003", "e002", "e001"]


def test_unknown_events_have_weight_and_are_not_positive():
    types, notes = resolve_event_types(DEFAULT_EVENT_TYPES, stats({}, {"purchase": 1, "poke": 3}))
    assert types["poke"] == EventType(1.0)
    assert "poke" in notes[0]


def test_without_a_positive_event_all_with_weight_are_positive():
    types, notes = resolve_event_types(DEFAULT_EVENT_TYPES, stats({}, {"view": 3, "rating": 1}, positive=0))
    assert types["view"].positive
    assert types["rating"] == EventType(1.0, positive=True, min_value=None)
    assert not types["skip"].positive
    assert "rating, view" in notes[0]
