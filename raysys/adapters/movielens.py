"""MovieLens as GroupLens ships it: 1M (`ratings.dat`, `::`) and 100k (`u.data`, tabs and bars)."""

import re

import polars as pl

from raysys import storage
from raysys.adapters.contract import ContractWriter
from raysys.adapters.text import read_fields, to_number
from raysys.errors import SchemaError

RATINGS = ("user_id", "item_id", "value", "timestamp")
GENRES_100K = (
    "unknown,Action,Adventure,Animation,Children's,Comedy,Crime,Documentary,Drama,Fantasy,"
    "Film-Noir,Horror,Musical,Mystery,Romance,Sci-Fi,Thriller,War,Western"
).split(",")
"""Order of the 19 flags at the end of a `u.item` line (its `u.genre`)."""
OCCUPATIONS_1M = (
    "other,academic/educator,artist,clerical/admin,college/grad student,customer service,doctor/health care,"
    "executive/managerial,farmer,homemaker,K-12 student,lawyer,programmer,retired,sales/marketing,scientist,"
    "self-employed,technician/engineer,tradesman/craftsman,unemployed,writer"
).split(",")
"""Meaning of the occupation codes 0-20, from the README of MovieLens-1M."""
MONTHS = {name: month for month, name in enumerate("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(), start=1)}


def read(src: str, writer: ContractWriter) -> None:
    """Read a folder with `ratings.dat` or `u.data`, or one of those files with its neighbours.

    Raises:
        SchemaError: neither is there, or a line has another layout.
    """
    folder = src if storage.is_dir(src) else src.rsplit("/", 1)[0]
    names = storage.list_dir(folder)
    wanted = [name for name in ("ratings.dat", "u.data") if name in names and (src == folder or src.endswith(f"/{name}"))]
    if not wanted:
        found = ", ".join(names[:8]) if src == folder else src
        raise SchemaError(f"{src}: expected ratings.dat (MovieLens-1M) or u.data (MovieLens-100k), found {found or 'an empty folder'}")
    layout_1m = wanted[0] == "ratings.dat"
    path = storage.join(folder, wanted[0])
    frame = read_fields(path, "::" if layout_1m else "\t", RATINGS)
    writer.add_interactions(
        frame.select("user_id", "item_id").with_columns(
            timestamp=to_number(frame, "timestamp", pl.Int64, path),
            event=pl.lit("rating"),
            value=to_number(frame, "value", pl.Float32, path),
        )
    )
    readers = {
        "items": {"movies.dat": _movies_1m} if layout_1m else {"u.item": _movies_100k, "u.item_utf8": _movies_100k},
        "users": {"users.dat": _users_1m} if layout_1m else {"u.user": _users_100k},
    }
    for table, files in readers.items():
        found_file = next((name for name in files if name in names), None)
        if found_file:
            writer.add_table(table, files[found_file](storage.join(folder, found_file)))
        else:
            writer.notes.append(f"no {' or '.join(files)} beside {wanted[0]}: no {table} table")


def _movies_1m(uri: str) -> pl.DataFrame:
    frame = read_fields(uri, "::", ("item_id", "title", "genres"))
    return frame.select("item_id", "title", categories=pl.col("genres").str.split("|"), release_year=_year(pl.col("title")))


def _movies_100k(uri: str) -> pl.DataFrame:
    frame = read_fields(uri, "|", ("item_id", "title", "released", "video", "imdb_url", *GENRES_100K))
    flags = pl.concat_list([pl.when(pl.col(name).str.strip_chars() == "1").then(pl.lit(name)) for name in GENRES_100K])
    return frame.select(
        "item_id",
        "title",
        categories=flags.list.drop_nulls(),
        release_year=_year(pl.col("title")),
        release_date=pl.Series([_iso_date(text) for text in frame["released"]], dtype=pl.String),
        imdb_url=pl.when(pl.col("imdb_url") != "").then("imdb_url"),
    )


def _year(title: pl.Expr) -> pl.Expr:
    return title.str.extract(r"\((\d{4})\)\s*$").cast(pl.Int64)


def _iso_date(text: str) -> str | None:
    match = re.fullmatch(r"\s*(\d{1,2})-([A-Z][a-z]{2})-(\d{4})\s*", text)
    return f"{match[3]}-{MONTHS[match[2]]:02d}-{int(match[1]):02d}" if match and match[2] in MONTHS else None


def _users_1m(uri: str) -> pl.DataFrame:
    frame = read_fields(uri, "::", ("user_id", "gender", "age", "occupation", "zip_code"))
    code = to_number(frame, "occupation", pl.Int64, uri)
    wrong = ~code.is_between(0, len(OCCUPATIONS_1M) - 1)
    if wrong.any():
        raise SchemaError(f"{uri}: column 'occupation': expected codes 0 to {len(OCCUPATIONS_1M) - 1}, found {code.filter(wrong)[0]}")
    names = pl.Series(OCCUPATIONS_1M).gather(code)
    return frame.with_columns(age=to_number(frame, "age", pl.Int64, uri), occupation=names)


def _users_100k(uri: str) -> pl.DataFrame:
    frame = read_fields(uri, "|", ("user_id", "age", "gender", "occupation", "zip_code"))
    return frame.with_columns(age=to_number(frame, "age", pl.Int64, uri))
