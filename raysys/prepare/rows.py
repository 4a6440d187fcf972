"""Read raw interactions chunk by chunk; normalise, validate and quarantine every row.

A bad row never stops the job and never vanishes: it goes to `quarantine/` with
its reason. What a chunk learnt (counts, reasons, forms of timestamps) goes to
one JSON file under `reports/` of the working folder; names are derived from the
chunk, so a retried task writes the same files again.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import polars as pl
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from raysys import storage
from raysys.errors import SchemaError
from raysys.prepare.dataset import QUARANTINE
from raysys.prepare.source import USED_COLUMNS, SourceFile, csv_options
from raysys.prepare.times import parse_times
from raysys.schema import EVENT, EVENT_ID, ITEM_ID, TIMESTAMP, USER_ID, VALUE

REPORTS = "reports"
TIME, SOURCE = "time", "source"
ROW_BITS = 40
"""`source` = rank of the file << ROW_BITS | row in the file: the tie-breaker that travels with a row."""
BATCH_ROWS = 1 << 19
CHUNK_ROWS = 1 << 20

CLEAN_SCHEMA = pa.schema(
    [
        (USER_ID, pa.large_string()),
        (ITEM_ID, pa.large_string()),
        (TIME, pa.int64()),  # UTC epoch microseconds, or an ordinal
        (EVENT, pa.large_string()),
        (VALUE, pa.float32()),  # NaN = none
        (EVENT_ID, pa.large_string()),
        (SOURCE, pa.int64()),
    ]
)


@dataclass(frozen=True)
class Chunk:
    """A part of one file: some row groups of a Parquet file, or a whole CSV file."""

    file: SourceFile
    first_row: int = 0
    row_groups: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """Unique name of this chunk in file names."""
        return f"{self.file.rank:06d}-{self.first_row:012d}"


@dataclass(frozen=True)
class RowRules:
    """What the row checks need to know.

    Attributes:
        ordinal: timestamps are an order only.
        first_us, last_us: plausible range of UTC timestamps.
        no_weight: events that carry no evidence of interest; counted and dropped.
        work: folder of the output that is being made.
    """

    ordinal: bool
    first_us: int
    last_us: int
    no_weight: tuple[str, ...]
    work: str


def plan_chunks(files: list[SourceFile]) -> list[Chunk]:
    """Split Parquet files at row groups into chunks of about CHUNK_ROWS rows."""
    chunks = []
    for file in files:
        groups: list[int] = []
        first = rows = start = 0
        for index, count in enumerate(file.row_groups):
            if rows and rows + count > CHUNK_ROWS:
                chunks.append(Chunk(file, start, tuple(groups)))
                groups, rows, start = [], 0, first
            groups.append(index)
            rows += count
            first += count
        if rows or file.format == "csv":
            chunks.append(Chunk(file, start, tuple(groups)))
    return chunks


def clean_chunk(chunk: Chunk, rules: RowRules) -> Iterator[pa.Table]:
    """Yield the good rows of a chunk as CLEAN_SCHEMA tables; write its quarantine and its report.

    A file that cannot be read ends the chunk; the error stands in the report, because
    an exception out of a Ray Data task would print pages of traceback first.
    """
    report: dict = {"rows": 0, "quarantine": Counter(), "dropped": Counter(), "forms": Counter(), "imputed": Counter(), "error": None}
    row = chunk.first_row
    ragged: list[dict] = []
    try:
        for table in _read(chunk, ragged):
            good, bad = clean_rows(table, chunk.file, row, rules, report)
            row += table.num_rows
            report["rows"] += table.num_rows
            _quarantine(bad, chunk, row, rules)
            yield good
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        report["error"] = f"{chunk.file.name}: expected readable {chunk.file.format} data, found: {' '.join(str(error).split())[:200]}"
    if ragged:
        report["rows"] += len(ragged)
        report["quarantine"]["wrong number of fields"] += len(ragged)
        _quarantine(pl.DataFrame(ragged, infer_schema_length=None), chunk, row + 1, rules)
    storage.write_json(storage.join(rules.work, REPORTS, f"{chunk.key}.json"), report)


def _read(chunk: Chunk, ragged: list[dict]) -> Iterator[pa.Table]:
    file = chunk.file
    wanted = {name: file.columns[name] for name in USED_COLUMNS if name in file.columns}
    filesystem, path = storage.resolve(file.uri)
    if file.format == "parquet":
        with filesystem.open_input_file(path) as stream:
            reader = pq.ParquetFile(stream)
            for batch in reader.iter_batches(BATCH_ROWS, row_groups=list(chunk.row_groups), columns=list(wanted.values())):
                yield pa.Table.from_batches([batch]).select(list(wanted.values())).rename_columns(list(wanted))
        return

    def set_aside(bad: pacsv.InvalidRow) -> str:
        ragged.append(
            {"file": file.name, "row": (bad.number or 2) - 2, "reason": "wrong number of fields", USER_ID: None, ITEM_ID: None}
            | {TIMESTAMP: None, EVENT: None, VALUE: None, "line": bad.text}
        )
        return "skip"

    options = csv_options(file.header, file.delimiter)
    options["parse_options"].invalid_row_handler = set_aside
    options["convert_options"].include_columns = list(wanted.values())
    with filesystem.open_input_stream(path, compression="gzip" if path.endswith(".gz") else None) as stream:
        with pacsv.open_csv(stream, **options) as reader:
            for batch in reader:
                yield pa.Table.from_batches([batch]).rename_columns(list(wanted))


def clean_rows(table: pa.Table, file: SourceFile, first_row: int, rules: RowRules, report: dict) -> tuple[pa.Table, pl.DataFrame]:
    """Normalise and judge a batch of rows.

    Args:
        table: contract columns of the file, raw types.
        file: where they come from.
        first_row: row of the file the batch starts at.
        rules: what is plausible and what has weight.
        report: counters, added to.

    Returns:
        Good rows (CLEAN_SCHEMA), and bad rows with file, row, reason and their raw text.
    """
    raw = pl.DataFrame(pl.from_arrow(table))
    times = parse_times(raw[TIMESTAMP], ordinal=rules.ordinal)
    value = numbers(raw[VALUE]) if VALUE in raw.columns else pl.Series([None] * len(raw), dtype=pl.Float32)
    given = raw[VALUE].is_not_null() & ~_is_nan(raw[VALUE]) if VALUE in raw.columns else pl.Series([False] * len(raw), dtype=pl.Boolean)
    event = raw[EVENT].cast(pl.String).str.strip_chars() if EVENT in raw.columns else pl.Series([None] * len(raw), dtype=pl.String)
    frame = pl.DataFrame(
        {
            USER_ID: ids(raw[USER_ID]),
            ITEM_ID: ids(raw[ITEM_ID]),
            TIME: times["time"],
            EVENT: event,
            VALUE: value,
            EVENT_ID: ids(raw[EVENT_ID]) if EVENT_ID in raw.columns else pl.Series([None] * len(raw), dtype=pl.String),
            SOURCE: pl.int_range(first_row, first_row + len(raw), eager=True, dtype=pl.Int64) + (file.rank << ROW_BITS),
            "form": times["form"],
            "has_time": raw[TIMESTAMP].is_not_null() & ~_is_nan(raw[TIMESTAMP]),
            "has_value": given,
        }
    )
    reason = pl.lit(None, pl.String)
    for broken, text in reversed(_checks(rules)):
        reason = pl.when(broken).then(pl.lit(text)).otherwise(reason)
    frame = frame.with_columns(reason=reason, no_event=pl.col(EVENT).fill_null("") == "")
    bad = frame["reason"].is_not_null()
    bad_rows = _raw_rows(raw, frame, file).filter(bad)
    frame = frame.filter(~bad).with_columns(pl.when("no_event").then(pl.lit(file.default_event)).otherwise(EVENT).alias(EVENT))
    weightless = frame[EVENT].is_in(rules.no_weight)
    _count(report["quarantine"], bad_rows["reason"])
    _count(report["dropped"], frame.filter(weightless)[EVENT])
    _count(report["forms"], frame["form"])
    if EVENT in raw.columns and frame["no_event"].any():
        report["imputed"][EVENT] += int(frame["no_event"].sum())
    good = frame.filter(~weightless).with_columns(pl.col(VALUE).fill_null(float("nan"))).select(CLEAN_SCHEMA.names)
    return good.to_arrow().cast(CLEAN_SCHEMA), bad_rows


def _checks(rules: RowRules) -> list[tuple[pl.Expr, str]]:
    checks = [
        (pl.col(USER_ID).is_null(), "null user_id"),
        (pl.col(USER_ID).str.strip_chars() == "", "empty user_id"),
        (pl.col(ITEM_ID).is_null(), "null item_id"),
        (pl.col(ITEM_ID).str.strip_chars() == "", "empty item_id"),
        (~pl.col("has_time"), "null timestamp"),
        (pl.col(TIME).is_null(), "unreadable timestamp"),
    ]
    if not rules.ordinal:
        checks.append((~pl.col(TIME).is_between(rules.first_us, rules.last_us), "implausible timestamp"))
    return [*checks, (pl.col("has_value") & (pl.col(VALUE).is_null() | ~pl.col(VALUE).is_finite()), "value is not a finite number")]


def ids(column: pl.Series) -> pl.Series:
    """Ids as text. Floats come from whole numbers with gaps (pandas): 7.0 is "7", 7.5 and NaN are null."""
    if column.dtype.is_float():
        whole = column.is_finite() & (column == column.round(0))
        return column.set(~whole.fill_null(False), None).cast(pl.Int64, strict=False).cast(pl.String)
    return column.cast(pl.String)


def numbers(column: pl.Series) -> pl.Series:
    """Values as float32, null where they are no number."""
    if column.dtype in (pl.String, pl.Null) or isinstance(column.dtype, pl.Categorical):
        column = column.cast(pl.String).str.strip_chars()
    return column.cast(pl.Float64, strict=False).cast(pl.Float32, strict=False)


def _is_nan(column: pl.Series) -> pl.Series:
    return column.is_nan().fill_null(False) if column.dtype.is_float() else pl.Series([False] * len(column), dtype=pl.Boolean)


def _raw_rows(raw: pl.DataFrame, frame: pl.DataFrame, file: SourceFile) -> pl.DataFrame:
    columns = [
        (raw[name].cast(pl.String, strict=False) if name in raw.columns else pl.lit(None, pl.String)).alias(name)
        for name in USED_COLUMNS[:5]
    ]
    row = (frame[SOURCE] - (file.rank << ROW_BITS)).alias("row")
    return raw.select(pl.lit(file.name).alias("file"), row, frame["reason"], *columns, pl.lit(None, pl.String).alias("line"))


def _quarantine(bad: pl.DataFrame, chunk: Chunk, row: int, rules: RowRules) -> None:
    if len(bad):
        name = f"interactions-{chunk.file.rank:06d}-{row:012d}.parquet"
        storage.write_table(storage.join(rules.work, QUARANTINE, name), bad.to_arrow())


def _count(counter: Counter, column: pl.Series) -> None:
    for name, count in column.drop_nulls().value_counts().iter_rows():
        counter[name] += count


def read_reports(work: str) -> dict:
    """Sum the reports of all chunks.

    Raises:
        SchemaError: a chunk could not be read.
    """
    total: dict = {"rows": 0, "quarantine": Counter(), "dropped": Counter(), "forms": Counter(), "imputed": Counter()}
    folder = storage.join(work, REPORTS)
    for name in storage.list_dir(folder):
        report = storage.read_json(storage.join(folder, name))
        if report["error"]:
            raise SchemaError(report["error"])
        for key, value in total.items():
            if key == "rows":
                total["rows"] += report["rows"]
            else:
                value.update(report[key])
    return total
