"""One dated page with plots from the JSON that the benchmarks of this folder left.

    .venv/bin/python benchmarks/scale/report.py runs/scale --hardware 2-cores

Reads every *.json of the folder (shape: README.md here), writes HARDWARE_DATE.md and its plots beside this file.
"""

import argparse
import io
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from raysys import storage
from raysys.errors import RaysysError, SchemaError

SIZES = ("events", "users", "items", "workers")
COSTS = {"seconds": "seconds", "peak_bytes": "peak memory, bytes", "per_second": "a second"}
KEYS = {"name": str, "rows": list, "figures": dict, "bars": list}
BAR_KEYS = {"what", "bar", "measured", "met"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where the benchmarks left their JSON")
    parser.add_argument("--hardware", required=True, help="short name of the machine, part of the file's name, such as 2-cores")
    parser.add_argument("--out", default=str(Path(__file__).parent), help="folder of the report")
    parser.add_argument("--title", default="Scale")
    arguments = parser.parse_args()
    try:
        date = datetime.now(UTC).date().isoformat()
        page = write_report(arguments.folder, arguments.out, hardware=arguments.hardware, date=date, title=arguments.title)
    except RaysysError as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    print(page)
    return 0


def write_report(folder: str, out: str, *, hardware: str, date: str, title: str = "Scale") -> str:
    """Gather, plot, write; returns the path of the page.

    Raises:
        SchemaError: there is nothing to gather, or a file has another shape.
    """
    results = [read_result(storage.join(folder, name)) for name in storage.list_dir(folder) if name.endswith(".json")]
    if not results:
        raise SchemaError(f"{folder}: expected the JSON of at least one benchmark, found none; run benchmarks/scale/NAME.py --out {folder}")
    stem = f"{hardware}_{date}"
    sections = [section(result, plots_of(result, out, stem)) for result in results]
    bars = [(result["name"], bar) for result in results for bar in result["bars"]]
    met = sum(bar["met"] is True for _, bar in bars)
    head = [
        f"# {title}, {hardware}, {date}",
        "",
        f"Gathered by `benchmarks/scale/report.py` at commit {commit()} on {platform.machine()}, Python {platform.python_version()}.",
        f"{met} of {len(bars)} bars met, {sum(bar['met'] is False for _, bar in bars)} missed, "
        f"{sum(bar['met'] is None for _, bar in bars)} not judged.",
        "",
        table([{"benchmark": name, **{key: bar[key] for key in ("what", "bar", "measured", "met")}} for name, bar in bars]),
    ]
    page = storage.join(out, f"{stem}.md")
    storage.write_bytes(page, "\n".join([*head, *sections, ""]).encode())
    return page


def read_result(uri: str) -> dict:
    """One benchmark's JSON, checked.

    Raises:
        SchemaError: naming file, key, what was expected and what was found.
    """
    result = storage.read_json(uri)
    for key, kind in KEYS.items():
        if not isinstance(result.get(key), kind):
            found = type(result[key]).__name__ if key in result else "nothing"
            raise SchemaError(f"{uri}: {key}: expected a {kind.__name__}, found {found}; see benchmarks/scale/README.md")
    for index, bar in enumerate(result["bars"]):
        if missing := BAR_KEYS - set(bar):
            raise SchemaError(f"{uri}: bars[{index}]: expected {', '.join(sorted(BAR_KEYS))}, found no {', '.join(sorted(missing))}")
    return result


def section(result: dict, plots: list[str]) -> str:
    """Heading, settings, plots, derived figures, rows."""
    about = ", ".join(f"{name} {value}" for name, value in result.get("about", {}).items())
    parts = [f"\n## {result['name']}", about, *(f"![{result['name']}]({name})" for name in plots)]
    if result["figures"]:
        parts.append(table([{"figure": name, "value": value} for name, value in result["figures"].items()]))
    return "\n\n".join(part for part in [*parts, table(result["rows"])] if part)


def plots_of(result: dict, out: str, stem: str) -> list[str]:
    """Draw each cost against each size that varies within a series; returns the names of the pictures."""
    names = []
    for cost, label in COSTS.items():
        curves = curves_of(result["rows"], cost)
        for size in SIZES:
            lines = {series: points for (series, varied), points in curves.items() if varied == size}
            if not lines:
                continue
            figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
            for series, points in lines.items():
                axes.plot(*zip(*points), marker="o", label=series)
            axes.set(xscale="log", yscale="log", xlabel=size, ylabel=label, title=result["name"])
            axes.grid(True, which="both", alpha=0.3)
            axes.legend()
            names.append(f"{stem}_{result['name']}_{cost}_{size}.png")
            picture = io.BytesIO()
            figure.savefig(picture, dpi=110)
            storage.write_bytes(storage.join(out, names[-1]), picture.getvalue())
            plt.close(figure)
    return names


def curves_of(rows: list[dict], cost: str) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(series, the first size that varies in it) -> points, sorted; a series with one size gives no curve."""
    curves = {}
    for series in dict.fromkeys(str(row.get("series", "")) for row in rows):
        own = [row for row in rows if str(row.get("series", "")) == series and is_positive(row.get(cost))]
        size = next((name for name in SIZES if len({row[name] for row in own if is_positive(row.get(name))}) > 1), None)
        if size is not None:
            curves[series, size] = sorted((row[size], row[cost]) for row in own if is_positive(row.get(size)))
    return curves


def is_positive(value: object) -> bool:
    """A number that a logarithmic axis can show."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def table(rows: list[dict]) -> str:
    """Markdown, a column a key in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return ""
    lines = [columns, ["---"] * len(columns), *([shown(row.get(column, "")) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: object) -> str:
    """A cell."""
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "**no**", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def commit() -> str:
    """Short hash of HEAD; "unknown" outside a checkout."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
