"""Every adapter on a small file of its kind, written out here."""

import gzip
import json

import numpy as np
import polars as pl
import pytest

from raysys import storage
from raysys.adapters import import_dataset
from raysys.adapters.contract import ContractWriter
from raysys.errors import ConfigError


def read(tmp_path, name: str) -> pl.DataFrame:
    path = tmp_path / "out" / name
    return pl.read_parquet(path / "*.parquet" if path.is_dir() else path.with_suffix(".parquet"))


def run(tmp_path, kind: str, files: dict[str, str | bytes], src: str | None = None) -> dict:
    folder = tmp_path / "source"
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return import_dataset(kind, str(folder / src) if src else str(folder), str(tmp_path / "out"))


RECBOLE = {
    "ml.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t10\t4\t881250949\n2\t11\t3.5\t891717742\n",
    "ml.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "10\tToy Story\t1995\tAnimation Children's\n11\tAmélie\tV\t\n",
    "ml.user": "user_id:token\tage:token\tgender:token\tzip:token\n1\t24\tM\t05711\n2\t53\tF\t94043\n",
}


@pytest.mark.parametrize("src", [None, "ml.inter"])
def test_recbole(tmp_path, src):
    summary = run(tmp_path, "recbole", RECBOLE, src)
    assert read(tmp_path, "interactions").rows() == [("1", "10", 881250949, "rating", 4.0), ("2", "11", 891717742, "rating", 3.5)]
    assert read(tmp_path, "items").to_dicts() == [
        {"item_id": "10", "title": "Toy Story", "release_year": 1995, "categories": ["Animation", "Children's"]},
        {"item_id": "11", "title": "Amélie", "release_year": None, "categories": None},
    ]
    assert read(tmp_path, "users").rows() == [("1", 24, "M", "05711"), ("2", 53, "F", "94043")]
    assert summary["interactions"].startswith("2 rows: user_id, item_id, timestamp")
    assert storage.read_json(str(tmp_path / "out" / "dataset.json"))["time"] == "utc"


def test_recbole_without_ratings_and_times(tmp_path):
    run(tmp_path, "recbole", {"x.inter": "user_id:token\titem_id:token\tsession:token\nu\ti\ts\nu\tj\ts\n"})
    assert read(tmp_path, "interactions").rows() == [("u", "i", 0, "view"), ("u", "j", 1, "view")]
    facts = storage.read_json(str(tmp_path / "out" / "dataset.json"))
    assert facts["time"] == "ordinal"
    assert "columns of x.inter not read: session" in facts["notes"]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_movielens_1m(tmp_path, encoding):
    files = {
        "ratings.dat": "1::1193::5::978300760\n1::661::3::978302109\n",
        "movies.dat": "1193::Misérables, Les (1995)::Drama|Musical\n661::City: of Children (1996)::Animation\n".encode(encoding),
        "users.dat": "1::F::1::10::48067\n2::M::56::16::07072\n",
    }
    run(tmp_path, "movielens", files)
    assert read(tmp_path, "interactions").rows()[0] == ("1", "1193", 978300760, "rating", 5.0)
    assert read(tmp_path, "items").rows()[0] == ("1193", "Misérables, Les (1995)", ["Drama", "Musical"], 1995)
    assert read(tmp_path, "users").rows() == [("1", "F", 1, "K-12 student", "48067"), ("2", "M", 56, "self-employed", "07072")]


def test_movielens_100k(tmp_path):
    flags = ["0"] * 19
    flags[3] = flags[5] = "1"
    item = "|".join(["1", "Caf\xe9 (1995)", "01-Feb-1995", "", "http://x", *flags])
    unknown = "|".join(["2", "unknown", "", "", "", "1", *["0"] * 18])
    files = {
        "u.data": "196\t1\t3\t881250949\n",
        "u.item": f"{item}\n{unknown}\n".encode("latin-1"),
        "u.user": "196|49|M|writer|55105\n",
    }
    run(tmp_path, "movielens", files, "u.data")
    assert read(tmp_path, "interactions").rows() == [("196", "1", 881250949, "rating", 3.0)]
    assert read(tmp_path, "items").rows() == [
        ("1", "Café (1995)", ["Animation", "Comedy"], 1995, "1995-02-01", "http://x"),
        ("2", "unknown", ["unknown"], None, None, None),
    ]
    assert read(tmp_path, "users").rows() == [("196", 49, "M", "writer", "55105")]


def test_sequences_with_an_item_table(tmp_path):
    files = {
        "Beauty.txt": "1 5 3 5\n2 4\n",
        "README_first.txt": "not a sequence file",
        "items.tsv": 'item_id\tasin\ttitle\ttext_id\n3\tB1\tRed "Lac"\tred lac\n5\tB2\tBlue\t\n',
    }
    summary = run(tmp_path, "sequences", files)
    rows = [("1", "5", 0, "view"), ("1", "3", 1, "view"), ("1", "5", 2, "view"), ("2", "4", 0, "view")]
    assert read(tmp_path, "interactions").rows() == rows
    assert read(tmp_path, "items").rows()[0] == ("3", "B1", 'Red "Lac"', "red lac")
    assert summary["time"] == "ordinal"


MOVIES = "movie_id\ttitle\tgenres\n7\tSeven\tCrime|Drama\n9\tNine\tMusical\n"
NUMBERS = "sasrec_item\tmovie_id\n1\t9\n2\t7\n"


def test_sequences_of_film_ids(tmp_path):
    run(tmp_path, "sequences", {"s.txt": "u 9 7\n", "movies.tsv": MOVIES, "sasrec_item_ids.tsv": NUMBERS})
    assert read(tmp_path, "items").rows() == [("7", "Seven", ["Crime", "Drama"]), ("9", "Nine", ["Musical"])]


def test_sequences_of_renumbered_films(tmp_path):
    summary = run(tmp_path, "sequences", {"s.txt": "u 1 2\n", "movies.tsv": MOVIES, "sasrec_item_ids.tsv": NUMBERS})
    assert read(tmp_path, "items").rows() == [("1", "9", "Nine", ["Musical"]), ("2", "7", "Seven", ["Crime", "Drama"])]
    assert "numbers of sasrec_item_ids.tsv" in summary["notes"]


def test_sequences_with_a_foreign_title_table_have_no_titles(tmp_path):
    summary = run(tmp_path, "sequences", {"s.txt": "u 1 400\n", "movies.tsv": MOVIES, "sasrec_item_ids.tsv": NUMBERS})
    assert not (tmp_path / "out" / "items.parquet").exists()
    assert "does not know all items" in summary["notes"]


def lines(*objects: dict) -> str:
    return "".join(json.dumps(value) + "\n" for value in objects)


def test_amazon_2014_with_gzip_and_meta(tmp_path):
    reviews = lines({"reviewerID": "U1", "asin": "A1", "overall": 5.0, "unixReviewTime": 1400000000, "reviewText": "good"})
    meta = lines(
        {"asin": "A1", "title": "Soap &amp; <b>Water</b>", "categories": [["Beauty", "Bath"], ["Beauty"]], "price": 3.5, "brand": "X"},
        {"asin": "ZZ", "title": "never reviewed"},
    )
    run(tmp_path, "amazon-reviews", {"reviews_Beauty_5.json.gz": gzip.compress(reviews.encode()), "meta_Beauty.json": meta})
    assert read(tmp_path, "interactions").rows() == [("U1", "A1", 1400000000, "rating", 5.0)]
    assert read(tmp_path, "items").to_dicts() == [
        {"item_id": "A1", "title": "Soap & Water", "text": None, "categories": ["Beauty", "Bath"], "brand": "X", "price": 3.5}
    ]


def test_amazon_2023(tmp_path):
    reviews = lines(
        {"user_id": "U", "parent_asin": "P", "asin": "child", "rating": 4, "timestamp": 1588687728923},
        {"user_id": "V", "parent_asin": "P", "asin": "other", "rating": 1, "timestamp": 1588687728924},
    )
    meta = lines(
        {"parent_asin": "P", "title": "T", "categories": ["Books"], "description": ["One.", "Two."], "price": "$1,234.50", "store": "S"}
    )
    run(tmp_path, "amazon-reviews", {"All.jsonl": reviews, "meta_All.jsonl": meta}, "All.jsonl")
    assert read(tmp_path, "interactions").rows() == [("U", "P", 1588687728, "rating", 4.0), ("V", "P", 1588687728, "rating", 1.0)]
    assert read(tmp_path, "items").rows() == [("P", "T", "One. Two.", ["Books"], "S", 1234.5)]


def synthetic(tmp_path, name="out", **sizes) -> tuple[pl.DataFrame, dict]:
    import_dataset("synthetic", None, str(tmp_path / name), **sizes)
    events = pl.read_parquet(tmp_path / name / "interactions" / "*.parquet")
    return events, storage.read_json(str(tmp_path / name / "truth.json"))


def test_synthetic_data_hold_the_planted_truth(tmp_path):
    events, truth = synthetic(tmp_path, users=2000, items=200, events=60_000, seed=5)
    assert len(events) == truth["events"] == pytest.approx(60_000, rel=0.03)
    assert events["user_id"].n_unique() == 2000
    number = events["item_id"].str.slice(1).cast(pl.Int64)
    cluster = (number % truth["clusters"]).to_numpy()
    successor = np.array(truth["successor"])
    assert sorted(successor) == list(range(truth["clusters"]))
    same_user = (events["user_id"][1:] == events["user_id"][:-1]).to_numpy()
    follows = (successor[cluster[:-1]] == cluster[1:])[same_user].mean()
    assert follows == pytest.approx(truth["successor_rate"])
    # Half of the steps follow; of the others some hit the successor by chance.
    assert follows == pytest.approx(truth["successor_rate_expected"], abs=0.02)
    # Zipf with exponent 1 inside a cluster: the first item is drawn twice as often as the second.
    first, second = ((number // truth["clusters"] == rank).sum() for rank in (0, 1))
    assert first / second == pytest.approx(2, rel=0.1)
    likes = (events["event"] == "like").mean()
    assert truth["like_otherwise"] < likes < truth["like_if_taste"]
    # Users like the clusters they come back to more than the others.
    frame = events.select("user_id", pl.col("event") == "like", cluster=pl.Series(cluster))
    per = (
        frame.group_by("user_id", "cluster").agg(pl.len(), pl.col("event").mean()).with_columns(share=pl.col("len").rank().over("user_id"))
    )
    assert per.filter(pl.col("share") > 6)["event"].mean() > per.filter(pl.col("share") < 3)["event"].mean() + 0.1
    titles = read(tmp_path, "items")
    assert titles["categories"].list.first().n_unique() == truth["clusters"]
    assert titles.filter(pl.col("item_id") == f"i{truth['clusters']}")["categories"].to_list() == titles["categories"].to_list()[:1]


def test_synthetic_data_are_reproducible_and_in_time_order(tmp_path):
    sizes = {"users": 300, "items": 50, "events": 3000}
    first, _ = synthetic(tmp_path, "a", seed=1, **sizes)
    again, _ = synthetic(tmp_path, "b", seed=1, **sizes)
    other, _ = synthetic(tmp_path, "c", seed=2, **sizes)
    assert first.equals(again)
    assert not first.equals(other)
    assert first.group_by("user_id").agg(pl.col("timestamp").diff().min() > 0)["timestamp"].drop_nulls().all()


def test_synthetic_files_by_time_and_one_heavy_user(tmp_path, monkeypatch):
    monkeypatch.setattr("raysys.adapters.synthetic.BLOCK_EVENTS", 700)
    sizes = {"users": 200, "items": 50, "events": 10_000, "files": 4, "heavy_user": 0.2, "seed": 1}
    events, truth = synthetic(tmp_path, **sizes)
    assert len(events) == truth["events"] == pytest.approx(10_000, rel=0.03)
    heavy = events.filter(pl.col("user_id") == truth["heavy_user"])
    assert len(heavy) == 2000
    files = [pl.read_parquet(file) for file in sorted((tmp_path / "out" / "interactions").iterdir())]
    assert len(files) == 4
    for earlier, later in zip(files, files[1:]):
        assert earlier["timestamp"].max() < later["timestamp"].min()
    assert min(file["user_id"].n_unique() for file in files[:3]) > 50  # every file has events of many users
    # The heavy user follows the same rule as the others.
    cluster = (heavy.sort("timestamp", maintain_order=True)["item_id"].str.slice(1).cast(pl.Int64) % truth["clusters"]).to_numpy()
    follows = (np.array(truth["successor"])[cluster[:-1]] == cluster[1:]).mean()
    assert follows == pytest.approx(truth["successor_rate_expected"], abs=0.06)
    with pytest.raises(ConfigError, match=r"heavy-user in \[0, 1\)"):
        synthetic(tmp_path, **sizes | {"heavy_user": 1.0})


def test_a_synthetic_flip_changes_the_law_for_everybody_at_once(tmp_path):
    sizes = {"users": 300, "items": 600, "events": 12_000, "seed": 2}
    plain, _ = synthetic(tmp_path, "plain", **sizes)
    events, truth = synthetic(tmp_path, "flip", **sizes, flip=0.4)
    before, after = (np.array(truth[name]) for name in ("successor", "successor_after_flip"))
    assert sorted(after) == list(range(truth["clusters"])) and (after != before).all() and (before[after] != np.arange(len(after))).all()
    early = events["timestamp"] < truth["flip_time"]
    assert events.filter(early).equals(plain.filter(early)) and 0.2 < early.mean() < 0.8
    cluster = (events["item_id"].str.slice(1).cast(pl.Int64) % truth["clusters"]).to_numpy()
    steps = (events["user_id"][1:] == events["user_id"][:-1]).to_numpy()
    for now, law, other in ((early, before, after), (~early, after, before)):
        chosen = steps & now[1:].to_numpy()
        assert (law[cluster[:-1]] == cluster[1:])[chosen].mean() == pytest.approx(truth["successor_rate_expected"], abs=0.03)
        assert (other[cluster[:-1]] == cluster[1:])[chosen].mean() < 0.15
    with pytest.raises(ConfigError, match="more than 2 clusters of items for a flip, got 2"):
        synthetic(tmp_path, "small", users=10, items=10, events=100, flip=0.5)


@pytest.mark.parametrize("sizes", [{"users": 0}, {"items": 1}, {"users": 10, "events": 9}, {"seed": -1}])
def test_synthetic_sizes_are_checked(tmp_path, sizes):
    with pytest.raises(ConfigError, match="expected users >= 1, items >= 2"):
        import_dataset("synthetic", None, str(tmp_path / "out"), **sizes)


def test_shards_rotate_and_memory_is_one_block(tmp_path, monkeypatch):
    monkeypatch.setattr("raysys.adapters.contract.MAX_SHARD_ROWS", 1000)
    monkeypatch.setattr("raysys.adapters.synthetic.BLOCK_EVENTS", 500)
    blocks: list[int] = []
    add = ContractWriter.add_interactions
    monkeypatch.setattr(ContractWriter, "add_interactions", lambda self, frame: (blocks.append(len(frame)), add(self, frame))[1])
    events, truth = synthetic(tmp_path, users=500, items=50, events=5000, seed=1)
    assert len(events) == truth["events"]
    assert max(blocks) < 800
    assert len(list((tmp_path / "out" / "interactions").iterdir())) >= 4


def test_an_import_replaces_an_import_and_nothing_else(tmp_path):
    run(tmp_path, "sequences", {"s.txt": "u 1 2\n"})
    run(tmp_path, "sequences", {"s.txt": "u 3\n"})
    assert read(tmp_path, "interactions")["item_id"].to_list() == ["3"]
    (tmp_path / "out" / "dataset.json").unlink()
    with pytest.raises(ConfigError, match="or an earlier import, found 'interactions'"):
        run(tmp_path, "sequences", {"s.txt": "u 4\n"})
