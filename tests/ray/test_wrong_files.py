"""Wrong input files: each is one clear line that names the file, what was expected and what was found."""

import gzip
import json

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysys.adapters import import_dataset
from raysys.errors import ConfigError, SchemaError
from raysys.prepare.run import prepare

pytestmark = pytest.mark.usefixtures("ray_cluster")
T = 1_700_000_000
GOOD = {"user_id": ["a"], "item_id": ["x"], "timestamp": [T]}


def parquet(name="interactions.parquet", **columns):
    def write(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns or GOOD), folder / name)

    return write


def text(name, content):
    data = content if isinstance(content, bytes) else content.encode()

    def write(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)

    return write


def both(*writers):
    def write(folder):
        for writer in writers:
            writer(folder)

    return write


def damaged(folder):
    parquet()(folder)
    content = bytearray((folder / "interactions.parquet").read_bytes())
    content[4:40] = b"\xff" * 36
    (folder / "interactions.parquet").write_bytes(bytes(content))


REVIEW = json.dumps({"reviewerID": "u", "asin": "i", "overall": 5, "unixReviewTime": T}) + "\n"
LINES = f"user_id,item_id,timestamp\na,x,{T}\n"

WRONG_DATA = [
    ("nothing there", lambda folder: None, "expected interactions.parquet, .* found an empty folder"),
    ("other names", text("ratings.csv", LINES), "found ratings.csv; `raysys import` reads other layouts"),
    (
        "twice",
        both(parquet(), text("interactions.csv", LINES)),
        "expected one interactions table, found interactions.csv, interactions.parquet",
    ),
    ("no file", text("interactions.parquet", b""), "interactions.parquet: expected data, found an empty file"),
    ("not Parquet", text("interactions.parquet", "user_id,item_id"), "interactions.parquet: expected a Parquet file, found something else"),
    ("damaged Parquet", damaged, "interactions.parquet: expected readable parquet data"),
    ("empty CSV", text("interactions.csv", b""), "interactions.csv: expected data, found an empty file"),
    (
        "header only",
        text("interactions.csv", "user_id,item_id,timestamp\n"),
        "expected at least one interaction, found a header and no rows",
    ),
    ("blank header", text("interactions.csv", "\n\n"), "interactions.csv: expected a header line with column names, found an empty line"),
    ("no header", text("interactions.csv", "a,x,1700000000\n"), "expected a column 'user_id', found a, x, 1700000000; rename or add it"),
    (
        "Latin-1 header",
        text("interactions.csv", "user_id,item_id,tim\xe9stamp\n".encode("latin-1")),
        "interactions.csv: expected UTF-8 text",
    ),
    (
        "Latin-1 cell",
        text("interactions.csv", f"user_id,item_id,timestamp\n\xe9,x,{T}\n".encode("latin-1")),
        "interactions.csv: expected readable csv",
    ),
    ("not gzip", text("interactions.csv.gz", LINES), "interactions.csv.gz: expected UTF-8 text with a header line"),
    ("column twice", text("interactions.csv", "user_id,item_id,timestamp,item_id\n"), "expected every column once, found 'item_id' twice"),
    (
        "no rows",
        parquet(**{name: pa.array([], pa.string()) for name in GOOD}),
        "expected at least one interaction, found 1 Parquet files without rows",
    ),
    ("no user", parquet(item_id=["x"], timestamp=[T]), "interactions.parquet: expected a column 'user_id', found item_id, timestamp"),
    ("no item", parquet(user_id=["a"], sku=["x"], timestamp=[T]), "expected a column 'item_id', found user_id, sku, timestamp"),
    ("no time", parquet(user_id=["a"], item_id=["x"]), "expected a column 'timestamp', found user_id, item_id"),
    ("list ids", parquet(**{**GOOD, "item_id": [["x"]]}), "column 'item_id': expected text or whole numbers, found type list"),
    (
        "bool time",
        parquet(**{**GOOD, "timestamp": [True]}),
        "column 'timestamp': expected a timestamp, epoch numbers or ISO text, found type bool",
    ),
    ("struct value", parquet(**GOOD, value=[{"a": 1}]), "column 'value': expected numbers, found type struct"),
    ("numeric event", parquet(**GOOD, event=[3]), "column 'event': expected text, found type int64"),
    ("two values", parquet(**GOOD, rating=[1.0], weight=[2.0]), "columns 'rating' and 'weight' both mean 'value'; keep one of them"),
    (
        "wrong part",
        both(parquet("interactions/a.parquet"), parquet("interactions/b.parquet", user_id=["a"])),
        "interactions/b.parquet: expected a column 'item_id'",
    ),
    (
        "other part",
        both(parquet("interactions/a.parquet"), text("interactions/notes.md", "x")),
        r"expected files that end in \.parquet.* found notes.md",
    ),
    ("empty parts", lambda folder: (folder / "interactions").mkdir(), "interactions: expected files that end in .*, found an empty folder"),
    ("no good row", parquet(**{**GOOD, "user_id": [""]}), "expected at least one good row, found none in 1: 1 x empty user_id"),
    (
        "order as time",
        parquet(**{**GOOD, "timestamp": [7]}),
        "1 x implausible timestamp; if timestamps are only an order, set time: ordinal",
    ),
    (
        "shown only",
        parquet(**GOOD, event=["impression"]),
        "expected at least one event with weight, found only impression; see event_types",
    ),
    (
        "wrong marker",
        both(parquet(), text("dataset.json", '{"time": "lunar"}')),
        'expected "time" to be "utc" or "ordinal", found \'lunar\'',
    ),
    ("broken marker", both(parquet(), text("dataset.json", "{")), "dataset.json: expected JSON"),
    ("items without id", both(parquet(), parquet("items.parquet", title=["x"])), "items.parquet: expected a column 'item_id', found title"),
    ("empty items", both(parquet(), text("items.csv", b"")), "items.csv: expected data, found an empty file"),
    ("ragged items", both(parquet(), text("items.csv", "item_id,title\na,b,c\n")), "items.csv: expected readable csv data"),
    ("users without id", both(parquet(), parquet("users.parquet", age=[3])), "users.parquet: expected a column 'user_id', found age"),
    ("list users", both(parquet(), parquet("users.parquet", user_id=[["a"]])), "column 'user_id': expected text or whole numbers"),
]


@pytest.mark.parametrize(("write", "message"), [case[1:] for case in WRONG_DATA], ids=[case[0] for case in WRONG_DATA])
def test_wrong_data_is_one_clear_line(tmp_path, capfd, write, message):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder)
    with pytest.raises(SchemaError, match=message) as caught:
        prepare(str(folder), str(tmp_path / "out"), progress=False)
    assert str(folder) in str(caught.value) or any(path.name in str(caught.value) for path in folder.rglob("*"))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not (tmp_path / "out").exists() and [path.name for path in tmp_path.iterdir()] == ["data"]
    # No traceback of a worker comes before the line.
    assert capfd.readouterr().err == ""


WRONG_SOURCE = [
    ("recbole: no types", "recbole", text("x.inter", "user_id\titem_id\nu\ti\n"), "expected header fields 'name:type' .* found 'user_id'"),
    ("recbole: no item", "recbole", text("x.inter", "user_id:token\nu\n"), "x.inter: expected a column 'item_id:token', found user_id"),
    ("recbole: ragged", "recbole", text("x.inter", "user_id:token\titem_id:token\nu\n"), "line 2: expected 2 fields .* found 1"),
    (
        "recbole: no number",
        "recbole",
        text("x.inter", "user_id:token\titem_id:token\trating:float\nu\ti\tgood\n"),
        "column 'rating', data row 1: expected a number, found 'good'",
    ),
    (
        "recbole: two",
        "recbole",
        both(text("x.inter", "a"), text("y.inter", "a")),
        "expected one file of RecBole interactions .* found x.inter, y.inter",
    ),
    ("recbole: none", "recbole", text("u.data", "a"), "expected one file of RecBole interactions .* found u.data"),
    ("recbole: header only", "recbole", text("x.inter", "user_id:token\titem_id:token\n"), "expected at least one interaction, found none"),
    ("movielens: none", "movielens", text("x.inter", "a"), "expected ratings.dat .* or u.data .* found x.inter"),
    ("movielens: layout", "movielens", text("ratings.dat", "1\t2\t3\t4\n"), "ratings.dat: line 1: expected 4 fields separated by '::'"),
    ("movielens: number", "movielens", text("u.data", "1\t2\tthree\t4\n"), "column 'value', data row 1: expected a number, found 'three'"),
    ("movielens: binary", "movielens", text("u.data", b"\0\1\2"), "u.data: expected text, found binary data"),
    (
        "movielens: users",
        "movielens",
        both(text("ratings.dat", "1::2::3::4\n"), text("users.dat", "1::M::18::99::x\n")),
        "users.dat: column 'occupation': expected codes 0 to 20, found 99",
    ),
    ("sequences: empty", "sequences", text("s.txt", "\n"), "s.txt: expected data, found an empty file"),
    (
        "sequences: no item",
        "sequences",
        text("s.txt", "u1 a b\nu2\n"),
        "line 2: expected 'user item item ...' separated by blanks, found 'u2'",
    ),
    ("sequences: CSV", "sequences", text("s.txt", "u1,a,b\n"), "line 1: expected 'user item item ...' separated by blanks, found 'u1,a,b'"),
    ("sequences: twice", "sequences", text("s.txt", "u a\nu b\n"), "line 2: expected one line a user, found a user for the second time"),
    ("sequences: two files", "sequences", both(text("a.txt", "u a"), text("b.txt", "u a")), "expected one .txt file .* found a.txt, b.txt"),
    ("amazon: none", "amazon-reviews", text("x.csv", "a"), "expected reviews as JSON lines .* found x.csv"),
    ("amazon: not JSON", "amazon-reviews", text("r.json", "{'reviewerID': 1}\n"), "r.json: line 1: expected one JSON object a line"),
    ("amazon: fields", "amazon-reviews", text("r.json", '{"name": 1}\n'), "expected the fields reviewerID, asin, overall, .* found name"),
    (
        "amazon: later line",
        "amazon-reviews",
        text("r.json", REVIEW + '{"reviewerID": "u", "asin": "i"}\n'),
        "line 2: expected a field 'unixReviewTime'",
    ),
    (
        "amazon: stars",
        "amazon-reviews",
        text("r.json", '{"reviewerID": "u", "asin": "i", "overall": "five", "unixReviewTime": 1}\n'),
        "expected numbers in unixReviewTime and overall",
    ),
    (
        "amazon: not gzip",
        "amazon-reviews",
        text("r.json.gz", "{}"),
        "r.json.gz: line 1: expected one JSON object a line, found: Not a gzipped file",
    ),
    ("amazon: cut gzip", "amazon-reviews", text("r.json.gz", gzip.compress(b'{"a": 1}\n' * 100)[:-12]), "r.json.gz: "),
]


@pytest.mark.parametrize(("kind", "write", "message"), [case[1:] for case in WRONG_SOURCE], ids=[case[0] for case in WRONG_SOURCE])
def test_a_wrong_source_is_one_clear_line(tmp_path, kind, write, message):
    folder = tmp_path / "source"
    folder.mkdir()
    write(folder)
    with pytest.raises(SchemaError, match=message) as caught:
        import_dataset(kind, str(folder), str(tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("csv", "x"), "expected a kind of recbole, movielens"),
        (("recbole", None), "import recbole: expected a source file or folder, got None"),
        (("synthetic", "x"), "import synthetic: expected no source, got 'x'"),
        (("recbole", "/nonexistent/place"), "/nonexistent/place does not exist"),
    ],
)
def test_wrong_arguments_of_import(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        import_dataset(*arguments, str(tmp_path / "out"))


def test_wrong_arguments_of_prepare(tmp_path):
    with pytest.raises(SchemaError, match="expected a data folder with interactions.parquet .* found nothing"):
        prepare(str(tmp_path / "nowhere"), str(tmp_path / "out"))
    pl.DataFrame(GOOD).write_parquet(tmp_path / "interactions.parquet")
    with pytest.raises(ConfigError, match="split: expected one of leave-one-out, time, none, got 'random'"):
        prepare(str(tmp_path), str(tmp_path / "out"), split="random")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="found 'thesis.txt'; choose another --out"):
        prepare(str(tmp_path / "interactions.parquet"), str(tmp_path / "mine"), progress=False)
