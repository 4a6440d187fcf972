from collections import Counter

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysys.prepare import quarantine
from raysys.prepare.chunks import plan_chunks
from raysys.prepare.dataset import QUARANTINE
from raysys.prepare.partition import read_row_group, stable_hash
from raysys.prepare.rows import COUNTERS, RowRules, clean_rows
from raysys.prepare.source import SourceFile, open_sources
from raysys.prepare.tasks import clean_chunk, step, sum_reports

T = 1_700_000_000
RULES = RowRules(ordinal=False, first_us=T * 10**6 - 10**12, last_us=T * 10**6 + 10**12, no_weight=("impression",))


def clean(columns: dict, rules: RowRules = RULES, default_event: str = "view"):
    report = {name: Counter() for name in COUNTERS}
    file = SourceFile("f", "f", 3, "parquet", {}, (), default_event=default_event)
    good, bad = clean_rows(pa.table(columns), file, 100, rules, report)
    return plain(good), bad, report


def plain(table: pa.Table) -> pl.DataFrame:
    """Ids as strings, so that they compare with lists of text."""
    return pl.DataFrame({name: column.to_pylist() for name, column in zip(table.column_names, table.columns)}, infer_schema_length=None)


def clean_files(tmp_path, files, *, chunk_rows=1 << 20, partitions=1) -> tuple[list[pl.DataFrame], dict, list]:
    """All chunks of some files: rows by partition, summed report, chunks."""
    work = str(tmp_path / "work")
    rules = RowRules(False, RULES.first_us, RULES.last_us, ())
    chunks = plan_chunks(files, chunk_rows)
    reports = [clean_chunk(number, chunk, rules, partitions, chunk_rows, work) for number, chunk in enumerate(chunks)]
    names = [name for report in reports for name in report["segments"]]
    rows = [
        pl.concat([plain(read_row_group(step(work, "chunks", name), part)) for name in names], how="vertical_relaxed")
        for part in range(partitions)
    ]
    quarantine.publish(work, {key: count for report in reports for key, count in report["pieces"].items()}, 0)
    return rows, sum_reports(reports), chunks


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


def test_texts_that_mean_the_same_are_one_after_cleaning():
    table = {"user_id": ["a"] * 4, "item_id": ["x"] * 4, "timestamp": [T] * 4, "event": [" click", "click", "  ", "view"]}
    good, _, report = clean(table | {"event": pa.array(table["event"]).dictionary_encode()})
    assert good["event"].to_list() == ["click", "click", "view", "view"]
    assert report["imputed"] == {"event": 1}


def test_dictionaries_in_many_chunks_and_with_narrow_codes():
    narrow = pa.chunked_array(
        [pa.DictionaryArray.from_arrays(pa.array(codes, pa.int8()), values) for codes, values in [([0, 1], ["a", "b"]), ([0, None], ["c"])]]
    )
    good, bad, _ = clean({"user_id": narrow, "item_id": ["x"] * 4, "timestamp": [T] * 4})
    assert good["user_id"].to_list() == ["a", "b", "c"]
    assert bad["reason"].to_list() == ["null user_id"]


def test_a_csv_file_with_ragged_lines_and_quotes(tmp_path):
    text = f'user_id,item_id,timestamp,event\na,"x, y",{T},click\nb,z\nc,w,{T},view,extra\n001,v,{T},\n'
    (tmp_path / "interactions.csv").write_text(text)
    (good,), facts, _ = clean_files(tmp_path, open_sources(str(tmp_path), [str(tmp_path / "interactions.csv")]))
    assert good.select("user_id", "item_id", "event").rows() == [("a", "x, y", "click"), ("001", "v", "view")]
    assert facts["rows"] == 4
    assert facts["quarantine"] == {"wrong number of fields": 2}
    refused = pl.read_parquet(tmp_path / "work" / QUARANTINE / "*.parquet")
    assert refused["line"].to_list() == ["b,z", f"c,w,{T},view,extra"]
    assert refused["row"].to_list() == [1, 2]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 50])
def test_byte_ranges_of_a_csv_file_hold_every_line_once(tmp_path, ending, chunk_rows):
    lines = [f"u{n % 5},{'long item ' * (n % 4)}{n},{'soon' if n % 10 == 9 else T + n}" for n in range(100)]
    (tmp_path / "interactions.csv").write_bytes(ending.join(["user_id,item_id,timestamp", *lines, ""]).encode())
    (good,), facts, chunks = clean_files(tmp_path, open_sources(str(tmp_path), [str(tmp_path / "interactions.csv")]), chunk_rows=chunk_rows)
    assert len(chunks) > 1
    assert good["time"].to_list() == [(T + n) * 10**6 for n in range(100) if n % 10 != 9]
    assert facts["rows"] == 100
    # Rows are numbered in the file, whatever range they were read in.
    refused = pl.read_parquet(tmp_path / "work" / QUARANTINE / "*.parquet")
    assert refused["row"].sort().to_list() == list(range(9, 100, 10))


def test_chunks_cover_a_parquet_file_once_whatever_its_row_groups(tmp_path):
    table = pa.table({"user_id": [str(n) for n in range(1000)], "item_id": ["x"] * 1000, "timestamp": [T] * 1000})
    pq.write_table(table, tmp_path / "interactions.parquet", row_group_size=70)
    files = open_sources(str(tmp_path), [str(tmp_path / "interactions.parquet")])
    (rows,), facts, chunks = clean_files(tmp_path, files, chunk_rows=200)
    assert [[group for piece in chunk for group in piece.row_groups] for chunk in chunks] == [
        [0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11], [12, 13, 14]
    ]  # fmt: skip
    assert rows["user_id"].to_list() == [str(n) for n in range(1000)]
    assert facts["rows"] == facts["good"] == 1000


def test_many_small_files_share_a_chunk_and_a_large_row_group_has_many_segments(tmp_path):
    uris = []
    for number, size in enumerate([5] * 30 + [1000]):
        table = pa.table({"user_id": [f"{number}-{n}" for n in range(size)], "item_id": ["x"] * size, "timestamp": [T] * size})
        uris.append(str(tmp_path / f"{number:02d}.parquet"))
        pq.write_table(table, uris[-1])
    (rows,), _, chunks = clean_files(tmp_path, open_sources(str(tmp_path), uris), chunk_rows=100)
    assert [len(chunk) for chunk in chunks] == [20, 10, 1]
    assert rows["user_id"].to_list() == [f"{number}-{n}" for number, size in enumerate([5] * 30 + [1000]) for n in range(size)]
    assert len(list((tmp_path / "work" / "steps" / "chunks").glob("000002-*.parquet"))) == 10


def test_partitions_hold_every_row_once_and_each_user_whole(tmp_path):
    table = pa.table({"user_id": [f"u{n % 37}" for n in range(1000)], "item_id": [f"i{n % 11}" for n in range(1000)]})
    table = table.append_column("timestamp", pa.array([T + n for n in range(1000)]))
    pq.write_table(table, tmp_path / "interactions.parquet", row_group_size=100)
    parts, _, _ = clean_files(tmp_path, open_sources(str(tmp_path), [str(tmp_path / "interactions.parquet")]), chunk_rows=300, partitions=4)
    users = [set(part["user_id"]) for part in parts]
    assert sum(map(len, users)) == 37 == len(set.union(*users))
    assert pl.concat(parts).sort("time").select("user_id", "item_id").rows() == list(zip(*table.select([0, 1]).to_pydict().values()))
    assert all(part["time"].is_sorted() for part in parts)  # within a partition rows stay in the order of the file


def plain_hash(text: str) -> int:
    """The hash in whole numbers of Python, byte by byte."""
    size = 2**64
    state = sum((byte + 1) * pow(0x9E3779B97F4A7C15, place + 1, size) for place, byte in enumerate(text.encode())) % size
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % size
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % size
    return state ^ (state >> 31)


def test_the_hash_of_a_user_never_changes():
    """Kept partitions are found by it: a change would tear users apart at the next append."""
    users = ["", "a", "user-17", "user-18", "\u00fc\0", "\u00fc", "x" * 300]
    assert stable_hash(pa.array(users)).tolist() == [plain_hash(user) for user in users]
    assert plain_hash("user-17") == 7575108189147635821
    assert stable_hash(pa.array(users).slice(2, 2)).tolist() == [plain_hash(user) for user in users[2:4]]
    spread = np.bincount(stable_hash(pa.array([f"u{n}" for n in range(100_000)])) % np.uint64(10), minlength=10)
    assert spread.min() > 9_600 and spread.max() < 10_400


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinite_values_are_refused(value):
    _, bad, _ = clean({"user_id": ["a"], "item_id": ["x"], "timestamp": [T], "value": [value]})
    assert bad["reason"].to_list() == ["value is not a finite number"]
