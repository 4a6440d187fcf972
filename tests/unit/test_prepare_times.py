from datetime import UTC, date, datetime

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.prepare.times import parse_times

MOMENT = datetime(2024, 2, 29, 12, 30, 15, tzinfo=UTC)
SECONDS = int(MOMENT.timestamp())
MICROS = SECONDS * 1_000_000


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (SECONDS, "epoch seconds"),
        (SECONDS * 1000, "epoch milliseconds"),
        (SECONDS * 1_000_000, "epoch microseconds"),
        (SECONDS * 1_000_000_000, "epoch nanoseconds"),
        (float(SECONDS), "epoch seconds"),
        (str(SECONDS), "epoch seconds"),
        (f" {SECONDS * 1000} ", "epoch milliseconds"),
        (f"{SECONDS}.0", "epoch seconds"),
        ("2024-02-29T12:30:15Z", "ISO 8601 text"),
        ("2024-02-29 12:30:15", "ISO 8601 text"),
        ("2024-02-29T14:30:15+02:00", "ISO 8601 text"),
        ("2024-02-29T04:00:15-0830", "ISO 8601 text"),
        ("2024-02-29T12:30:15.000000Z", "ISO 8601 text"),
        (MOMENT, "timestamp type"),
        (MOMENT.replace(tzinfo=None), "timestamp type"),
    ],
)
def test_every_form_of_the_same_moment(value, form):
    parsed = parse_times(pl.Series([value]), ordinal=False)
    assert parsed.row(0) == (MICROS, form)


def test_forms_may_be_mixed_row_by_row():
    column = pl.Series([str(SECONDS), "2024-02-29T12:30:15Z", str(SECONDS * 1000), None, "yesterday", ""])
    parsed = parse_times(column, ordinal=False)
    assert parsed["time"].to_list() == [MICROS, MICROS, MICROS, None, None, None]


def test_a_fraction_of_a_second_survives():
    assert parse_times(pl.Series(["2024-02-29T12:30:15.25Z"]), ordinal=False)["time"][0] == MICROS + 250_000
    assert parse_times(pl.Series([SECONDS + 0.5]), ordinal=False)["time"][0] == MICROS + 500_000


def test_dates_are_midnight_utc():
    midnight = int(datetime(2024, 2, 29, tzinfo=UTC).timestamp()) * 1_000_000
    assert parse_times(pl.Series([date(2024, 2, 29)]), ordinal=False)["time"][0] == midnight
    assert parse_times(pl.Series(["2024-02-29"]), ordinal=False)["time"][0] == midnight


@pytest.mark.parametrize(
    "text", ["2024-02-30", "2024-13-01", "2024-01-01T25:00", "29.02.2024", "2024-01-01T10:00:00 nonsense", "nan", "inf"]
)
def test_what_is_no_time_is_null(text):
    assert parse_times(pl.Series([text]), ordinal=False)["time"][0] is None


def test_ordinals_are_whole_numbers_kept_as_they_are():
    parsed = parse_times(pl.Series([0.0, 1.0, 2.5, float("nan"), 7e9]), ordinal=True)
    assert parsed["time"].to_list() == [0, 1, None, None, 7_000_000_000]
    assert parse_times(pl.Series(["3", "x"]), ordinal=True)["time"].to_list() == [3, None]
    assert parse_times(pl.Series([MOMENT]), ordinal=True)["time"].to_list() == [None]


@settings(deadline=None)
@given(st.lists(st.integers(min_value=631_152_000, max_value=4_000_000_000), min_size=1, max_size=20), st.data())
def test_a_value_is_read_alike_whatever_stands_beside_it(seconds, data):
    column = [data.draw(st.sampled_from([value, value * 1000, value * 1_000_000])) for value in seconds]
    together = parse_times(pl.Series(column), ordinal=False)["time"].to_list()
    assert together == [value * 1_000_000 for value in seconds]
    assert together == [parse_times(pl.Series([value]), ordinal=False)["time"][0] for value in column]
