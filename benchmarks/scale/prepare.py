"""`raysys prepare` on synthetic events (Zipf items, ten files, one user with 1% of all events), beside one process of Polars.

    python benchmarks/scale/prepare.py --data FOLDER --out FOLDER [--events 2000000 6000000 20000000 100000000] [--repeats 3]

Data are generated once under --data. At each size raysys and Polars (up to --polars-max) run in turn and must write the same content;
medians of --repeats runs. Writes prepare.json to --out (plots: report.py). Wall time is that of the whole command, Ray's
start included. Memory: see _memory.py. Bars: 3x Polars' wall time at 20M events, 4 GB at every size, exponent of time against events 1.1.
"""

import argparse
import dataclasses
import shutil
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))
from _memory import measured  # noqa: E402

from raysys import storage  # noqa: E402
from raysys.prepare.dataset import SEQUENCE_SCHEMA, Prepared  # noqa: E402
from raysys.prepare.fingerprint import content_sums  # noqa: E402

GB = 1e9
BAR_EVENTS = 20_000_000
IDLE = "import time\nfrom raysys import cluster\nwith cluster.connected():\n    time.sleep(6)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder for the generated events, kept for the next run")
    parser.add_argument("--out", required=True, help="folder for prepare.json; prepared sets are removed again")
    parser.add_argument("--events", type=int, nargs="+", default=[20_000_000])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--polars-max", type=int, default=20_000_000, help="largest size that Polars gets")
    arguments = parser.parse_args()
    out = Path(arguments.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    idle = measured([sys.executable, "-c", IDLE], log=str(out / "idle.log"))
    print(f"idle Ray: {idle.peak_bytes / GB:.2f} GB")
    sizes = [run_size(events, arguments, out) for events in sorted(arguments.events)]
    report = {"idle_ray": dataclasses.asdict(idle), "sizes": sizes, "exponent": exponent(sizes)}
    storage.write_json(str(out / "prepare.json"), as_told(report))
    print_report(report)


def run_size(events: int, arguments: argparse.Namespace, out: Path) -> dict:
    """Both sides in turn on one size; the content must be the same."""
    data = generate(events, arguments.items, Path(arguments.data).absolute())
    runs: dict[str, list[dict]] = {"raysys": [], "polars": []}
    stages: list = []
    for number in range(arguments.repeats):
        contents = {}
        for name in ("raysys", "polars") if events <= arguments.polars_max else ("raysys",):
            target = out / f"{name}-{events}"
            shutil.rmtree(target, ignore_errors=True)
            command = {
                "raysys": [sys.executable, "-m", "raysys.cli", "prepare", "--data", str(data), "--out", str(target)],
                "polars": [sys.executable, str(Path(__file__).with_name("_polars_prepare.py")), str(data), str(target)],
            }[name]
            usage = measured(command, log=str(out / f"{name}.log"))
            runs[name].append(dataclasses.asdict(usage))
            print(f"{events:>12,} events  {name:<7} {usage.seconds:7.1f} s  {usage.peak_bytes / GB:5.2f} GB", flush=True)
            if number == 0:
                contents[name] = content(target)
            if name == "raysys":
                stages.append(Prepared.open(str(target)).manifest["stages"])
            shutil.rmtree(target)
        if len(contents) == 2 and contents["raysys"] != contents["polars"]:
            raise SystemExit(f"{events} events: raysys and Polars wrote different content: {contents}")
    result: dict = {"events": events, "data_bytes": sum(file.stat().st_size for file in data.rglob("*.parquet")), "stages": stages}
    for name, usages in runs.items():
        if usages:
            result[name] = {"seconds": statistics.median(usage["seconds"] for usage in usages), "runs": usages}
            result[name]["peak_bytes"] = max(usage["peak_bytes"] for usage in usages)
    if runs["polars"]:
        result["same_content"] = True
        result["ratio"] = result["raysys"]["seconds"] / result["polars"]["seconds"]
    return result


def generate(events: int, items: int, folder: Path) -> Path:
    """The data folder of one size; made when it is not there."""
    data = folder / f"events-{events}-items-{items}"
    if not data.exists():
        command = [sys.executable, "-m", "raysys.cli", "import", "synthetic", "--out", str(data), "--events", str(events)]
        command += ["--users", str(max(1, events // 40)), "--items", str(items), "--files", "10", "--heavy-user", "0.01"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return data


def content(folder: Path) -> dict:
    """Sums over all events and the ids in row order, shard by shard."""
    sums = [0, 0]
    for file in sorted((folder / "sequences").glob("*.parquet")):
        reader = pq.ParquetFile(file)
        for group in range(reader.num_row_groups):
            table = reader.read_row_group(group).select(SEQUENCE_SCHEMA.names).cast(SEQUENCE_SCHEMA)
            sums = [(old + new) % 2**64 for old, new in zip(sums, content_sums(table), strict=True)]
    items = pq.read_table(folder / "items.parquet", columns=["item_id", "num_train"]).to_pydict()
    users = pq.read_table(folder / "users.parquet", columns=["user_id"]).to_pydict()
    return {"sums": sums, "items": hash(tuple(zip(*items.values(), strict=True))), "users": hash(tuple(users["user_id"]))}


def exponent(sizes: list[dict]) -> float | None:
    """Slope of log(time) against log(events), by least squares; None for one size."""
    if len(sizes) < 2:
        return None
    logs = np.log([[size["events"], size["raysys"]["seconds"]] for size in sizes])
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def as_told(report: dict) -> dict:
    """The measurements in the shape of benchmarks/scale/README.md."""
    rows = [
        {
            "series": name,
            "events": size["events"],
            "seconds": size[name]["seconds"],
            "peak_bytes": size[name]["peak_bytes"],
            "spilled_bytes": max(run["spilled_bytes"] for run in size[name]["runs"]),
            "runs": len(size[name]["runs"]),
        }
        for size in report["sizes"]
        for name in ("raysys", "polars")
        if name in size
    ]
    judged = next((size for size in report["sizes"] if size["events"] == BAR_EVENTS), None)
    ratio = None if judged is None else judged.get("ratio")
    peak = max(size["raysys"]["peak_bytes"] for size in report["sizes"]) / GB
    slope = report["exponent"]
    largest = report["sizes"][-1]["events"]
    return {
        "name": "prepare",
        "rows": rows,
        "figures": {"exponent of time against events": slope, "idle Ray, bytes": report["idle_ray"]["peak_bytes"]},
        "bars": [
            _bar(f"wall time against Polars, {BAR_EVENTS:,} events", "<= 3", ratio, 3.0),
            _bar(f"peak memory up to {largest:,} events, GB", "<= 4", peak, 4.0),
            _bar("exponent of time against events", "<= 1.1", slope, 1.1),
        ],
        "about": {"date": datetime.now(UTC).isoformat(timespec="seconds")},
    }


def _bar(what: str, bar: str, measured: float | None, limit: float) -> dict:
    return {"what": what, "bar": bar, "measured": measured, "met": None if measured is None else measured <= limit}


def print_report(report: dict) -> None:
    print(f"\n{'events':>12} {'raysys':>9} {'Polars':>9} {'ratio':>6} {'memory':>9} {'Polars':>9} {'spilled':>9}")
    for size in report["sizes"]:
        ours, theirs = size["raysys"], size.get("polars")
        cells = [f"{ours['seconds']:.1f}s", "-", "-", f"{ours['peak_bytes'] / GB:.2f}GB", "-"]
        if theirs:
            cells[1:3] = f"{theirs['seconds']:.1f}s", f"{size['ratio']:.2f}"
            cells[4] = f"{theirs['peak_bytes'] / GB:.2f}GB"
        cells.append(f"{max(run['spilled_bytes'] for run in ours['runs']) / GB:.2f}GB")
        print(f"{size['events']:>12,} {cells[0]:>9} {cells[1]:>9} {cells[2]:>6} {cells[3]:>9} {cells[4]:>9} {cells[5]:>9}")
    slope = "-" if report["exponent"] is None else f"{report['exponent']:.2f}"
    print(f"idle Ray {report['idle_ray']['peak_bytes'] / GB:.2f} GB; exponent {slope}")


if __name__ == "__main__":
    main()
