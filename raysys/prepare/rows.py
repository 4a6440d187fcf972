"""Normalise, judge and quarantine rows. Knows batches of rows, not files of the work folder and not Ray.

A bad row never stops the job and never vanishes: it is returned with its reason.
Ids and event names are handled as dictionaries: stripped, checked and refused once
for each distinct text, so that the cost of a row is a look-up.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa

from raysys.prepare.source import USED_COLUMNS, SourceFile
from raysys.prepare.times import parse_times
from raysys.schema import EVENT, EVENT_ID, ITEM_ID, TIMESTAMP, USER_ID, VALUE

TIME = "time"
ID_TYPE = pa.dictionary(pa.int32(), pa.string())
CLEAN_SCHEMA = pa.schema(
    [
        (USER_ID, ID_TYPE),
        (ITEM_ID, ID_TYPE),
        (TIME, pa.int64()),  # UTC epoch microseconds, or an ordinal
        (EVENT, ID_TYPE),
        (VALUE, pa.float32()),  # NaN = none
        (EVENT_ID, pa.string()),  # null = none
    ]
)
"""Good rows in the order of the files. That order, never a column, breaks ties in time."""

COUNTERS = ("quarantine", "dropped", "forms", "imputed")


@dataclass(frozen=True)
class RowRules:
    """What the row checks need to know.

    Attributes:
        ordinal: timestamps are an order only.
        first_us, last_us: plausible range of UTC timestamps.
        no_weight: events that carry no evidence of interest; counted and dropped.
    """

    ordinal: bool
    first_us: int
    last_us: int
    no_weight: tuple[str, ...]


@dataclass(frozen=True)
class Texts:
    """A column of texts: `values[codes[i]]`, null where the code is -1. Values are distinct."""

    codes: np.ndarray
    values: pl.Series

    def flag(self, wrong: pl.Series) -> np.ndarray:
        """(E,) bool: rows whose text has the flag; null texts have not."""
        return np.append(wrong.to_numpy(), False)[self.codes]

    def arrow(self, rows: np.ndarray | slice) -> pa.DictionaryArray:
        """Some rows as an Arrow dictionary; none of them may be null."""
        return pa.DictionaryArray.from_arrays(pa.array(self.codes[rows]), self.values.to_arrow().cast(pa.string()))


def texts(column: pa.ChunkedArray, normalise=lambda values: values) -> Texts:
    """Encode a column of text or numbers.

    Args:
        column: any type that `source.check_type` lets pass for an id.
        normalise: distinct values -> text or null, without change of length.
    """
    if pa.types.is_dictionary(column.type) and column.type.index_type != pa.int32():
        column = column.cast(column.type.value_type)  # narrow indices could overflow where chunks are joined
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    encoded = column.combine_chunks() if column.num_chunks == 1 else column.unify_dictionaries().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):  # a column without rows
        return Texts(np.empty(0, np.int32), pl.Series([], dtype=pl.String))
    codes = encoded.indices.cast(pa.int32()).fill_null(-1).to_numpy()
    raw = normalise(pl.Series(pl.from_arrow(encoded.dictionary)))
    values = raw.drop_nulls().unique(maintain_order=True)
    if len(values) == len(raw):
        return Texts(codes, raw)
    # Two values became one text (" view" and "view"), or one became no text at all.
    merged = pl.DataFrame({"v": raw}).join(pl.DataFrame({"v": values}).with_row_index("c"), on="v", how="left", maintain_order="left")
    return Texts(np.append(merged["c"].cast(pl.Int32).fill_null(-1).to_numpy(), np.int32(-1))[codes], values)


def clean_rows(table: pa.Table, file: SourceFile, first_row: int, rules: RowRules, report: dict) -> tuple[pa.Table, pl.DataFrame]:
    """Normalise and judge a batch of rows.

    Args:
        table: contract columns of the file, raw types.
        file: where they come from.
        first_row: number of the first row, for the quarantine.
        rules: what is plausible and what has weight.
        report: a Counter for each of COUNTERS, added to.

    Returns:
        Good rows (CLEAN_SCHEMA), and bad rows with file, row, reason and their raw text.
    """
    size = table.num_rows
    users, items = texts(table[USER_ID], ids), texts(table[ITEM_ID], ids)
    raw_time = pl.Series(pl.from_arrow(table[TIMESTAMP]))
    times = parse_times(raw_time, ordinal=rules.ordinal)
    time = times["time"].fill_null(0).to_numpy()
    unreadable = times["time"].is_null().to_numpy()
    value, not_a_number = _values(table, size)
    if EVENT in table.column_names:
        events = texts(table[EVENT], _event_names)
        missing = events.codes < 0
    else:
        events, missing = Texts(np.full(size, -1, np.int32), pl.Series([], dtype=pl.String)), np.zeros(size, bool)
    events = _with_default(events, file.default_event)
    checks = [
        (users.codes < 0, "null user_id"),
        (users.flag(users.values.str.strip_chars() == ""), "empty user_id"),
        (items.codes < 0, "null item_id"),
        (items.flag(items.values.str.strip_chars() == ""), "empty item_id"),
        (unreadable & _absent(raw_time), "null timestamp"),
        (unreadable, "unreadable timestamp"),
        (not_a_number, "value is not a finite number"),
    ]
    if not rules.ordinal:
        checks.insert(6, ((time < rules.first_us) | (time > rules.last_us), "implausible timestamp"))
    reason = np.full(size, -1, np.int8)  # the first check that fails
    for number, (broken, _) in reversed(list(enumerate(checks))):
        reason[broken] = number
    good, bad = reason < 0, np.flatnonzero(reason >= 0)
    bad_rows = _bad_rows(table, file, bad, first_row, pl.Series([text for _, text in checks])[reason[bad].astype(np.uint32)])
    _count(report["quarantine"], bad_rows["reason"])
    weightless = events.flag(events.values.is_in(rules.no_weight)) & good
    if weightless.any():
        _count(report["dropped"], events.values[events.codes[weightless]])
    forms = times["form"] if good.all() else times["form"].filter(good)
    _count(report["forms"], forms)
    if (missing & good).any():
        report["imputed"][EVENT] += int((missing & good).sum())
    keep = good & ~weightless
    rows = slice(None) if keep.all() else np.flatnonzero(keep)
    event_ids = _text_ids(table, size).to_arrow().cast(pa.string()).take(pa.array(np.arange(size)[rows]))
    columns = [users.arrow(rows), items.arrow(rows), pa.array(time[rows]), events.arrow(rows), pa.array(value[rows]), event_ids]
    return pa.table(columns, schema=CLEAN_SCHEMA), bad_rows


def _values(table: pa.Table, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Values as float32 (NaN = none), and where one is given that is no finite number."""
    if VALUE not in table.column_names:
        return np.full(size, np.nan, np.float32), np.zeros(size, bool)
    raw = pl.Series(pl.from_arrow(table[VALUE]))
    value = numbers(raw).fill_null(float("nan")).to_numpy()
    return value, ~np.isfinite(value) & ~_absent(raw)


def _text_ids(table: pa.Table, size: int) -> pl.Series:
    given = EVENT_ID in table.column_names and table[EVENT_ID].null_count < size
    return ids(pl.Series(pl.from_arrow(table[EVENT_ID]))) if given else pl.Series([None] * size, dtype=pl.String)


def _event_names(names: pl.Series) -> pl.Series:
    stripped = names.cast(pl.String).str.strip_chars()
    return stripped.set(stripped == "", None)  # the file's default event stands in for an empty name


def _with_default(events: Texts, default: str) -> Texts:
    known = events.values.index_of(default) if len(events.values) else None
    values = events.values if known is not None else events.values.append(pl.Series([default]))
    code = np.int32(len(values) - 1 if known is None else known)
    return Texts(np.where(events.codes < 0, code, events.codes), values)


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


def _absent(column: pl.Series) -> np.ndarray:
    """(E,) bool: null or NaN."""
    absent = column.is_null() | column.is_nan().fill_null(True) if column.dtype.is_float() else column.is_null()
    return absent.to_numpy()


def _bad_rows(table: pa.Table, file: SourceFile, bad: np.ndarray, first_row: int, reasons: pl.Series) -> pl.DataFrame:
    raw = table.take(pa.array(bad))
    columns = {
        name: pl.Series(_text(raw[name])) if name in raw.column_names else pl.Series([None] * len(bad), dtype=pl.String)
        for name in USED_COLUMNS[:5]
    }
    return pl.DataFrame(
        {"file": [file.name] * len(bad), "row": bad.astype(np.int64) + first_row, "reason": reasons.cast(pl.String), **columns},
        schema_overrides={"file": pl.String},
    ).with_columns(line=pl.lit(None, pl.String))


def _text(column: pa.ChunkedArray) -> pl.Series:
    plain = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
    return pl.Series(pl.from_arrow(plain)).cast(pl.String, strict=False)


def _count(counter: Counter, column: pl.Series) -> None:
    for name, count in column.drop_nulls().value_counts().iter_rows():
        counter[name] += count


def ragged_rows(lines: list[dict], file: SourceFile) -> pl.DataFrame:
    """Lines with a wrong number of fields, laid out like other bad rows."""
    frame = pl.DataFrame(lines, schema={"row": pl.Int64, "line": pl.String})
    nothing = [pl.lit(None, pl.String).alias(name) for name in USED_COLUMNS[:5]]
    return frame.select(pl.lit(file.name).alias("file"), "row", pl.lit("wrong number of fields").alias("reason"), *nothing, "line")
