"""The HTML report of a sweep: learning curves, parallel coordinates, importance of the settings; one self-contained file."""

import html
import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from sklearn.ensemble import RandomForestRegressor

from raysys import storage
from raysys.evaluate.plots import FINAL, GRID, MUTED, SOURCES, svg_base64
from raysys.evaluate.report import CSS

MIN_TRIALS = 5
"""Finished trials below which an importance would be a guess."""


def importance(trials: list[dict], search: dict[str, dict]) -> dict[str, float] | None:
    """Share of each setting in what a random forest explains of the best NDCG@10; None with fewer than MIN_TRIALS.

    It says what mattered in this space and these trials; a trial stopped early
    counts with the figure it had.
    """
    if len(trials) < MIN_TRIALS:
        return None
    columns = np.array([[_position(trial["settings"][name], domain) for name, domain in search.items()] for trial in trials])
    forest = RandomForestRegressor(200, random_state=0).fit(columns, [trial["best"] for trial in trials])
    return {name: round(float(share), 4) for name, share in zip(search, forest.feature_importances_, strict=True)}


def _position(value: Any, domain: dict) -> float:
    """Place of a value on its axis: 0 to 1 inside the domain."""
    kind, bounds = next(iter(domain.items()))
    if kind == "choice":
        return bounds.index(value) / max(1, len(bounds) - 1) if value in bounds else 1.1
    low, high = bounds
    if kind == "loguniform":
        low, high, value = (math.log(max(number, 1e-30)) for number in (low, high, value))
    return float(np.clip((value - low) / (high - low), -0.1, 1.1))


def write_report(report: dict, path: str) -> None:
    """Write the report of one sweep.

    Args:
        report: what stands in `trials.json`.
        path: HTML file, path or URI.
    """
    storage.write_bytes(path, render(report).encode())


def render(report: dict) -> str:
    """The report as an HTML document."""
    trials, sweep = report["trials"], report["tune"]
    best = next(trial for trial in trials if trial["trial"] == report["best"])
    tiles = [("best NDCG@10, validation", f"{best['best']:.4f}"), ("trials", f"{len(trials)}")]
    tiles.append(("stopped early", str(sum(trial["stopped"] is not None for trial in trials))))
    tiles.append(("failed", str(sum(trial["error"] is not None for trial in trials))))
    plots = [(_parallel, "Settings of each trial, one line a trial, from its settings to what it reached; the darker the better.")]
    plots.append((_curves, "Validation figure of each trial by epoch."))
    if report["importance"]:
        plots.insert(1, (_importance, "Share of each setting in what a random forest explains of the figure, over these trials."))
    figures = "".join(
        f"<figure><img alt='{text}' src='data:image/svg+xml;base64,{svg_base64(plot, report)}'><figcaption>{text}</figcaption></figure>"
        for plot, text in plots
    )
    shown = "".join(f"<div class='tile'><b>{value}</b><span>{html.escape(name)}</span></div>" for name, value in tiles)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Sweep of {len(trials)} trials</title><style>{CSS}</style></head><body><main>
<h1>Sweep</h1>
<p class="sub">{html.escape(report["metric"])} &middot; {html.escape(sweep["algorithm"])} search
&middot; scheduler {html.escape(sweep["scheduler"])}</p>
<div class="tiles">{shown}</div>{_comparison(report.get("comparison"))}
<section><div class="plots">{figures}</div></section>
<section><h2>Trials</h2><div class="scroll">{_table(report)}</div></section>
</main></body></html>
"""


def _comparison(comparison: dict | None) -> str:
    if comparison is None:
        return ""
    low, high = comparison["difference_interval"]
    return (
        f"<section><h2>Winner against the settings given</h2><p>NDCG@10 on the {html.escape(comparison['split'])} part, whole pipeline: "
        f"{comparison['winner']:.4f} against {comparison['default']:.4f}; difference {comparison['difference']:+.4f} "
        f"(95% interval {low:+.4f} to {high:+.4f}, paired, {comparison['users']:,} users).</p></section>"
    )


def _table(report: dict) -> str:
    names = list(report["search"])
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["trial", *names, "NDCG@10", "epochs", "seconds", ""])
    rows = []
    for trial in sorted(report["trials"], key=lambda trial: -(trial["best"] or 0)):
        cells = [str(trial["trial"]), *(str(trial["settings"].get(name, "")) for name in names)]
        figure = "-" if trial["best"] is None else f"{trial['best']:.4f}"
        cells += [figure, str(trial["epochs"]), f"{trial['seconds']:.0f}", trial["error"] or trial["stopped"] or ""]
        style = " class='final'" if trial["trial"] == report["best"] else ""
        rows.append(f"<tr{style}>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _parallel(axes: Axes, report: dict) -> None:
    search = report["search"]
    trials = sorted((trial for trial in report["trials"] if trial["best"] is not None), key=lambda trial: trial["best"])
    low, high = trials[0]["best"], trials[-1]["best"]
    for trial in trials:
        reached = (trial["best"] - low) / (high - low) if high > low else 1.0
        heights = [*(_position(trial["settings"][name], domain) for name, domain in search.items()), reached]
        first = trial["trial"] == report["best"]
        axes.plot(
            heights, color=SOURCES[0] if first else FINAL, alpha=1.0 if first else 0.15 + 0.7 * reached, linewidth=2.2 if first else 1.2
        )
    for place, domain in enumerate(search.values()):
        bounds = next(iter(domain.values()))
        axes.text(place, -0.06, f"{bounds[0]}", ha="center", va="top", fontsize=7, color=MUTED)
        axes.text(place, 1.06, f"{bounds[-1]}", ha="center", fontsize=7, color=MUTED)
    axes.text(len(search), -0.06, f"{low:.4f}", ha="center", va="top", fontsize=7, color=MUTED)
    axes.text(len(search), 1.06, f"{high:.4f}", ha="center", fontsize=7, color=MUTED)
    axes.set_xticks(range(len(search) + 1), [*(name.split(".")[-1] for name in search), "ndcg@10"], fontsize=7)
    axes.set_yticks([])
    axes.set_ylim(-0.2, 1.2)
    axes.grid(True, axis="x", color=GRID)
    axes.set_title("Parallel coordinates", loc="left", fontweight="bold")


def _importance(axes: Axes, report: dict) -> None:
    shares = sorted(report["importance"].items(), key=lambda pair: pair[1])
    axes.barh([name for name, _ in shares], [share for _, share in shares], color=FINAL, height=0.62)
    axes.grid(False, axis="y")
    axes.set_title("Importance of the settings", loc="left", fontweight="bold")


def _curves(axes: Axes, report: dict) -> None:
    for trial in report["trials"]:
        figures = trial["ndcg@10"]
        if figures:
            best = trial["trial"] == report["best"]
            epochs = np.linspace(trial["epochs"] / len(figures), trial["epochs"], len(figures))
            axes.plot(epochs, figures, color=SOURCES[0] if best else FINAL, alpha=1.0 if best else 0.35, linewidth=2.0 if best else 1.0)
    axes.set_xlabel("epoch")
    axes.set_title("Validation NDCG@10", loc="left", fontweight="bold")
