"""RecBole's atomic files: `NAME.inter`, `NAME.item`, `NAME.user`, tab separated, header `name:type`."""

import polars as pl

from raysys import storage
from raysys.adapters.contract import ContractWriter
from raysys.adapters.text import find_file, read_fields, to_number
from raysys.errors import SchemaError

TYPES = ("token", "token_seq", "float", "float_seq")
ITEM_NAMES = {"movie_title": "title", "class": "categories", "genre": "categories", "genres": "categories", "category": "categories"}


def read(src: str, writer: ContractWriter) -> None:
    """Read the folder (or the `.inter` file in it).

    A `rating` column makes events of type `rating`; without one they are views. Without
    a timestamp, the order of the file is the order in time.

    Raises:
        SchemaError: the header has no types or lacks user or item.
    """
    path = find_file(src, (".inter",), "RecBole interactions")
    frame, kinds = read_atomic(path)
    for column in ("user_id", "item_id"):
        if column not in frame.columns:
            raise SchemaError(f"{path}: expected a column '{column}:token', found {', '.join(frame.columns)}")
    events = frame.select("user_id", "item_id")
    if "timestamp" in frame.columns:
        events = events.with_columns(timestamp=to_number(frame, "timestamp", pl.Float64, path).cast(pl.Int64))
    else:
        writer.time = "ordinal"
        writer.notes.append("no timestamp: the order of lines is the order in time")
        events = events.with_columns(timestamp=pl.int_range(pl.len(), dtype=pl.Int64))
    rated = "rating" in frame.columns
    events = events.with_columns(event=pl.lit("rating" if rated else "view"))
    if rated:
        events = events.with_columns(value=to_number(frame, "rating", pl.Float32, path))
    writer.add_interactions(events)
    unused = sorted(set(frame.columns) - {"user_id", "item_id", "timestamp", "rating"})
    if unused:
        writer.notes.append(f"columns of {path.split('/')[-1]} not read: {', '.join(unused)}")
    stem = path.removesuffix(".inter")
    for suffix, name, id_column in ((".item", "items", "item_id"), (".user", "users", "user_id")):
        if storage.exists(stem + suffix):
            writer.add_table(name, read_attributes(stem + suffix, id_column))


def read_atomic(uri: str) -> tuple[pl.DataFrame, dict[str, str]]:
    """Columns as text under their plain names, and the type of each.

    Raises:
        SchemaError: a header field is not `name:type`.
    """
    frame = read_fields(uri, "\t")
    kinds = {}
    for field in frame.columns:
        name, _, kind = field.partition(":")
        if kind not in TYPES or not name:
            raise SchemaError(f"{uri}: expected header fields 'name:type' with a type of {', '.join(TYPES)}, found {field!r}")
        kinds[name] = kind
    return frame.rename(dict(zip(frame.columns, kinds, strict=True))), kinds


def read_attributes(uri: str, id_column: str) -> pl.DataFrame:
    """An item or user file: floats as numbers, token sequences as lists, whole-number columns as integers.

    Years are numbers, null where they are none. Titles stay text. `class`, `genre` and the like become `categories`.

    Raises:
        SchemaError: the id column is missing or a number cannot be read.
    """
    frame, kinds = read_atomic(uri)
    if id_column not in frame.columns:
        raise SchemaError(f"{uri}: expected a column '{id_column}:token', found {', '.join(frame.columns)}")
    columns = []
    for name, kind in kinds.items():
        text = frame[name].str.strip_chars()
        text = text.set(text == "", None)
        meant = ITEM_NAMES.get(name, name) if id_column == "item_id" else name
        if name == id_column or meant == "title":
            columns.append(text.fill_null("") if name == id_column else text)
        elif kind == "float":
            columns.append(to_number(frame, name, pl.Float64, uri))
        elif kind == "float_seq":
            columns.append(text.str.split(" ").cast(pl.List(pl.Float64)))
        elif kind == "token_seq" or meant == "categories":
            columns.append(text.str.split(" ").list.eval(pl.element().filter(pl.element() != "")))
        else:
            whole = text.cast(pl.Int64, strict=False)
            leading_zero = text.str.contains(r"^[+-]?0\d").any()
            # ML-100k's release_year is a number in all rows but two ("V", "unkonwn"); as text no range filter could use it.
            number = not leading_zero and ("year" in name or whole.null_count() == text.null_count())
            columns.append(whole if number else text)
        columns[-1] = columns[-1].alias(meant)
    return pl.DataFrame(columns)
