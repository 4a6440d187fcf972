"""The parts of the report that are not a table of stages: the ranker beside its peers, cold start, seeds as a teacher."""

import numpy as np


def bar_rows(result: dict) -> list[str]:
    """What was wanted and what was measured."""
    return [f"| {bar['what']} | {bar['bar']:.4g} | {bar['measured']:.4g} | {'yes' if bar['met'] else '**no**'} |" for bar in result["bars"]]


def ranker_section(result: dict) -> str:
    """Bars, then every model with its intervals of the first seed."""
    runs, about = result["runs"], result["about"]
    first = runs[0]
    lines = [
        "",
        "## MovieLens-100k by time: is the event liked?",
        "",
        f"{len(runs)} seeds; commit {about['commit']}, {about['date']}. 80/10/10 by time, label rating >= 4, history up to the event;",
        f"{first['examples']:,} test events of {first['users']:,} users, {first['base_rate']:.1%} liked. All learn from the same "
        f"{first['learnt']:,} positions with the same",
        f"features (retrieval's scores among them) and are stopped on the same {first['watched']:,}. Intervals: bootstrap over users, 95%,",
        "first seed; `ours less it` over the same resamples.",
        "",
        "| bar | wanted | measured | met |",
        "|---|---|---|---|",
        *bar_rows(result),
        "",
        "| who | AUC | 95% interval | ours less it | log loss | calibration error | by seed |",
        "|---|---|---|---|---|---|---|",
    ]
    for who, figures in first["who"].items():
        mean = {key: np.mean([run["who"][who][key] for run in runs]) for key in ("auc", "logloss", "ece")}
        behind = span(figures["behind_interval"]) if "behind_interval" in figures else ""
        seeds = ", ".join(f"{run['who'][who]['auc']:.4f}" for run in runs)
        cells = [f"{mean['auc']:.4f}", span(figures["auc_interval"]), behind, f"{mean['logloss']:.4f}", f"{mean['ece']:.4f}", seeds]
        lines.append(f"| {who} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cold_section(result: dict) -> str:
    """Hidden items, then users by the number of events known of them."""
    items, users, about = result["items"], result["users"], result["about"]
    lines = [
        "",
        f"## Cold start: {result['name'].removesuffix('-cold')}",
        "",
        f"Seed {result['seed']}; commit {about['commit']}, {about['date']}. {items['hidden']:,} items lost all their events; "
        f"{items['users']:,} users are asked for",
        f"one of them. {users['users']:,} users are asked for their test event after 0, 1, 2, 5 events.",
        "",
        "| question | who | recall@10 | ndcg@10 | 95% interval of ndcg@10 | recall@50 |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| hidden items | {who} | {' | '.join(cold_cells(figures))} |" for who, figures in items["who"].items()]
    for length, found in users["who"].items():
        lines += [f"| {length} events | {who} | {' | '.join(cold_cells(figures))} |" for who, figures in found.items()]
    return "\n".join(lines)


def ensemble_section(result: dict) -> str:
    """Each seed, their mean as a teacher, and the student."""
    about = result["about"]
    lines = [
        "",
        f"## Seeds as a teacher, one student: {result['data']}",
        "",
        f"Seeds {about['seeds']}; commit {about['commit']}, {about['date']}. The encoder alone, and the whole pipeline of "
        "the first seed with that encoder in it.",
        "Differences to the first seed, 95% intervals over users. The student costs what one encoder costs"
        + (f" ({about['student']})." if "student" in about else "."),
        "",
        "| who | encoder recall@10 | ndcg@10 | less the first | final recall@10 | ndcg@10 | less the first |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = []
        for stage in ("encoder", "final"):
            interval = row[f"{stage} less the first, interval"]
            behind = f"{row[f'{stage} less the first']:+.4f}" + (f" ({span(interval)})" if interval else "")
            cells += [f"{row[f'{stage} recall@10']:.4f}", f"{row[f'{stage} ndcg@10']:.4f}", behind]
        lines.append(f"| {row['series']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cold_cells(figures: dict) -> list[str]:
    """Of one row."""
    return [f"{figures['recall@10']:.4f}", f"{figures['ndcg@10']:.4f}", span(figures["ndcg@10_interval"]), f"{figures['recall@50']:.4f}"]


def span(interval: list[float]) -> str:
    """An interval."""
    return f"{interval[0]:.4f} to {interval[1]:.4f}"
