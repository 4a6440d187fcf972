"""The plots of an evaluation report, from the dict that `evaluate` returns."""

import base64
import io
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Plot = Callable[[Axes, dict], None]

INK, MUTED, GRID = "#1c2733", "#66727f", "#e4e8ec"
FINAL, RETRIEVAL = "#0b5fa5", "#12908a"
SOURCES = ("#c8871e", "#a6527c", "#6f7f2d", "#7b68b5", "#8c8c8c", "#b5533c")
"""Distinct in lightness too, so that a grey print still tells them apart."""

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#aeb7c0",
    "axes.labelcolor": MUTED,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "svg.hashsalt": "raysys",
}


def stages(metrics: dict) -> list[tuple[str, str, dict, str]]:
    """(key, title, figures, colour) of each stage: sources by name order of the pipeline, then fused, then final."""
    rows = [(name, name, figures, SOURCES[i % len(SOURCES)]) for i, (name, figures) in enumerate(metrics["sources"].items())]
    return [*rows, ("retrieval", "fused retrieval", metrics["retrieval"], RETRIEVAL), ("final", "final ranking", metrics["final"], FINAL)]


def cut_off(metrics: dict) -> int:
    """The cut-off that headlines use: 10 where it was measured."""
    return 10 if 10 in metrics["k"] else max(metrics["k"])


def has_intervals(metrics: dict) -> bool:
    """Whether bootstrap intervals were computed."""
    return f"ndcg@{cut_off(metrics)}_interval" in metrics["final"]


def svg_base64(plot: Plot, metrics: dict) -> str:
    """One plot as a base64 SVG, the same bytes for the same figures."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 3.5), layout="constrained")
        plot(figure.subplots(), metrics)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return base64.b64encode(buffer.getvalue()).decode()


def plot_stages(axes: Axes, metrics: dict) -> None:
    """NDCG of each stage as bars, the best source nearest to the fused stages."""
    name = f"ndcg@{cut_off(metrics)}"
    *sources, fused, final = stages(metrics)
    rows = [*sorted(sources, key=lambda stage: stage[2][name]), fused, final]
    limit = max(figures.get(f"{name}_interval", [0, figures[name]])[1] for _, _, figures, _ in rows) or 1.0
    for height, (key, _, figures, colour) in enumerate(rows):
        value, interval = figures[name], figures.get(f"{name}_interval")
        axes.barh(height, value, color=colour, height=0.62, alpha=1.0 if key in ("retrieval", "final") else 0.75)
        end = value
        if interval:
            axes.plot(interval, [height, height], color=INK, linewidth=1.2, solid_capstyle="butt")
            axes.plot(interval, [height, height], "|", color=INK, markersize=6)
            end = interval[1]
        axes.text(end + 0.015 * limit, height, f"{value:.4f}", va="center")
    axes.set_yticks(range(len(rows)), [title for _, title, _, _ in rows])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(False, axis="y")
    axes.set_xlim(0, 1.18 * limit)
    axes.set_title(name.upper() + " by stage", loc="left", fontweight="bold")


def plot_recall(axes: Axes, metrics: dict) -> None:
    """Recall at each cut-off, on a logarithmic axis."""
    ks = metrics["k"]
    for key, title, figures, colour in stages(metrics):
        strong = key in ("retrieval", "final")
        values = [figures[f"recall@{k}"] for k in ks]
        axes.plot(
            ks, values, "-" if strong else "--", color=colour, linewidth=2.2 if strong else 1.2, marker="o", markersize=3, label=title
        )
    axes.set_xscale("log")
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("k")
    axes.legend(fontsize=8, loc="upper left", handlelength=2.4)
    axes.set_title("Recall@k", loc="left", fontweight="bold")


def plot_reliability(axes: Axes, metrics: dict) -> None:
    """Predicted against observed frequency; dots in proportion to their examples."""
    curve = metrics["ranker"]["reliability"]
    top = 1.08 * max(*curve["predicted"], *curve["observed"], 1e-6)
    axes.plot([0, top], [0, top], color=MUTED, linewidth=1, linestyle=":", label="perfectly calibrated")
    largest = max(curve["count"])
    sizes = [20 + 60 * count / largest for count in curve["count"]]
    axes.plot(curve["predicted"], curve["observed"], color=FINAL, linewidth=1.5)
    axes.scatter(curve["predicted"], curve["observed"], s=sizes, color=FINAL, zorder=3, label="ranker")
    axes.axhline(metrics["ranker"]["base_rate"], color=SOURCES[0], linewidth=1, linestyle="--", label="base rate")
    axes.set_xlim(0, top)
    axes.set_ylim(0, top)
    axes.set_xlabel("predicted probability")
    axes.set_ylabel("observed frequency")
    axes.legend(fontsize=8, loc="upper left")
    axes.set_title(f"Calibration (error {metrics['ranker']['ece']:.4f})", loc="left", fontweight="bold")


def plot_popularity(axes: Axes, metrics: dict) -> None:
    """Share of recommendations, targets and training events in each tenth of the catalogue."""
    shares = metrics["popularity_bias"]["share_by_tenth"]
    series = (("recommended", FINAL, "recommended"), ("targets", SOURCES[0], "taken by users"), ("training", "#b9c2cb", "training events"))
    for offset, (name, colour, label) in zip((-0.27, 0, 0.27), series, strict=True):
        axes.bar([tenth + offset for tenth in range(10)], [100 * share for share in shares[name]], width=0.26, color=colour, label=label)
    axes.set_xticks(range(10), ["rarest", *[""] * 8, "most popular"])
    axes.tick_params(axis="x", length=0)
    axes.grid(False, axis="x")
    axes.set_xlabel("tenths of the catalogue by popularity")
    axes.set_ylabel("share, %")
    axes.legend(fontsize=8, loc="upper left")
    axes.set_title("Popularity of recommendations", loc="left", fontweight="bold")
