"""The HTML report of an evaluation: one self-contained file, tables and plots, no script, nothing fetched.

Knows the dict that `evaluate` returns and nothing else; a part that is null
there is left out here.
"""

import html

from raysys import storage
from raysys.evaluate.plots import (
    Plot,
    cut_off,
    has_intervals,
    plot_popularity,
    plot_recall,
    plot_reliability,
    plot_stages,
    stages,
    svg_base64,
)

CSS = """
:root { color-scheme: light; }
body { margin: 0; background: #f4f6f8; color: #1c2733;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 48px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 0 0 12px; }
.sub, .note, figcaption { color: #66727f; } .sub { margin: 0 0 20px; } .note { font-size: 13px; margin: 10px 0 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-bottom: 20px; }
.tile, section { background: #fff; border: 1px solid #e4e8ec; border-radius: 8px; }
.tile { padding: 12px 16px; } .tile b { display: block; font-size: 24px; font-weight: 600; } .tile span { font-size: 13px; color: #66727f; }
section { padding: 20px; margin-bottom: 20px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid #e4e8ec; white-space: nowrap; }
th { font-size: 13px; color: #66727f; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
td small { display: block; color: #66727f; font-size: 11px; line-height: 1.2; }
tr.final td { background: #e9f2fa; font-weight: 600; } tr.final small { font-weight: 400; } tr.retrieval td { background: #eaf6f5; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(430px, 1fr)); gap: 20px; }
figure { margin: 0; } figure img { width: 100%; height: auto; display: block; } figcaption { font-size: 13px; margin-top: 6px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 0; font-size: 14px; }
dt { color: #66727f; } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 520px) { .plots { grid-template-columns: 1fr; } }
"""


def write_report(metrics: dict, path: str) -> None:
    """Write the report of one evaluation.

    Args:
        metrics: what `evaluate` returned (or its JSON read back).
        path: HTML file, path or URI.
    """
    storage.write_bytes(path, render(metrics).encode())


def render(metrics: dict) -> str:
    """The report as an HTML document."""
    model, data = metrics["model"], metrics["data"]
    masked = "items already seen removed" if metrics["masked"] else "items already seen left in"
    tiles = "".join(f"<div class='tile'><b>{value}</b><span>{html.escape(name)}</span></div>" for name, value in _tiles(metrics))
    figures = "".join(_figure(plot, metrics, caption) for plot, caption in _plots(metrics))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation of {html.escape(model["version"])}</title><style>{CSS}</style></head><body><main>
<h1>Evaluation</h1>
<p class="sub">{html.escape(model["version"])} &middot; {html.escape(metrics["split"])} part of a {html.escape(data["split"])} split
&middot; {metrics["targets"]:,} targets of {metrics["users"]:,} users among {metrics["items"]:,} items, {masked}</p>
<div class="tiles">{tiles}</div>
<section><h2>Stages</h2><div class="scroll">{_stage_table(metrics)}</div>{_gain_note(metrics)}</section>
<section><div class="plots">{figures}</div></section>
<section><h2>Ranker</h2>{_ranker_figures(metrics["ranker"])}</section>
<section><h2>About this run</h2>{_definitions(_provenance(metrics))}</section>
</main></body></html>
"""


def _plots(metrics: dict) -> list[tuple[Plot, str]]:
    intervals = "; lines: 95% bootstrap intervals over users" if has_intervals(metrics) else ""
    plots: list[tuple[Plot, str]] = [
        (plot_stages, f"NDCG@{cut_off(metrics)} of each stage alone{intervals}."),
        (plot_recall, f"Targets within the first k. The fused line bounds what ranking {metrics['num_candidates']} candidates can reach."),
        (plot_popularity, "Where in the catalogue the recommendations lie, beside what users really took."),
    ]
    if metrics["ranker"]["auc"] is not None:
        caption = f"Predicted probability against observed frequency, bins of equal mass. Label: {metrics['ranker']['label']}."
        plots.insert(2, (plot_reliability, caption))
    return plots


def _figure(plot: Plot, metrics: dict, caption: str) -> str:
    text = html.escape(caption)
    source = f"data:image/svg+xml;base64,{svg_base64(plot, metrics)}"
    return f"<figure><img alt='{text}' src='{source}'><figcaption>{text}</figcaption></figure>"


def _definitions(rows: list[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>' for name, value in rows)}</dl>"


def _tiles(metrics: dict) -> list[tuple[str, str]]:
    cut, deepest = cut_off(metrics), max(metrics["k"])
    tiles = [
        (f"NDCG@{cut}, final", f"{metrics['final'][f'ndcg@{cut}']:.4f}"),
        (f"Recall@{cut}, final", f"{metrics['final'][f'recall@{cut}']:.4f}"),
        (f"Recall@{deepest}, candidates", f"{metrics['retrieval'][f'recall@{deepest}']:.3f}"),
    ]
    if metrics["ranker"]["auc"] is not None:
        tiles.append(("AUC, ranker", f"{metrics['ranker']['auc']:.3f}"))
    tiles.append((f"Coverage of top-{metrics['list_k']} lists", f"{metrics['coverage']:.1%}"))
    return tiles


def _stage_table(metrics: dict) -> str:
    ks = [k for k in (5, 10) if k in metrics["k"]] or metrics["k"][:2]
    deepest = max(metrics["k"])
    columns = [(f"NDCG@{k}", f"ndcg@{k}") for k in ks] + [(f"Recall@{k}", f"recall@{k}") for k in ks]
    columns += [(f"MRR@{cut_off(metrics)}", f"mrr@{cut_off(metrics)}"), (f"Recall@{deepest}", f"recall@{deepest}")]
    head = "".join(f"<th>{title}</th>" for title, _ in columns)
    rows = []
    for key, title, figures, _ in stages(metrics):
        name = html.escape(title)
        if "fusion_weight" in figures:
            weight = figures["fusion_weight"]
            name += f"<small>weight in fusion {weight:.2g}</small>" if weight else "<small>not in use</small>"
        rows.append(f"<tr class='{html.escape(key)}'><td>{name}</td>{''.join(_cell(figures, column) for _, column in columns)}</tr>")
        unmasked = metrics["unmasked"].get(key)
        if key == "final" and unmasked:
            cells = "".join(_cell(unmasked, column) for _, column in columns)
            rows.append(f"<tr><td>final ranking, unmasked<small>seen items left in</small></td>{cells}</tr>")
    return f"<table><thead><tr><th>Stage</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cell(figures: dict, name: str) -> str:
    interval = figures.get(f"{name}_interval")
    small = f"<small>{interval[0]:.4f}&ndash;{interval[1]:.4f}</small>" if interval else ""
    return f"<td>{figures[name]:.4f}{small}</td>"


def _gain_note(metrics: dict) -> str:
    name = f"ndcg@{cut_off(metrics)}"
    gain, interval = metrics["final_minus_retrieval"][name], metrics["final_minus_retrieval"].get(f"{name}_interval")
    if metrics["ranker_weight"] == 0:
        return "<p class='note'>The ranker gives probabilities only: validation gave it no weight in the order, so final equals fused.</p>"
    between = f" (95% interval {interval[0]:+.4f} to {interval[1]:+.4f}, paired)" if interval else ""
    return f"<p class='note'>Ranking changes NDCG@{cut_off(metrics)} of fused retrieval by {gain:+.4f}{between}.</p>"


def _ranker_figures(ranker: dict) -> str:
    if ranker["auc"] is None:
        return "<p class='note'>No calibrated probabilities in this bundle.</p>"
    return _definitions(
        [
            ("AUC", f"{ranker['auc']:.4f}"),
            ("log-loss", f"{ranker['logloss']:.4f} nats (the base rate alone: {ranker['logloss_of_base_rate']:.4f})"),
            ("calibration error", f"{ranker['ece']:.4f}"),
            ("label", ranker["label"]),
            ("negatives", ranker["negatives"]),
            ("examples", f"{ranker['examples']:,}, {ranker['base_rate']:.2%} positive"),
        ]
    )


def _provenance(metrics: dict) -> list[tuple[str, str]]:
    bias = metrics["popularity_bias"]
    return [
        ("bundle", f"{metrics['model']['version']}, fitted on {metrics['model']['fit']}"),
        ("data fingerprint", f"{metrics['data']['fingerprint'][:12]}; the bundle was trained on {str(metrics['model']['data'])[:12]}"),
        ("targets seen before", f"{metrics['repeated_targets']:,} (misses when masked)"),
        ("targets unknown to the catalogue", f"{metrics['unknown_targets']:,} (misses)"),
        ("queries without history", f"{metrics['empty_histories']:,}"),
        ("novelty", f"{metrics['novelty']:.2f} bits an item"),
        (
            "popularity percentile",
            f"{bias['mean_percentile']:.3f} of recommended, {_optional(bias['mean_percentile_of_targets'])} of taken items",
        ),
        ("Gini of exposure", f"{bias['gini']:.3f}"),
        ("seed, bootstrap, time", f"{metrics['seed']}, {metrics['bootstrap']:,} resamples, {metrics['seconds']:.0f} s"),
    ]


def _optional(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
