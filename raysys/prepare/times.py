"""Timestamps of any usual form to UTC epoch microseconds, value by value.

The form of a value is told by its type and magnitude alone, never by its
neighbours, so the result cannot depend on block size or file order.
"""

import polars as pl

ISO = r"^\s*(\d{4}-\d{2}-\d{2})(?:[T ](\d{2}:\d{2})(?::(\d{2})(?:[.,](\d{1,9}))?)?)?\s*(Z|z|UTC|[+-]\d{2}:?\d{2})?\s*$"
EPOCH_UNITS = (
    ("epoch seconds", 1e11, 1e6),
    ("epoch milliseconds", 1e14, 1e3),
    ("epoch microseconds", 1e17, 1.0),
    ("epoch nanoseconds", 1e20, 1e-3),
)
"""(name, magnitude below which it holds, microseconds a unit). Seconds below 1e11 reach the year 5138."""
ISO_TEXT, TIMESTAMP_TYPE, ORDINAL = "ISO 8601 text", "timestamp type", "ordinal"


def parse_times(column: pl.Series, *, ordinal: bool) -> pl.DataFrame:
    """Read a column of timestamps.

    Args:
        column: integers, floats, text, dates or datetimes; naive datetimes are UTC.
        ordinal: values are an order only and must be whole numbers.

    Returns:
        `time` int64 (UTC epoch microseconds, or the ordinal; null where unreadable or null) and `form` str,
        how each readable value was written.
    """
    kind = column.dtype
    if isinstance(kind, pl.Datetime) or kind == pl.Date:
        if ordinal:
            return _frame(pl.Series([None] * len(column), dtype=pl.Int64), pl.lit(ORDINAL))
        zoned = isinstance(kind, pl.Datetime) and kind.time_zone is not None
        moments = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None) if zoned else column
        return _frame(moments.cast(pl.Datetime("us")).cast(pl.Int64), pl.lit(TIMESTAMP_TYPE))
    if kind.is_numeric():
        return _numbers(column, ordinal)
    text = column.cast(pl.String).str.strip_chars()
    whole = text.cast(pl.Int64, strict=False)
    numbers = _numbers(text.cast(pl.Float64, strict=False) if whole.null_count() > text.null_count() else whole, ordinal)
    if ordinal or numbers["time"].null_count() == text.null_count():
        return numbers
    iso = _iso(text)
    return pl.DataFrame({"number": numbers["time"], "form": numbers["form"], "iso": iso}).select(
        time=pl.coalesce("number", "iso"), form=pl.when(pl.col("number").is_not_null()).then("form").otherwise(pl.lit(ISO_TEXT))
    )


def _frame(time: pl.Series, form: pl.Expr) -> pl.DataFrame:
    return time.rename("time").to_frame().with_columns(form=form)


def _numbers(column: pl.Series, ordinal: bool) -> pl.DataFrame:
    number, size = pl.col("n"), pl.col("n").abs()
    frame = column.rename("n").to_frame()
    if ordinal:
        whole = pl.when((number == number.round(0)) & (size < 2**62)).then(number).cast(pl.Int64, strict=False)
        return frame.select(time=whole, form=pl.lit(ORDINAL))
    time, form = pl.lit(None, pl.Int64), pl.lit(None, pl.String)
    for name, below, factor in reversed(EPOCH_UNITS):
        # Integers stay integers: microseconds of today need 51 bits, but nanoseconds do not fit a float64 exactly.
        scaled = number * int(factor) if factor >= 1 else number // 1000
        time = pl.when(size < below).then(scaled.cast(pl.Int64, strict=False)).otherwise(time)
        form = pl.when(size < below).then(pl.lit(name)).otherwise(form)
    if column.dtype.is_integer():
        frame = frame.with_columns(pl.col("n").cast(pl.Int64, strict=False))
    return frame.select(time=time, form=form)


def _iso(text: pl.Series) -> pl.Series:
    part = [pl.col("t").str.extract(ISO, group) for group in range(1, 6)]
    day, minute, second, fraction, zone = part
    composed = day + " " + minute.fill_null("00:00") + ":" + second.fill_null("00")
    moment = composed.str.to_datetime("%Y-%m-%d %H:%M:%S", time_unit="us", strict=False).cast(pl.Int64)
    micros = fraction.fill_null("0").str.pad_end(6, "0").str.slice(0, 6).cast(pl.Int64)
    digits = zone.str.replace_all(r"[^0-9]", "")
    minutes = digits.str.slice(0, 2).cast(pl.Int64, strict=False) * 60 + digits.str.slice(2, 2).cast(pl.Int64, strict=False)
    sign = pl.when(zone.str.starts_with("-")).then(-1).otherwise(1)
    shift = pl.when(zone.str.contains(r"^[+-]")).then(minutes * sign * 60_000_000).otherwise(0)
    return text.rename("t").to_frame().select(time=moment + micros - shift)["time"]
