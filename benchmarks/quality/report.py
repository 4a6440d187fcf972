"""One dated page from the JSON that the other benchmarks here left: by stage, peers, published; ranker, cold start, ensemble.

    raysys bench quality/report runs/quality --hardware 2-cores

Writes HARDWARE_DATE.md beside this file, or into --out.
"""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _sections import bar_rows, cold_section, ensemble_section, ranker_section  # noqa: E402
from _sets import SETS  # noqa: E402

from raysys import storage  # noqa: E402
from raysys.errors import RaysysError, SchemaError  # noqa: E402

STAGES = ("final", "retrieval")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where run.py left its JSON")
    parser.add_argument("--hardware", required=True, help="short name of the machine, part of the file's name, such as 2-cores")
    parser.add_argument("--out", default=str(Path(__file__).parent), help="folder of the page")
    arguments = parser.parse_args()
    try:
        print(write_report(arguments.folder, arguments.out, hardware=arguments.hardware, date=datetime.now(UTC).date().isoformat()))
    except RaysysError as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0


def write_report(folder: str, out: str, *, hardware: str, date: str) -> str:
    """Gather and write; returns the path of the page.

    Raises:
        SchemaError: there is nothing to gather.
    """
    results = [storage.read_json(storage.join(folder, name)) for name in storage.list_dir(folder) if name.endswith(".json")]
    if not results:
        raise SchemaError(f"{folder}: expected the JSON of benchmarks/quality, found none; run `raysys bench quality/run` first")
    head = [
        f"# Quality, {hardware}, {date}",
        "",
        "Where nothing else is said: leave-one-out, test part, all items ranked, seen items masked, ties at random.",
        "Settings were chosen on validation.",
        "Published figures were not run here; they are quoted for the same files. `alone` is one retrieval source, `without` the fused",
        "retrieval without it, `any` whether one of the sources in use has the item among its best k.",
        "Intervals: bootstrap over users, 95%, of the first seed.",
    ]
    page = storage.join(out, f"{hardware}_{date}.md")
    peers = {result["data"]: result for result in results if result.get("kind") == "peers"}
    results = [result for result in results if result.get("kind") != "peers"]
    order = {name: index for index, name in enumerate(SETS)}
    kinds = {"ranker": ranker_section, "cold": cold_section, "ensemble": ensemble_section}
    results.sort(key=lambda result: (order.get(result.get("data"), len(order)), result["name"]))
    sections = [
        kinds[result["kind"]](result) if result.get("kind") in kinds else section(result, peers.get(result["data"])) for result in results
    ]
    storage.write_bytes(page, "\n".join([*head, *sections, ""]).encode())
    return page


def section(result: dict, peers: dict | None = None) -> str:
    """Bars, ours by stage, peers trained on the same machine, published."""
    runs, about, comparable = result["runs"], result["about"], result["fit"] == "train"
    seconds = [run["seconds"] for run in runs]
    peaks = [run["peak_bytes"] for run in runs if run["peak_bytes"]]
    lines = [
        "",
        f"## {SETS[result['data']].title}: {result['name']}",
        "",
        f"{len(runs)} seed{'s' if len(runs) > 1 else ''}, settings: {result['config']}, fit: {result['fit']}; "
        f"commit {about['commit']}, {about['date']}. Training {np.mean(seconds) / 60:.1f} minutes a seed"
        + (f", peak memory {max(peaks) / 1e9:.1f} GB." if peaks else "."),
        "",
    ]
    if comparable:
        lines += ["| bar | wanted | measured | met |", "|---|---|---|---|", *bar_rows(result)]
    else:
        lines += [
            "Another protocol: it has learnt from the validation events too, so bars, peers and published figures do not stand beside it."
        ]
    lines += ["", "| who | recall@10 | ndcg@10 | 95% interval of ndcg@10 | recall@200 | weight |", "|---|---|---|---|---|---|"]
    metrics = [run["metrics"] for run in runs]
    rows = [(f"raysys, {stage}", [run[stage] for run in metrics]) for stage in STAGES]
    rows += [("raysys, final, unmasked", [run["unmasked"]["final"] for run in metrics])]
    rows += [(f"alone: {name}", [run["sources"][name] for run in metrics]) for name in metrics[0]["sources"]]
    rows += [(f"without: {name}", [run["left_out"][name] for run in metrics]) for name in common(run["left_out"] for run in metrics)]
    rows += [("any", [run["union"] for run in metrics])]
    lines += [f"| {title} | {' | '.join(cells(figures))} |" for title, figures in rows]
    for row in peers["rows"] if peers and comparable else ():
        low, high = row["ndcg@10_interval"]
        memory = f", {row['peak_bytes'] / 1e9:.1f} GB" if "peak_bytes" in row else ""
        title = f"trained here, {row['seconds'] / 60:.1f} minutes{memory}: {row['series']}"
        lines.append(f"| {title} | {row['recall@10']:.4f} | {row['ndcg@10']:.4f} | {low:.4f} to {high:.4f} | | |")
    published = SETS[result["data"]].published if comparable else {}
    lines += [f"| published: {who} | {shown(recall)} | {shown(ndcg)} | | | |" for who, (recall, ndcg) in published.items()]
    return "\n".join(lines)


def common(parts) -> list[str]:
    """Names that all seeds have, in order."""
    names = [list(part) for part in parts]
    return [name for name in names[0] if all(name in other for other in names)]


def cells(figures: list[dict]) -> list[str]:
    """Means over the seeds."""
    low, high = figures[0].get("ndcg@10_interval", (None, None))
    interval = "" if low is None else f"{low:.4f} to {high:.4f}"
    means = {key: float(np.mean([figure[key] for figure in figures])) for key in ("recall@10", "ndcg@10", "recall@200")}
    weights = [figure["fusion_weight"] for figure in figures if "fusion_weight" in figure]
    weight = f"{np.mean(weights):.2f}" if weights else ""
    return [f"{means['recall@10']:.4f}", f"{means['ndcg@10']:.4f}", interval, f"{means['recall@200']:.4f}", weight]


def shown(value: float | None) -> str:
    """A published figure."""
    return "-" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    sys.exit(main())
