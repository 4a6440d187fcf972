"""Find the files of a data folder, tell their format, and map their columns to the contract.

Knows names, headers and types. Does not read rows; `rows.py` does.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from raysys import storage
from raysys.errors import SchemaError
from raysys.schema import (
    COLUMN_ALIASES,
    DEFAULT_EVENT,
    EVENT,
    EVENT_ID,
    ITEM_ID,
    OPTIONAL_INTERACTION_COLUMNS,
    REQUIRED_INTERACTION_COLUMNS,
    TIMESTAMP,
    USER_ID,
    VALUE,
)

INTERACTIONS, ITEM_TABLE, USER_TABLE, DATASET = "interactions", "items", "users", "dataset.json"
USED_COLUMNS = (USER_ID, ITEM_ID, TIMESTAMP, EVENT, VALUE, EVENT_ID)
SUFFIXES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".csv.gz": "csv", ".tsv.gz": "csv"}
TABLE_ALIASES = {
    "name": "title",
    "movie_title": "title",
    "genres": "categories",
    "genre": "categories",
    "category": "categories",
    "creation_timestamp": "created_at",
    "item": ITEM_ID,
    "user": USER_ID,
}
"""Neighbours' names for columns of the item and user tables, lower case."""


@dataclass(frozen=True)
class SourceFile:
    """One input file: where it is and how its columns are called in the contract.

    Attributes:
        uri: path or URI. name: path relative to the data folder, for messages.
        rank: position among the files sorted by name; breaks ties in time.
        format: "parquet" or "csv". delimiter: of a CSV file.
        columns: name in the contract -> name in the file.
        header: every column name of the file, in order.
        default_event: event of rows that have none.
        num_rows: rows by the file's own metadata; None where only reading tells.
        size_bytes: of the file.
        modified_ns: when it was last written, UTC epoch nanoseconds.
    """

    uri: str
    name: str
    rank: int
    format: str
    columns: dict[str, str]
    header: tuple[str, ...]
    delimiter: str = ","
    default_event: str = DEFAULT_EVENT
    num_rows: int | None = None
    size_bytes: int = 0
    row_groups: tuple[int, ...] = ()
    modified_ns: int = 0
    notes: tuple[str, ...] = field(default=(), compare=False)


def find_table(data: str, stem: str) -> list[str]:
    """URIs of the files of a table (`interactions`, `items`, `users`) in a data folder, sorted; empty when absent.

    Raises:
        SchemaError: the table is there twice, or its folder holds no data file.
    """
    names = [name for name in storage.list_dir(data) if name == stem or (name.startswith(f"{stem}.") and _format(name))]
    if len(names) > 1:
        raise SchemaError(f"{data}: expected one {stem} table, found {', '.join(names)}; keep one of them")
    if not names:
        return []
    uri = storage.join(data, names[0])
    if not storage.is_dir(uri):
        return [uri]
    parts = [name for name in storage.list_files(uri) if not re.search(r"(^|/)[._]", name)]
    unknown = [name for name in parts if not _format(name)]
    if unknown or not parts:
        found = unknown[0] if unknown else "an empty folder"
        raise SchemaError(f"{uri}: expected files that end in {', '.join(SUFFIXES)}, found {found}")
    return [storage.join(uri, name) for name in parts]


def find_interactions(data: str) -> list[str]:
    """URIs of the interaction files; `data` is a data folder or itself a file.

    Raises:
        SchemaError: nothing is there, with what was found instead.
    """
    if not storage.exists(data):
        raise SchemaError(f"{data}: expected a data folder with {INTERACTIONS}.parquet (or .csv, or a folder of parts), found nothing")
    if not storage.is_dir(data):
        if not _format(data):
            raise SchemaError(f"{data}: expected a file that ends in {', '.join(SUFFIXES)}")
        return [data]
    files = find_table(data, INTERACTIONS)
    if not files:
        names = storage.list_dir(data)
        found = f"{', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else "an empty folder"
        raise SchemaError(
            f"{data}: expected {INTERACTIONS}.parquet, {INTERACTIONS}.csv or a folder {INTERACTIONS}/, found {found}; "
            "`raysys import` reads other layouts"
        )
    return files


def open_sources(data: str, uris: list[str]) -> list[SourceFile]:
    """Check header and types of every interaction file.

    Raises:
        SchemaError: naming file, column, what was expected and what was found.
    """
    base = data if len(uris) > 1 or storage.is_dir(data) else data.rsplit("/", 1)[0]
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda pair: _open_interactions(base, *pair), enumerate(uris)))


def _open_interactions(base: str, rank: int, uri: str) -> SourceFile:
    name = storage.relative(uri, base)
    header = read_header(uri, name)
    columns, notes = map_columns(header.schema.names, name, COLUMN_ALIASES, (*REQUIRED_INTERACTION_COLUMNS, *OPTIONAL_INTERACTION_COLUMNS))
    missing = [column for column in REQUIRED_INTERACTION_COLUMNS if column not in columns]
    if missing:
        raise SchemaError(
            f"{name}: expected a column {missing[0]!r}, found {', '.join(header.schema.names) or 'no columns'}; rename or add it"
        )
    for column in USED_COLUMNS:
        if column in columns:
            check_type(column, header.schema.field(columns[column]).type, name)
    unused = sorted(set(columns) - set(USED_COLUMNS))
    if unused:
        notes.append(f"columns not used: {', '.join(unused)}")
    rated = EVENT not in columns and plain_name(columns.get(VALUE, "")).lower() == "rating"
    if rated:
        notes.append("events without a name but with a 'rating' are of type 'rating'")
    return SourceFile(
        uri,
        name,
        rank,
        header.format,
        columns,
        tuple(header.schema.names),
        header.delimiter,
        "rating" if rated else DEFAULT_EVENT,
        header.num_rows,
        header.size_bytes,
        header.row_groups,
        header.modified_ns,
        tuple(notes),
    )


@dataclass(frozen=True)
class Header:
    """What a file says about itself before its rows are read; CSV columns are all strings."""

    format: str
    schema: pa.Schema
    delimiter: str
    num_rows: int | None
    size_bytes: int
    modified_ns: int
    row_groups: tuple[int, ...] = ()


def read_header(uri: str, name: str) -> Header:
    """Format, columns and types of a file.

    Raises:
        SchemaError: the file is empty or not of the format its name promises.
    """
    filesystem, path = storage.resolve(uri)
    info = filesystem.get_file_info(path)
    if info.type != pafs.FileType.File:
        raise SchemaError(f"{name}: expected a file, found nothing")
    if not info.size:
        raise SchemaError(f"{name}: expected data, found an empty file")
    if _format(uri) == "parquet":
        try:
            with filesystem.open_input_file(path) as file:
                metadata = pq.read_metadata(file)
                schema = metadata.schema.to_arrow_schema()
        except (pa.ArrowInvalid, OSError) as error:
            raise SchemaError(f"{name}: expected a Parquet file, found something else ({_one_line(error)})") from None
        groups = tuple(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
        return Header("parquet", schema, ",", metadata.num_rows, info.size, info.mtime_ns or 0, groups)
    try:
        with filesystem.open_input_stream(path, compression="gzip" if path.endswith(".gz") else None) as stream:
            first = stream.read(1 << 16).split(b"\n", 1)[0].decode("utf-8-sig").rstrip("\r")
    except (UnicodeDecodeError, OSError) as error:
        raise SchemaError(f"{name}: expected UTF-8 text with a header line ({_one_line(error)}); convert the file to UTF-8") from None
    delimiter = max(("\t", ",", ";", "|"), key=first.count) if not first.strip() == "" else ","
    names = [cell.strip().strip('"') for cell in first.split(delimiter)]
    if not any(names):
        raise SchemaError(f"{name}: expected a header line with column names, found an empty line")
    if len(set(names)) < len(names):
        raise SchemaError(f"{name}: expected every column once, found {max(names, key=names.count)!r} twice")
    return Header("csv", pa.schema([(column, pa.string()) for column in names]), delimiter, None, info.size, info.mtime_ns or 0)


def csv_options(header: tuple[str, ...], delimiter: str, *, newlines_in_values: bool = False) -> dict:
    """Reader options that take every column of a CSV file as text; empty cells are null."""
    return {
        "read_options": pacsv.ReadOptions(column_names=list(header), skip_rows=1, use_threads=False, block_size=16 << 20),
        "parse_options": pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=newlines_in_values),
        "convert_options": pacsv.ConvertOptions(
            column_types={name: pa.string() for name in header}, strings_can_be_null=True, null_values=[""]
        ),
    }


def plain_name(column: str) -> str:
    """A column name without RecBole's `:type` suffix."""
    return re.sub(r":(token|token_seq|float|float_seq)$", "", column.strip())


def map_columns(header: list[str], name: str, aliases: dict[str, str], known: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """Contract name -> name in the file, and a note for every name that was understood as another.

    Known names and aliases are told regardless of case; other columns keep their plain name.

    Raises:
        SchemaError: two columns mean the same.
    """
    columns: dict[str, str] = {}
    notes = []
    exact = {column for column in header if column in known}
    for column in header:
        plain = column if column in exact else plain_name(column)
        lower = plain.lower()
        meant = lower if lower in known else aliases.get(lower, plain)
        if column not in exact and meant in exact:
            continue
        if meant in columns:
            raise SchemaError(f"{name}: columns {columns[meant]!r} and {column!r} both mean {meant!r}; keep one of them")
        columns[meant] = column
        if meant != column and meant in known:
            notes.append(f"column {column!r} read as {meant!r}")
    return columns, notes


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds text."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def check_type(column: str, kind: pa.DataType, name: str) -> None:
    """Refuse a type that cannot hold what the contract wants.

    Raises:
        SchemaError: naming file, column, expected and found type.
    """
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    text = is_text(kind) or pa.types.is_null(kind)
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if column in (USER_ID, ITEM_ID, EVENT_ID):
        good, expected = text or number, "text or whole numbers"
    elif column == TIMESTAMP:
        good = text or number or pa.types.is_timestamp(kind) or pa.types.is_date(kind)
        expected = "a timestamp, epoch numbers or ISO text"
    elif column == VALUE:
        good, expected = text or number or pa.types.is_boolean(kind) or pa.types.is_decimal(kind), "numbers"
    else:
        good, expected = text, "text"
    if not good:
        raise SchemaError(f"{name}: column {column!r}: expected {expected}, found type {kind}")


def _format(name: str) -> str | None:
    path, _ = storage.split_options(name)
    return next((kind for suffix, kind in SUFFIXES.items() if path.endswith(suffix)), None)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
