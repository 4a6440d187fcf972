"""`raysys compress`: step after step, each judged on the validation part and kept only where the stated loss is kept.

The original is untouched; the result is a new bundle that says in its manifest
what was done to it, to which version, and what it cost and gained.
"""

from dataclasses import asdict, replace

import numpy as np

from raysys.bundle import Bundle
from raysys.compress.config import CompressConfig
from raysys.compress.distil import distilled
from raysys.compress.judge import Figures, Judge
from raysys.compress.steps import narrowed, pruned, quantized, ranking_fewer, shortened, without_unused, without_weak
from raysys.errors import ConfigError
from raysys.evaluate import metrics
from raysys.prepare.dataset import Prepared

LESS, MORE = 0.98, 1.1
"""A step has to leave at most this share of the bytes, or answer this many times as many requests a second; less is noise."""


def compress(model_uri: str, prepared_uri: str, out: str, settings: CompressConfig, say=print) -> dict:
    """Make a smaller and faster bundle.

    Args:
        model_uri: the original.
        prepared_uri: what it was trained on.
        out: folder of the result.
        settings: see `CompressConfig`.
        say: told what happens.

    Returns:
        JSON-ready: `from`, `version`, `max_loss`, and `steps`, a row each with what it gave and whether it was kept.

    Raises:
        ConfigError: `out` is the original, or the bundle was fitted on the validation part.
    """
    if model_uri.rstrip("/") == out.rstrip("/"):
        raise ConfigError(f"--out: expected another folder than the original bundle, got {out} for both")
    bundle, prepared = Bundle.open(model_uri), Prepared.open(prepared_uri)
    judge = Judge(prepared, bundle, settings.max_queries, settings.seed)
    original = judge.figures(bundle, packing=False)
    rows, packing, last = [_row("original", original, original, kept=True)], False, original
    say(told(rows[0]))
    for step in settings.steps:
        for name, candidate in _candidates(step, bundle, prepared, settings, say):
            found = judge.figures(candidate, packing=packing or step == "quantize")
            kept = _loss(original, found) <= settings.max_loss and _gains(last, found)
            rows.append(_row(name, found, original, kept=kept))
            say(told(rows[-1]))
            if kept:
                bundle, packing, last = candidate, packing or step == "quantize", found
                break
    report = {"from": bundle.version, "max_loss": settings.max_loss, "steps": rows, "settings": asdict(settings)}
    version = replace(bundle, manifest={}).write(out, manifest={**bundle.told, "compression": report}, packing=packing)
    return {**report, "version": version}


def _candidates(step: str, bundle: Bundle, prepared: Prepared, settings: CompressConfig, say):
    """(name, bundle) of what a step may give, the boldest first."""
    if step == "unused":
        yield "unused sources dropped", without_unused(bundle)
    elif step == "weak":
        if (fewer := without_weak(bundle, settings.weak_share)) is not None:
            yield f"weak sources dropped ({', '.join(sorted(set(bundle.models) - set(fewer.models)))})", fewer
    elif step == "distil":
        student = distilled(bundle, prepared, settings, say)
        if student is not None:
            yield f"student of {student.models['interest'].encoder.config.num_layers} layers", student
    elif step == "shorten":
        for share in sorted(settings.lengths):
            if (shorter := shortened(bundle, share)) is not None:
                yield f"the last {shorter.models['interest'].encoder.config.looked_at} events", shorter
    elif step == "narrow":
        for width in sorted(settings.widths):
            if (narrower := narrowed(bundle, width)) is not None:
                yield f"content in {width} dimensions", narrower
    elif step == "prune":
        for most in sorted(settings.neighbours):
            yield f"{most} entries a row", pruned(bundle, most)
    elif step == "few":
        for count in sorted(settings.candidates):
            if (fewer := ranking_fewer(bundle, count)) is not None:
                yield f"{count} candidates ranked", fewer
    else:
        yield "int8", quantized(bundle)


def _loss(original: Figures, found: Figures) -> float:
    """Relative NDCG that is lost; negative where it is gained."""
    before = float(original.ndcg.mean())
    return (before - float(found.ndcg.mean())) / before if before > 0 else 0.0


def _gains(last: Figures, found: Figures) -> bool:
    """Whether a step is worth any loss at all: what it loses, later steps may not."""
    return found.num_bytes < LESS * last.num_bytes or found.per_second > MORE * last.per_second


def _row(name: str, found: Figures, original: Figures, *, kept: bool) -> dict:
    """One line of the table; the interval is of the paired difference, over queries."""
    difference = found.ndcg - original.ndcg
    interval = metrics.mean_with_intervals({"d": difference}, np.arange(len(difference)), resamples=500, seed=0).get("d_interval")
    return {
        "step": name,
        "kept": kept,
        "bytes": found.num_bytes,
        "p50_ms": found.p50_ms,
        "per_second": found.per_second,
        "ndcg@10": float(found.ndcg.mean()),
        "ndcg@10_change": float(difference.mean()),
        "ndcg@10_change_interval": interval,
        "auc": found.auc,
        "smaller": original.num_bytes / found.num_bytes,
        "faster": original.p50_ms / found.p50_ms,
        "more": found.per_second / original.per_second,
    }


def told(row: dict) -> str:
    """A row for people."""
    auc = "" if row["auc"] is None else f", AUC {row['auc']:.4f}"
    return (
        f"{row['step']}: {row['bytes'] / 1e6:.1f} MB ({row['smaller']:.2f}x smaller), "
        f"{row['p50_ms']:.2f} ms ({row['faster']:.2f}x faster), "
        f"{row['per_second']:,.0f}/s in batches ({row['more']:.2f}x), ndcg@10 {row['ndcg@10']:.4f} ({row['ndcg@10_change']:+.4f}){auc}"
        f"{'' if row['kept'] else ': left out'}"
    )


def summary_rows(report: dict) -> list[tuple[str, str]]:
    """The closing table of the command."""
    return [(row["step"], told(row).split(": ", 1)[1]) for row in report["steps"]] + [("version", report["version"])]
