"""The report of benchmarks/scale: what is gathered, what is plotted, what is refused."""

import json
import runpy
from pathlib import Path

import pytest

from raysys.errors import SchemaError

ROOT = Path(__file__).parents[2]
REPORT = runpy.run_path(str(ROOT / "benchmarks" / "scale" / "report.py"))
ROWS = [
    {"series": "ours", "events": 1000, "workers": 2, "seconds": 1.5, "peak_bytes": 10**8},
    {"series": "ours", "events": 10_000, "workers": 2, "seconds": 9.5, "peak_bytes": 2 * 10**8},
    {"series": "theirs", "events": 1000, "workers": 1, "seconds": 0.5},
]
BARS = [
    {"what": "time", "bar": "<= 3", "measured": 3.25, "met": False},
    {"what": "memory", "bar": "<= 4 GB", "measured": 0.2, "met": True},
    {"what": "kills", "bar": "= 20", "measured": None, "met": None},
]


def write(folder: Path, **changes) -> None:
    result = {"name": "prepare", "rows": ROWS, "figures": {"exponent": 0.8}, "bars": BARS, **changes}
    (folder / "prepare.json").write_text(json.dumps(result))


def test_one_page_with_bars_rows_and_plots(tmp_path):
    write(tmp_path)
    page = Path(REPORT["write_report"](str(tmp_path), str(tmp_path / "out"), hardware="toy", date="2026-01-02"))
    text = page.read_text()
    assert page.name == "toy_2026-01-02.md"
    assert "1 of 3 bars met, 1 missed, 1 not judged." in text
    assert "| prepare | time | <= 3 | 3.25 | **no** |" in text
    assert "| ours | 10,000 | 2 | 9.5 | 200,000,000 |" in text and "| exponent | 0.8 |" in text
    pictures = sorted(path.name for path in page.parent.glob("*.png"))
    assert pictures == ["toy_2026-01-02_prepare_peak_bytes_events.png", "toy_2026-01-02_prepare_seconds_events.png"]
    assert all(f"({name})" in text for name in pictures)


def test_another_title_and_a_picture_of_the_benchmark_itself(tmp_path):
    moments = [{"series": "timeline", "s": second, "rps": 777.0} for second in range(3)]
    write(tmp_path, rows=[*ROWS, *moments])
    (tmp_path / "prepare.png").write_bytes(b"a picture")
    page = Path(REPORT["write_report"](str(tmp_path), str(tmp_path / "out"), hardware="toy", date="2026-01-02", title="Serving"))
    text = page.read_text()
    assert text.startswith("# Serving, toy, 2026-01-02\n") and "777" not in text and "| ours | 1,000 |" in text
    assert "(toy_2026-01-02_prepare.png)" in text and (page.parent / "toy_2026-01-02_prepare.png").read_bytes() == b"a picture"


def test_a_curve_needs_two_sizes_and_takes_the_first_that_varies():
    assert REPORT["curves_of"](ROWS, "seconds") == {("ours", "events"): [(1000, 1.5), (10_000, 9.5)]}
    by_workers = [{"series": "a", "events": 5, "workers": number, "seconds": 1.0} for number in (2, 1)]
    assert REPORT["curves_of"](by_workers, "seconds") == {("a", "workers"): [(1, 1.0), (2, 1.0)]}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rows": {}}, "rows: expected a list, found dict"),
        ({"bars": [{"what": "x", "bar": "1", "met": True}]}, r"bars\[0\]: expected bar, measured, met, what, found no measured"),
        ({"name": 3}, "name: expected a str, found int"),
    ],
)
def test_another_shape_is_refused(tmp_path, changes, message):
    write(tmp_path, **changes)
    with pytest.raises(SchemaError, match=message):
        REPORT["write_report"](str(tmp_path), str(tmp_path), hardware="toy", date="2026-01-02")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(SchemaError, match="expected the JSON of at least one benchmark, found none"):
        REPORT["write_report"](str(tmp_path), str(tmp_path), hardware="toy", date="2026-01-02")
