"""One line a user, `user item item ...` in time order: the files of SASRec, S3-Rec and their followers.

Titles come from a table beside the file where there is one: `items.tsv`, or `movies.tsv`
with `sasrec_item_ids.tsv` for files that number the films anew.
"""

import polars as pl

from raysys import storage
from raysys.adapters.contract import ContractWriter
from raysys.adapters.text import find_file, read_fields, read_lines
from raysys.errors import SchemaError

FLUSH_ROWS = 1_000_000
ITEM_NAMES = {"name": "title", "genres": "categories", "genre": "categories", "category": "categories", "text_id": "text"}
"""Columns of a title table -> contract; `text_id` is the product text of the S3-Rec files."""


def read(src: str, writer: ContractWriter) -> None:
    """Read the folder (or its `.txt` file). Timestamps are each user's positions, events are views.

    Raises:
        SchemaError: a line has no item, a user comes twice, or a line looks like another format.
    """
    path = find_sequences(src)
    writer.time = "ordinal"
    items: set[str] = set()
    users: set[str] = set()
    columns: tuple[list[str], list[str], list[int]] = ([], [], [])
    for number, line in read_lines(path):
        user, *history = line.split()
        if not history or "::" in line or "," in line or "|" in line or "\t" in line.strip() and len(history) == 1:
            raise SchemaError(f"{path}: line {number}: expected 'user item item ...' separated by blanks, found {line.strip()[:60]!r}")
        if user in users:
            raise SchemaError(f"{path}: line {number}: expected one line a user, found a user for the second time")
        users.add(user)
        items.update(history)
        columns[0].extend([user] * len(history))
        columns[1].extend(history)
        columns[2].extend(range(len(history)))
        if len(columns[0]) >= FLUSH_ROWS:
            _flush(columns, writer)
    _flush(columns, writer)
    folder = src if storage.is_dir(src) else path.rsplit("/", 1)[0]
    titles = read_titles(folder, items, writer)
    if titles is not None:
        writer.add_table("items", titles)


def find_sequences(src: str) -> str:
    """The sequence file of a folder; README and licence texts are passed over.

    Raises:
        SchemaError: there is none, or more than one.
    """
    if not storage.is_dir(src):
        return src
    names = [name for name in storage.list_dir(src) if name.endswith(".txt") and not name.lower().startswith(("readme", "license"))]
    if len(names) == 1:
        return storage.join(src, names[0])
    if not names:
        return find_file(src, (".txt",), "sequences, one line a user")
    raise SchemaError(f"{src}: expected one .txt file with a line a user, found {', '.join(names)}; name the file itself")


def _flush(columns: tuple[list[str], list[str], list[int]], writer: ContractWriter) -> None:
    user, item, position = columns
    frame = pl.DataFrame({"user_id": user, "item_id": item, "timestamp": position}, schema_overrides={"timestamp": pl.Int64})
    writer.add_interactions(frame.with_columns(event=pl.lit("view")))
    for column in columns:
        column.clear()


def read_titles(folder: str, items: set[str], writer: ContractWriter) -> pl.DataFrame | None:
    """The table with titles beside a sequence file, under the item ids of the sequences.

    `movies.tsv` is keyed by film id. Whether the sequences hold film ids or numbers of
    `sasrec_item_ids.tsv` is told by the ids themselves: all of them must be in one of the two.
    """
    names = storage.list_dir(folder)
    if "items.tsv" in names:
        return _contract_names(read_fields(storage.join(folder, "items.tsv"), "\t"))
    if "movies.tsv" not in names:
        writer.notes.append("no items.tsv or movies.tsv beside the file: items have no titles")
        return None
    movies = read_fields(storage.join(folder, "movies.tsv"), "\t").rename({"movie_id": "item_id"})
    numbered = None
    if "sasrec_item_ids.tsv" in names:
        numbered = read_fields(storage.join(folder, "sasrec_item_ids.tsv"), "\t").rename({"sasrec_item": "number", "movie_id": "item_id"})
    if items <= set(movies["item_id"]):
        writer.notes.append("items are film ids of movies.tsv")
        return _contract_names(movies)
    if numbered is not None and items <= set(numbered["number"]):
        writer.notes.append("items are numbers of sasrec_item_ids.tsv; film ids kept as movie_id")
        joined = numbered.join(movies, on="item_id", how="left", maintain_order="left")
        return _contract_names(joined.rename({"item_id": "movie_id", "number": "item_id"}))
    writer.notes.append("movies.tsv does not know all items of the sequences and was not read")
    return None


def _contract_names(frame: pl.DataFrame) -> pl.DataFrame:
    frame = frame.rename({name: ITEM_NAMES[name] for name in frame.columns if name in ITEM_NAMES and ITEM_NAMES[name] not in frame.columns})
    if "categories" in frame.columns:
        frame = frame.with_columns(pl.col("categories").str.split("|").list.eval(pl.element().filter(pl.element() != "")))
    return frame
