"""prepare on Ray Data: the same result however the rows are stored, and the edge cases of real data."""

import random
from datetime import UTC, datetime

import polars as pl
import pytest

from raysys import storage
from raysys.adapters import import_dataset
from raysys.cli import main
from raysys.errors import ConfigError, SchemaError
from raysys.events.identity import user_key
from raysys.events.log import open_log
from raysys.prepare.config import PrepareConfig
from raysys.prepare.dataset import Prepared
from raysys.prepare.run import prepare, summary_rows
from raysys.schema import EventType

pytestmark = pytest.mark.usefixtures("ray_cluster")
T = 1_700_000_000


def rows(count: int = 3000, users: int = 40, items: int = 30) -> list[tuple]:
    """Rows with unique times, out of order, a few exact duplicates among them."""
    rng = random.Random(7)
    made = [(f"u{rng.randrange(users)}", f"i{int(items * rng.random() ** 2)}", T + n, rng.choice(["view", "click"])) for n in range(count)]
    rng.shuffle(made)
    return made + made[:25]


def frame(some: list[tuple]) -> pl.DataFrame:
    return pl.DataFrame(some, schema=["user_id", "item_id", "timestamp", "event"], orient="row")


def prepared(tmp_path, data: pl.DataFrame | None = None, items=None, users=None, **options) -> Prepared:
    folder = tmp_path / "data"
    folder.mkdir(exist_ok=True)
    if data is not None:
        data.write_parquet(folder / "interactions.parquet")
    for name, table in (("items", items), ("users", users)):
        if table is not None:
            table.write_parquet(folder / f"{name}.parquet")
    prepare(str(folder), str(tmp_path / "out"), progress=False, **options)
    return Prepared.open(str(tmp_path / "out"))


def histories(result: Prepared, part: str = "test") -> dict[str, list[str]]:
    sequences, items, users = result.sequences().upto(part), result.items()["item_id"].to_pylist(), result.users()["user_id"].to_pylist()
    bounds = sequences.indptr
    return {
        users[user]: [items[item] if item >= 0 else None for item in sequences.items[bounds[row] : bounds[row + 1]]]
        for row, user in enumerate(sequences.user_idx)
    }


def expected(some: list[tuple]) -> dict[str, list[str]]:
    wanted: dict[str, list[str]] = {}
    for user, item, _, _ in sorted(set(some), key=lambda row: row[2]):
        wanted.setdefault(user, []).append(item)
    return wanted


def test_the_result_does_not_depend_on_files_formats_blocks_or_partitions(tmp_path):
    some = rows()
    whole = prepared(tmp_path, frame(some))
    assert histories(whole) == expected(some)
    assert whole.manifest["counts"]["duplicates"] == 25
    fingerprints = {whole.manifest["fingerprint"]}

    random.Random(1).shuffle(some)
    many = tmp_path / "many"
    (many / "interactions" / "day=1").mkdir(parents=True)
    for n in range(5):
        frame(some[n::5]).write_parquet(many / "interactions" / "day=1" / f"part-{n}.parquet", row_group_size=100)
    (many / "interactions" / "_SUCCESS").write_text("")
    manifest = prepare(str(many), str(tmp_path / "many-out"), config=PrepareConfig(partitions=3), progress=False)
    assert len([name for name in manifest["files"] if name.startswith("sequences/")]) == 3
    fingerprints.add(manifest["fingerprint"])
    assert histories(Prepared.open(str(tmp_path / "many-out"))) == expected(some)

    text = tmp_path / "text"
    text.mkdir()
    times = pl.from_epoch(pl.col("timestamp")).dt.strftime("%Y-%m-%dT%H:%M:%SZ")
    frame(some).with_columns(times).rename({"user_id": "USER_ID", "event": "EVENT_TYPE"}).write_csv(text / "interactions.csv")
    fingerprints.add(prepare(str(text), str(tmp_path / "text-out"), progress=False)["fingerprint"])
    by_file = prepare(str(text / "interactions.csv"), str(tmp_path / "file-out"), progress=False)
    fingerprints.add(by_file["fingerprint"])
    assert len(fingerprints) == 1
    assert "column 'EVENT_TYPE' read as 'event'" in by_file["notes"]


def test_the_fingerprint_changes_with_the_content(tmp_path):
    some = rows(300)
    first = prepared(tmp_path, frame(some)).manifest["fingerprint"]
    assert prepared(tmp_path, frame(some)).manifest["fingerprint"] == first
    changed = [(*some[0][:2], some[0][2] + 1_000_000, some[0][3]), *some[1:-25]]
    assert prepared(tmp_path, frame(changed)).manifest["fingerprint"] != first
    assert prepared(tmp_path, frame(some), split="none").manifest["fingerprint"] != first


def test_time_split_learns_nothing_from_the_future(tmp_path):
    early = [("a", f"i{n % 4}", T + n, "view") for n in range(80)]
    late = [("b" if n % 2 else "a", "i0" if n < 10 else "brand-new", T + 80 + n, "only-later") for n in range(20)]
    result = prepared(tmp_path, frame([*late, *early]), split="time")
    manifest = result.manifest
    assert manifest["cuts"] == {"valid_from": T + 80, "test_from": T + 90}
    assert {name: manifest["counts"][name] for name in ("train", "valid", "test")} == {"train": 80, "valid": 10, "test": 10}
    assert manifest["watermark"] == T + 79
    assert manifest["events"] == ["other", "view"]
    assert result.items()["item_id"].to_pylist() == ["i0", "i1", "i2", "i3"]
    assert result.items()["num_train"].to_pylist() == [20, 20, 20, 20]
    assert manifest["counts"]["unknown_targets"] == 10
    sequences = result.sequences()
    held = sequences.split == 2
    assert set(sequences.items[held]) == {-1}
    assert set(sequences.events[held]) == {0}

    listed = prepared(tmp_path, items=pl.DataFrame({"item_id": ["brand-new"], "title": ["New"]}), split="time")
    assert listed.items()["item_id"].to_pylist()[-1] == "brand-new"
    assert listed.manifest["counts"]["items_warm"] == 4
    assert listed.manifest["counts"]["unknown_targets"] == 0


def test_several_partitions_have_one_global_cut_and_keep_ties_in_order(tmp_path):
    folder = tmp_path / "data" / "interactions"
    folder.mkdir(parents=True)
    some = rows(1000)
    frame([*some[::2], ("tied", "3", T, "view"), ("tied", "4", T, "view")]).write_parquet(folder / "part-b.parquet")
    frame([*some[1::2], ("tied", "1", T, "view"), ("tied", "2", T, "view")]).write_parquet(folder / "part-a.parquet")
    one = prepared(tmp_path, split="time")
    assert histories(one)["tied"] == ["1", "2", "3", "4"]
    shares = [one.manifest["counts"][part] / 1004 for part in ("train", "valid", "test")]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.002)
    two = prepared(tmp_path, split="time", config=PrepareConfig(partitions=2))
    assert one.manifest["cuts"] == two.manifest["cuts"]
    assert one.manifest["fingerprint"] == two.manifest["fingerprint"]


def test_bad_rows_are_set_aside_and_counted(tmp_path):
    data = pl.DataFrame(
        {
            "user_id": ["a", "a", None, "", "a", "b", "b", "c"],
            "item_id": ["x", "y", "x", "x", None, "x", "y", "z"],
            "timestamp": [T, T + 1, T, T, T, None, T, 17],
        }
    )
    result = prepared(tmp_path, data)
    assert result.manifest["quarantine"] == {
        "empty user_id": 1,
        "implausible timestamp": 1,
        "null item_id": 1,
        "null timestamp": 1,
        "null user_id": 1,
    }
    counts = result.manifest["counts"]
    assert (counts["interactions_read"], counts["quarantined"], counts["interactions"]) == (8, 5, 3)
    refused = storage.read_table(str(tmp_path / "out" / "quarantine"))
    assert sorted(refused["row"].to_pylist()) == [2, 3, 4, 5, 7]
    assert set(refused["file"].to_pylist()) == {"interactions.parquet"}
    assert histories(result) == {"a": ["x", "y"], "b": ["y"]}
    with pytest.raises(SchemaError, match=r"expected no bad rows \(--strict\), found 1 x"):
        prepared(tmp_path, strict=True)
    assert Prepared.open(str(tmp_path / "out")).manifest["fingerprint"] == result.manifest["fingerprint"]


def test_one_user_with_a_hundred_thousand_events(tmp_path):
    heavy = pl.DataFrame({"n": range(100_000)}).select(
        user_id=pl.lit("heavy"), item_id=pl.format("i{}", pl.col("n") % 977), timestamp=T + pl.col("n"), event=pl.lit("view")
    )
    result = prepared(tmp_path, pl.concat([heavy, frame([("light", "i1", T, "view"), ("light", "i2", T + 1, "view")])]))
    sequences = result.sequences()
    assert sequences.indptr.tolist() == [0, 100_000, 100_002]
    assert histories(result)["heavy"][:3] == ["i0", "i1", "i2"]
    assert result.manifest["counts"]["train"] == 99_999


def test_items_without_events_events_without_items_and_unicode_ids(tmp_path):
    some = [("ユーザー", "é|,\n", T, "view"), ("ユーザー", "listed", T + 1, "view"), ("ユーザー", "held", T + 2, "click")]
    items = pl.DataFrame({"item_id": ["listed", "never"], "title": ["L", "N"], "categories": ["a|b", "c"]})
    result = prepared(
        tmp_path, frame(some), items=items, users=pl.DataFrame({"user_id": [], "age": []}, schema={"user_id": str, "age": int})
    )
    assert result.items().select(["item_id", "title", "num_train"]).to_pylist() == [
        {"item_id": "é|,\n", "title": "", "num_train": 1},
        {"item_id": "held", "title": "", "num_train": 0},
        {"item_id": "listed", "title": "L", "num_train": 0},
        {"item_id": "never", "title": "N", "num_train": 0},
    ]
    counts = result.manifest["counts"]
    assert (counts["items"], counts["items_warm"], counts["items_without_attributes"]) == (4, 1, 2)
    assert result.users().to_pylist() == [{"user_idx": 0, "user_id": "ユーザー", "age": None}]
    assert histories(result) == {"ユーザー": ["é|,\n", "listed", "held"]}


def test_timestamps_in_every_unit_give_the_same_sequences(tmp_path):
    some = rows(200)[:200]
    moment = pl.col("timestamp")
    forms = [
        moment,
        moment * 1000,
        moment * 1_000_000,
        moment.cast(pl.Float64),
        pl.from_epoch(moment),
        pl.from_epoch(moment).dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Tokyo"),
        pl.from_epoch(moment).dt.strftime("%Y-%m-%d %H:%M:%S"),
    ]
    results = [prepared(tmp_path, frame(some).with_columns(form.alias("timestamp"))) for form in forms]
    assert len({result.manifest["fingerprint"] for result in results}) == 1
    assert results[1].manifest["notes"] == ["timestamps: epoch milliseconds (200 rows)"]


def test_weightless_and_unknown_events(tmp_path):
    some = [("a", "x", T, "impression"), ("a", "x", T + 1, "poke"), ("a", "y", T + 2, "skip"), ("a", "z", T + 3, "purchase")]
    result = prepared(tmp_path, frame(some), split="none")
    assert histories(result) == {"a": ["x", "z"]}
    assert result.sequences().positive.tolist() == [False, True]
    assert result.events == ["other", "poke", "purchase"]
    notes = " / ".join(result.manifest["notes"])
    assert "1 impression events have weight 0" in notes
    assert "without configuration, taken with weight 1 and not positive: poke" in notes
    assert result.manifest["counts"]["without_weight"] == 2
    settings = PrepareConfig(event_types={"poke": EventType(0.5, positive=True)})
    assert prepared(tmp_path, split="none", config=settings).sequences().positive.tolist() == [True, True]


def test_filters_by_training_events(tmp_path):
    some = [("a", item, T + n, "view") for n, item in enumerate(["x", "x", "x", "rare", "x", "x"])] + [("b", "x", T, "view")]
    result = prepared(tmp_path, frame(some), config=PrepareConfig(min_item_events=2, min_user_events=2))
    assert histories(result) == {"a": ["x"] * 5}
    counts = result.manifest["counts"]
    assert (counts["rare_items_events"], counts["few_events_users_events"], counts["interactions"]) == (1, 1, 5)
    assert counts["interactions_read"] == 7
    with pytest.raises(ConfigError, match="no item has min_item_events = 99 training events"):
        prepared(tmp_path, config=PrepareConfig(min_item_events=99))
    with pytest.raises(ConfigError, match="leaves no training events; check min_user_events"):
        prepared(tmp_path, config=PrepareConfig(min_user_events=99))


def test_ordinal_data_refuses_a_time_split(tmp_path):
    (tmp_path / "source.txt").write_text("u1 a b c\nu2 b c\n")
    import_dataset("sequences", str(tmp_path / "source.txt"), str(tmp_path / "data"))
    result = prepared(tmp_path)
    assert result.ordinal_time
    assert result.manifest["watermark"] == 0
    assert histories(result) == {"u1": ["a", "b", "c"], "u2": ["b", "c"]}
    assert result.sequences().times.tolist() == [0, 1, 2, 0, 1]
    with pytest.raises(ConfigError, match="timestamps are an order only"):
        prepared(tmp_path, split="time")


def test_planted_successors_survive_preparation(tmp_path):
    import_dataset("synthetic", None, str(tmp_path / "data"), users=300, items=60, events=6000, seed=3)
    result = prepared(tmp_path, split="none")
    truth = storage.read_json(str(tmp_path / "data" / "truth.json"))
    follows = [
        truth["successor"][int(first[1:]) % truth["clusters"]] == int(second[1:]) % truth["clusters"]
        for items in histories(result).values()
        for first, second in zip(items, items[1:])
    ]
    assert sum(follows) / len(follows) == pytest.approx(truth["successor_rate"], abs=1e-12)
    assert truth["successor_rate"] == pytest.approx(truth["successor_rate_expected"], abs=0.05)


def test_progress_and_summary_are_short(tmp_path, capfd):
    frame(rows(100)).write_parquet(tmp_path / "interactions.parquet")
    manifest = prepare(str(tmp_path / "interactions.parquet"), str(tmp_path / "out"))
    captured = capfd.readouterr()
    lines = captured.out.splitlines()
    assert [line.split("  ")[2] for line in lines] == ["tables", "clean, split", "order", "count", "encode, write"]
    assert captured.err == ""
    summary = dict(summary_rows(manifest))
    assert summary["interactions"] == "100 of 125 read"
    assert summary["left out"] == "25 duplicates"
    assert datetime.fromisoformat(manifest["created"]).tzinfo == UTC


def told(n: int) -> dict:
    at = float(T) + 3600.0 * n
    return {
        "kind": "event",
        "event_id": f"e{n}",
        "user_id": f"u{n % 7}",
        "item_id": f"i{n % 11}",
        "event": "click",
        "timestamp": at,
        "received": at,
    }


def put(n: int) -> dict:
    said = {"title": f"item {n}", "categories": ["x"]}
    return {"kind": "item", "item_id": f"i{n}", "attributes": said, "replace": True, "received": float(T)}


def compacted(events: str, folder, capsys) -> str:
    text = f"compact --events {events} --out {folder}/lake --delta {folder}/new --max-age 7d --set batch_records=1000"
    assert main(text.split()) == 0
    return capsys.readouterr().out


def test_a_compacted_log_is_prepared_whole_and_by_the_day(tmp_path, capsys):
    events = str(tmp_path / "log")
    log = open_log(events, writable=True)
    log.append([*(put(n) for n in range(11)), *(told(n) for n in range(100))])
    assert "events            100" in compacted(events, tmp_path, capsys)
    prepare(f"{tmp_path}/lake", f"{tmp_path}/by-day", split="leave-one-out", progress=False)
    log.append([told(n) for n in range(90, 150)])  # ten of them were sent again
    assert "duplicates        10" in compacted(events, tmp_path, capsys)
    prepare(f"{tmp_path}/new/batch-00000002", f"{tmp_path}/by-day", append=True, progress=False)
    prepare(f"{tmp_path}/lake", f"{tmp_path}/whole", split="leave-one-out", progress=False)
    by_day, whole = Prepared.open(f"{tmp_path}/by-day"), Prepared.open(f"{tmp_path}/whole")
    assert whole.manifest["counts"]["users"] == 7 and len(whole.sequences().items) == 150
    assert by_day.manifest["fingerprint"] == whole.manifest["fingerprint"]
    assert whole.items()["title"].to_pylist()[0].startswith("item ")
    assert not any(whole.manifest["quarantine"].values())

    log.append([{"kind": "erase", "user_key": user_key("u3").hex(), "at": float(T) + 3600.0 * 1000}])
    compacted(events, tmp_path, capsys)
    prepare(f"{tmp_path}/lake", f"{tmp_path}/later", split="leave-one-out", progress=False)
    assert "u3" not in Prepared.open(f"{tmp_path}/later").users()["user_id"].to_pylist()
