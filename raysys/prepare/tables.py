"""The optional item and user tables: read, check, normalise, and lay out in vocabulary order.

Knows attribute columns, not interactions. Runs in the driver; these tables fit in memory
(the vocabulary that every task needs does too).
"""

from collections.abc import Sequence

import polars as pl
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from raysys import storage
from raysys.errors import SchemaError
from raysys.prepare.rows import ids
from raysys.prepare.source import TABLE_ALIASES, csv_options, map_columns, read_header
from raysys.prepare.times import parse_times
from raysys.schema import ITEM_ID, ITEM_IDX, USER_ID, USER_IDX

ITEM_COLUMNS = (ITEM_ID, "title", "text", "categories", "created_at", "available", "image", "audio")
USER_COLUMNS = (USER_ID,)
RESERVED = {ITEM_IDX, USER_IDX, "num_train"}
TRUE, FALSE = ("true", "t", "yes", "y", "1", "1.0"), ("false", "f", "no", "n", "0", "0.0")


class AttributeTable:
    """Rows of an item or user table, one an id, and what was wrong with the rest.

    Attributes:
        rows: one row an id, columns of the contract and attributes as they came.
        bad: refused rows: file, row, reason.
        notes: what was understood.
        duplicates: rows replaced by a later row of the same id.
    """

    def __init__(self, id_column: str) -> None:
        self.id_column = id_column
        self.rows = pl.DataFrame(schema={id_column: pl.String})
        self.bad = pl.DataFrame(schema={"file": pl.String, "row": pl.Int64, "reason": pl.String})
        self.notes: list[str] = []
        self.duplicates = 0

    def extended(self, later: "AttributeTable") -> "AttributeTable":
        """Both tables; where both have an id, the row of the later one.

        Raises:
            SchemaError: a column has types that do not go together.
        """
        both = AttributeTable(self.id_column)
        parts = [table.rows for table in (self, later) if len(table.rows)]
        both.add([self.rows.clear()] if not parts else parts, "the item or user table")
        both.bad = pl.concat([self.bad, later.bad])
        both.notes = later.notes
        both.duplicates += self.duplicates + later.duplicates
        return both

    def add(self, parts: list[pl.DataFrame], where: str) -> None:
        """Fill `rows`; the last row of an id wins.

        Args:
            parts: one frame a file. where: named in the message.

        Raises:
            SchemaError: a column has types that do not go together.
        """
        try:
            rows = pl.concat(parts, how="diagonal_relaxed")
        except (pl.exceptions.SchemaError, pl.exceptions.InvalidOperationError) as error:
            raise SchemaError(f"{where}: expected the same column types in every part, found: {error}") from None
        self.rows = rows.unique(self.id_column, keep="last", maintain_order=True)
        self.duplicates = len(rows) - len(self.rows)

    @property
    def quarantine(self) -> dict[str, int]:
        """Reason -> number of refused rows."""
        return {f"{reason}, attribute table": count for reason, count in sorted(self.bad["reason"].value_counts().iter_rows())}


def read_attributes(uris: Sequence[str], id_column: str) -> AttributeTable:
    """Read an item or user table; the last row of an id wins.

    Args:
        uris: its files in order; none gives an empty table.
        id_column: ITEM_ID or USER_ID.

    Raises:
        SchemaError: naming file, column, what was expected and what was found.
    """
    table = AttributeTable(id_column)
    parts = [_read_file(uri, table) for uri in uris]
    parts = [part for part in parts if part.width]
    if parts:
        table.add(parts, f"{uris[0]} and {len(uris) - 1} more")
    return table


def _read_file(uri: str, table: AttributeTable) -> pl.DataFrame:
    name = "/".join(uri.split("/")[-2:])
    header = read_header(uri, name)
    known = ITEM_COLUMNS if table.id_column == ITEM_ID else USER_COLUMNS
    aliases = TABLE_ALIASES if table.id_column == ITEM_ID else {"user": USER_ID}
    columns, notes = map_columns(header.schema.names, name, aliases, known)
    table.notes += [note for note in notes if note not in table.notes]
    if table.id_column not in columns:
        raise SchemaError(
            f"{name}: expected a column {table.id_column!r}, found {', '.join(header.schema.names) or 'no columns'}; rename or add it"
        )
    clash = RESERVED.intersection(columns)
    if clash:
        raise SchemaError(f"{name}: column {min(clash)!r} is a name that prepare writes itself; rename it")
    raw = _load(uri, name, header).select(list(columns.values())).rename_columns(list(columns))
    fixed = {column: raw[column] for column in raw.column_names if _is_embedding(column, raw[column].type, name)}
    frame = pl.DataFrame(pl.from_arrow(raw.drop_columns(list(fixed)))) if len(fixed) < raw.num_columns else pl.DataFrame()
    frame = frame.with_columns(pl.Series(column, pl.from_arrow(data.combine_chunks())) for column, data in fixed.items())
    if frame[table.id_column].dtype.is_nested() or frame[table.id_column].dtype in (pl.Boolean, pl.Binary):
        raise SchemaError(f"{name}: column {table.id_column!r}: expected text or whole numbers, found {frame[table.id_column].dtype}")
    frame = frame.with_columns(ids(frame[table.id_column]).alias(table.id_column))
    reason = (
        pl.when(pl.col(table.id_column).is_null())
        .then(pl.lit(f"null {table.id_column}"))
        .when(pl.col(table.id_column).str.strip_chars() == "")
        .then(pl.lit(f"empty {table.id_column}"))
    )
    judged = frame.select(file=pl.lit(name), row=pl.int_range(pl.len(), dtype=pl.Int64), reason=reason)
    bad = judged["reason"].is_not_null()
    table.bad = pl.concat([table.bad, judged.filter(bad)])
    frame = frame.filter(~bad)
    return _normalise_items(frame, name, table) if table.id_column == ITEM_ID else frame


def _load(uri: str, name: str, header) -> pa.Table:
    filesystem, path = storage.resolve(uri)
    try:
        if header.format == "parquet":
            with filesystem.open_input_file(path) as file:
                return pq.ParquetFile(file).read()
        options = csv_options(tuple(header.schema.names), header.delimiter, newlines_in_values=True)
        text = {name for name in header.schema.names if name.split(":")[0].lower() in (*ITEM_COLUMNS, *USER_COLUMNS, *TABLE_ALIASES)}
        options["convert_options"].column_types = {column: pa.string() for column in text}
        with filesystem.open_input_stream(path, compression="gzip" if path.endswith(".gz") else None) as stream:
            return pacsv.read_csv(stream, **options)
    except (pa.ArrowInvalid, OSError) as error:
        raise SchemaError(f"{name}: expected readable {header.format} data, found: {' '.join(str(error).split())[:200]}") from None


def _is_embedding(column: str, kind: pa.DataType, name: str) -> bool:
    if not column.endswith("_embedding"):
        return False
    if not (pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type)):
        raise SchemaError(f"{name}: column {column!r}: expected fixed-size lists of floats, found {kind}; all vectors need one length")
    return True


def _normalise_items(frame: pl.DataFrame, name: str, table: AttributeTable) -> pl.DataFrame:
    changes: dict[str, pl.Series] = {}
    for text in ("title", "text"):
        if text in frame.columns:
            if frame[text].dtype.is_nested() or frame[text].dtype == pl.Binary:
                raise SchemaError(f"{name}: column {text!r}: expected text, found {frame[text].dtype}")
            changes[text] = frame[text].cast(pl.String)
    if "categories" in frame.columns:
        changes["categories"] = _categories(frame["categories"], name)
    if "available" in frame.columns:
        changes["available"] = _available(frame["available"], name)
    if "created_at" in frame.columns:
        column = frame["created_at"]
        if column.dtype.is_nested() or column.dtype in (pl.Boolean, pl.Binary):
            raise SchemaError(f"{name}: column 'created_at': expected a timestamp, epoch numbers or ISO text, found {column.dtype}")
        moments = parse_times(column, ordinal=False)["time"]
        lost = moments.null_count() - column.null_count()
        if lost > 0:
            table.notes.append(f"{lost:,} unreadable created_at of items set to null")
        changes["created_at"] = moments.cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    return frame.with_columns(series.alias(column) for column, series in changes.items())


def _categories(column: pl.Series, name: str) -> pl.Series:
    if isinstance(column.dtype, (pl.List, pl.Array)):
        lists = column.cast(pl.List(pl.String))
    elif column.dtype in (pl.String, pl.Categorical, pl.Null):
        text = column.cast(pl.String)
        has_bar = text.str.contains("|", literal=True)
        frame = pl.DataFrame({"bar": text.str.split("|"), "comma": text.str.split(","), "has_bar": has_bar})
        lists = frame.select(pl.when("has_bar").then("bar").otherwise("comma").alias("lists"))["lists"]
    else:
        raise SchemaError(f"{name}: column 'categories': expected lists of text or text separated by '|' or ',', found {column.dtype}")
    stripped = pl.col("lists").list.eval(pl.element().str.strip_chars())
    kept = stripped.list.eval(pl.element().filter(pl.element().is_not_null() & (pl.element() != "")))
    return lists.alias("lists").to_frame().select(kept)["lists"]


def _available(column: pl.Series, name: str) -> pl.Series:
    if column.dtype == pl.Boolean:
        return column
    text = column.cast(pl.String, strict=False).str.strip_chars().str.to_lowercase()
    known = text.is_in(TRUE + FALSE) | text.is_null()
    if column.dtype.is_nested() or not known.all():
        example = "" if column.dtype.is_nested() else f" {text.filter(~known)[0]!r}"
        raise SchemaError(f"{name}: column 'available': expected true or false (1 or 0), found {column.dtype}{example}")
    return pl.select(pl.when(text.is_in(TRUE)).then(True).when(text.is_in(FALSE)).then(False))["literal"].alias("available")


def items_in_order(order: pl.DataFrame, attributes: AttributeTable) -> pa.Table:
    """The item table of a prepared set.

    Args:
        order: item_id and num_train, row = item_idx.
        attributes: what the data says about items.

    Returns:
        item_idx int32, item_id, num_train int64, title, text (empty where unknown), categories
        (empty list), available (true), created_at (null), then the attributes as they came.
    """
    rows = order.join(attributes.rows, on=ITEM_ID, how="left", maintain_order="left")
    defaults = {
        "title": pl.lit("", pl.String),
        "text": pl.lit("", pl.String),
        "categories": pl.lit([], pl.List(pl.String)),
        "available": pl.lit(True),
        "created_at": pl.lit(None, pl.Datetime("us", "UTC")),
    }
    rows = rows.with_columns(default.alias(name) for name, default in defaults.items() if name not in rows.columns)
    rows = rows.with_columns(pl.col(name).fill_null(default) for name, default in defaults.items() if name != "created_at")
    rows = rows.with_row_index(ITEM_IDX).with_columns(pl.col(ITEM_IDX).cast(pl.Int32), pl.col("num_train").cast(pl.Int64))
    first = [ITEM_IDX, ITEM_ID, "num_train", *defaults]
    return plain_table(rows.select(*first, pl.exclude(first)))


def users_in_order(order: pl.DataFrame, attributes: AttributeTable) -> pa.Table:
    """The user table of a prepared set: user_idx int32, user_id, attributes as they came.

    Args:
        order: user_id of every user, row = user_idx.
        attributes: what the data says about users.
    """
    rows = order.join(attributes.rows, on=USER_ID, how="left", maintain_order="left")
    return plain_table(rows.with_row_index(USER_IDX).with_columns(pl.col(USER_IDX).cast(pl.Int32)))


def plain_table(frame: pl.DataFrame) -> pa.Table:
    """Polars to Arrow with 32-bit strings and lists, in one chunk a column."""
    table = frame.rechunk().to_arrow()
    return table.cast(pa.schema([(field.name, _plain_type(field.type)) for field in table.schema])).combine_chunks()


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_dictionary(kind):
        return pa.string()
    if pa.types.is_large_list(kind) or pa.types.is_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    return kind
