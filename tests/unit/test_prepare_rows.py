from collections import Counter

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysys.prepare.dataset import QUARANTINE
from raysys.prepare.rows import RowRules, clean_chunk, clean_rows, plan_chunks, read_reports
from raysys.prepare.source import SourceFile, open_sources

T = 1_700_000_000
RULES = RowRules(ordinal=False, first_us=T * 10**6 - 10**12, last_us=T * 10**6 + 10**12, no_weight=("impression",), work="")


def clean(columns: dict, rules: RowRules = RULES, default_event: str = "view"):
    report = {name: Counter() for name in ("quarantine", "dropped", "forms", "imputed")}
    file = SourceFile("f", "f", 3, "parquet", {}, (), default_event=default_event)
    good, bad = clean_rows(pa.table(columns), file, 100, rules, report)
    return pl.DataFrame(good), bad, report


def test_each_kind_of_bad_row_has_its_reason():
    columns = {
        "user_id": ["a", None, "", "a", "a", "a", "a", "a", "a"],
        "item_id": ["x", "x", "x", None, "  ", "x", "x", "x", "x"],
        "timestamp": [str(T), str(T), str(T), str(T), str(T), None, "soon", "5", str(T)],
        "value": ["1", "1", "1", "1", "1", "1", "1", "1", "many"],
    }
    good, bad, report = clean(columns)
    assert good["user_id"].to_list() == ["a"]
    reasons = [
        "null user_id",
        "empty user_id",
        "null item_id",
        "empty item_id",
        "null timestamp",
        "unreadable timestamp",
        "implausible timestamp",
        "value is not a finite number",
    ]
    assert bad["reason"].to_list() == reasons
    assert bad["row"].to_list() == list(range(101, 109))
    assert report["quarantine"] == Counter(reasons)


def test_missing_event_and_value_are_imputed_and_counted():
    columns = {
        "user_id": ["a", "b", "c"],
        "item_id": ["x"] * 3,
        "timestamp": [T] * 3,
        "event": [None, "", "click"],
        "value": [None, 2.5, 3.0],
    }
    good, bad, report = clean(columns)
    assert good["event"].to_list() == ["view", "view", "click"]
    assert report["imputed"] == {"event": 2}
    assert good["value"].is_nan().to_list() == [True, False, False]
    assert len(bad) == 0


def test_events_without_weight_are_counted_and_dropped():
    good, _, report = clean({"user_id": ["a", "a"], "item_id": ["x", "y"], "timestamp": [T, T], "event": ["impression", "click"]})
    assert good["item_id"].to_list() == ["y"]
    assert report["dropped"] == {"impression": 1}


def test_ids_keep_their_text_and_whole_floats_lose_their_point():
    good, bad, _ = clean({"user_id": pa.array([7.0, None, 7.5]), "item_id": ["007", "y", "z"], "timestamp": [T] * 3})
    assert good.select("user_id", "item_id").rows() == [("7", "007")]
    assert bad["reason"].to_list() == ["null user_id", "null user_id"]
    good, _, _ = clean({"user_id": pa.array(["ü-用户", "b"]).dictionary_encode(), "item_id": [12345678901, 2], "timestamp": [T, T]})
    assert good["user_id"].to_list() == ["ü-用户", "b"]
    assert good["item_id"].to_list() == ["12345678901", "2"]


def test_source_carries_rank_and_row():
    good, _, _ = clean({"user_id": ["a", "b"], "item_id": ["x", "y"], "timestamp": [T, T]})
    assert good["source"].to_list() == [(3 << 40) + 100, (3 << 40) + 101]


def test_a_csv_file_with_ragged_lines_and_quotes(tmp_path):
    text = f'user_id,item_id,timestamp,event\na,"x, y",{T},click\nb,z\nc,w,{T},view,extra\n001,v,{T},\n'
    (tmp_path / "interactions.csv").write_text(text)
    files = open_sources(str(tmp_path), [str(tmp_path / "interactions.csv")])
    rules = RowRules(False, RULES.first_us, RULES.last_us, (), str(tmp_path / "work"))
    (tmp_path / "work").mkdir()
    good = pl.concat([pl.DataFrame(table) for chunk in plan_chunks(files) for table in clean_chunk(chunk, rules)])
    assert good.select("user_id", "item_id", "event").rows() == [("a", "x, y", "click"), ("001", "v", "view")]
    facts = read_reports(rules.work)
    assert facts["rows"] == 4
    assert facts["quarantine"] == {"wrong number of fields": 2}
    refused = pl.read_parquet(tmp_path / "work" / QUARANTINE / "*.parquet")
    assert refused["line"].to_list() == ["b,z", f"c,w,{T},view,extra"]


def test_chunks_cover_a_parquet_file_once_whatever_its_row_groups(tmp_path):
    table = pa.table({"user_id": [str(n) for n in range(1000)], "item_id": ["x"] * 1000, "timestamp": [T] * 1000})
    pq.write_table(table, tmp_path / "interactions.parquet", row_group_size=70)
    files = open_sources(str(tmp_path), [str(tmp_path / "interactions.parquet")])
    chunks = plan_chunks(files)
    assert [group for chunk in chunks for group in chunk.row_groups] == list(range(15))
    rules = RowRules(False, RULES.first_us, RULES.last_us, (), str(tmp_path / "work"))
    (tmp_path / "work").mkdir()
    rows = pl.concat([pl.DataFrame(table) for chunk in chunks for table in clean_chunk(chunk, rules)])
    assert rows["source"].to_list() == list(range(1000))


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinite_values_are_refused(value):
    _, bad, _ = clean({"user_id": ["a"], "item_id": ["x"], "timestamp": [T], "value": [value]})
    assert bad["reason"].to_list() == ["value is not a finite number"]
