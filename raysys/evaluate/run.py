"""`raysys evaluate`: every stage of a bundle against held-out events, over the whole catalogue.

It runs the code that serves (`pipeline.py`), so the `final` figures are a
statement about live answers; an item that retrieval missed is a miss of the
final ranking too. Histories are what came before the target, nothing else.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from raysys.bundle import Bundle
from raysys.errors import ConfigError, SchemaError
from raysys.evaluate import metrics
from raysys.evaluate.stages import Stages
from raysys.pipeline import Pipeline
from raysys.prepare.dataset import Prepared, Sequences
from raysys.schema import NON_HISTORY_EVENTS, SPLIT_CODES, UNKNOWN_ITEM

KS = (1, 5, 10, 20, 50, 100, 200)
LIST_K = 10
"""Length of the lists that coverage, novelty and popularity bias look at."""
MAX_HISTORY = 10_000
"""Events of a history that are looked at and masked; bounds a batch's memory."""
MAX_BATCH_SCORES = 1 << 23
"""Scores of one source in a batch; a batch takes fewer queries where the catalogue is large."""
MAX_SHOWN = 20_000
"""Impressions and skips of the split that the ranker is measured on, sampled when there are more."""
PROGRESS_S = 5.0


def evaluate(
    prepared_uri: str,
    model_uri: str,
    *,
    split: str = "test",
    mask: bool = True,
    k: Sequence[int] = KS,
    seed: int = 0,
    bootstrap: int = 1000,
    batch_size: int = 256,
    max_users: int | None = None,
) -> dict:
    """Rank the catalogue for every held-out event and measure each stage.

    Each event of the split is one query with one target. A target that the
    catalogue does not know is a miss; so is, when masked, one that the user has
    seen before (both are counted in the result).

    Args:
        prepared_uri: a prepared set with the split.
        model_uri: a bundle; items and event codes are matched by name.
        split: "test" or "valid".
        mask: leave items of the user's history out of the ranking; the unmasked figures then stand in `unmasked`.
        k: cut-offs.
        seed: of tie breaks, the bootstrap and the sample of users.
        bootstrap: resamples of users for the 95% intervals; 0 leaves them out.
        batch_size: queries at once, at most.
        max_users: evaluate a random sample of so many users.

    Returns:
        JSON-ready: final, retrieval, sources {NAME: ...}, baselines, each `{"ndcg@10", "ndcg@10_interval", ...}`; unmasked;
        left_out {NAME: fused retrieval without that source}; union, the best rank that any source of the mixture gives the target (so its
        recall@200 is that of the candidates of all of them together, more than 200 items);
        ranker {auc, logloss, ece, label, negatives, ...}; coverage, novelty, popularity_bias; counts and provenance.

    Raises:
        SchemaError: no events in this split, or the bundle knows none of its items.
        ConfigError: the bundle was fitted on the split that is asked for.
    """
    started = time.monotonic()
    prepared, bundle = Prepared.open(prepared_uri), Bundle.open(model_uri)
    if split == "valid" and bundle.manifest.get("fit") == "train+valid":
        raise ConfigError(f"{model_uri} was fitted on train+valid, so its valid figures would be of seen data; evaluate it on test")
    sequences = matched_sequences(prepared, bundle)
    shown_only = np.isin(sequences.events, [code for name, code in bundle.event_codes.items() if name in NON_HISTORY_EVENTS])
    positions = _targets(sequences, ~shown_only, split, max_users, seed, prepared_uri)
    shown = _sample(np.flatnonzero(shown_only & (sequences.split == SPLIT_CODES[split])), MAX_SHOWN, seed)
    # Being shown an item is nothing the user did: such events are labels of the ranker, not history and not targets.
    histories = dataclasses.replace(sequences, items=np.where(shown_only, np.int32(UNKNOWN_ITEM), sequences.items))
    stages = Stages(Pipeline(bundle), mask=mask, list_k=max(LIST_K, *k), seed=seed)
    batch_size = max(1, min(batch_size, MAX_BATCH_SCORES // stages.pipeline.num_items))
    told = started
    for first in range(0, len(positions), batch_size):
        batch = positions[first : first + batch_size]
        stages.add(histories.queries_before(batch, max_events=MAX_HISTORY), sequences.items[batch])
        if time.monotonic() - told > PROGRESS_S:
            told = time.monotonic()
            print(f"      evaluated {first + len(batch):,} of {len(positions):,} targets", file=sys.stderr, flush=True)
    for first in range(0, len(shown), batch_size):
        batch = shown[first : first + batch_size]
        stages.add_shown(histories.queries_before(batch, max_events=MAX_HISTORY), sequences.items[batch])
    users = sequences.rows[positions]
    ranks = {name: np.concatenate(parts) for name, parts in stages.ranks.items()}

    def figures(name: str, resamples: int = bootstrap) -> dict:
        return metrics.mean_with_intervals(metrics.rank_metrics(ranks[name], k), users, resamples=resamples, seed=seed)

    sources = {name: {**figures(name), "fusion_weight": stages.pipeline.fusion.weights.get(name, 0.0)} for name in stages.source_names}
    gain = {
        name: values - metrics.rank_metrics(ranks["retrieval"], k)[name] for name, values in metrics.rank_metrics(ranks["final"], k).items()
    }
    lists = np.concatenate(stages.lists)[:, :LIST_K]
    popularity = _popularity(bundle)
    return {
        "final": figures("final"),
        "retrieval": figures("retrieval"),
        "sources": sources,
        "baselines": {title: sources[name] for title, name in (("popularity", "popularity"), ("item_knn", "covisit")) if name in sources},
        "final_minus_retrieval": metrics.mean_with_intervals(gain, users, resamples=bootstrap, seed=seed),
        "left_out": {name.removeprefix("without "): figures(name) for name in ranks if name.startswith("without ")},
        "union": figures("union"),
        "unmasked": {name.removeprefix("unmasked "): figures(name, 0) for name in ranks if name.startswith("unmasked ")},
        "ranker": stages.ranker_figures(sequences.positive[np.concatenate([positions, shown])]),
        "coverage": metrics.coverage(lists, len(popularity)),
        "novelty": metrics.novelty(lists, popularity),
        "popularity_bias": _popularity_bias(lists, stages.targets(), popularity),
        "list_k": LIST_K,
        "split": split,
        "masked": mask,
        "k": list(k),
        "num_candidates": stages.pipeline.num_candidates,
        "ranker_weight": stages.pipeline.ranker_weight,
        "users": len(np.unique(users)),
        "targets": len(positions),
        "unknown_targets": int((stages.targets() == UNKNOWN_ITEM).sum()),
        "repeated_targets": stages.repeated,
        "empty_histories": stages.empty,
        "items": len(popularity),
        "data": {"fingerprint": prepared.manifest["fingerprint"], "split": prepared.manifest["split"], "time": prepared.manifest["time"]},
        "model": {"version": bundle.version, "fit": bundle.manifest.get("fit"), "data": bundle.manifest.get("data", {}).get("fingerprint")},
        "seed": seed,
        "bootstrap": bootstrap,
        "seconds": round(time.monotonic() - started, 1),
    }


def matched_sequences(prepared: Prepared, bundle: Bundle) -> Sequences:
    """The sequences in the bundle's item rows and event codes; a bundle may come from an older preparation.

    Raises:
        SchemaError: no item of the prepared set is in the bundle.
    """
    sequences = prepared.sequences()
    item_ids = prepared.items()["item_id"].to_pylist()
    if item_ids == bundle.item_ids and prepared.events == bundle.events:
        return sequences
    rows = np.array([*(bundle.item_index.get(item_id, UNKNOWN_ITEM) for item_id in item_ids), UNKNOWN_ITEM], np.int32)
    if (rows == UNKNOWN_ITEM).all():
        raise SchemaError(
            f"{prepared.uri}: none of its {len(item_ids):,} items is in bundle {bundle.version}; were they made from one data set?"
        )
    codes = np.array([bundle.event_codes.get(name, 0) for name in prepared.events], np.int8)
    return dataclasses.replace(sequences, items=rows[sequences.items], events=codes[sequences.events])


def _targets(sequences: Sequences, wanted: np.ndarray, split: str, max_users: int | None, seed: int, uri: str) -> np.ndarray:
    if split not in ("valid", "test"):
        raise ConfigError(f"split: expected 'test' or 'valid', got {split!r}")
    positions = np.flatnonzero(wanted & (sequences.split == SPLIT_CODES[split]))
    if not len(positions):
        raise SchemaError(f"{uri}: expected events in the {split} part, found none; prepare with --split leave-one-out or time")
    if max_users is None:
        return positions
    users = _sample(np.unique(sequences.rows[positions]), max_users, seed)
    return positions[np.isin(sequences.rows[positions], users)]


def _sample(values: np.ndarray, count: int, seed: int) -> np.ndarray:
    return values if len(values) <= count else np.sort(np.random.default_rng(seed).choice(values, count, replace=False))


def _popularity(bundle: Bundle) -> np.ndarray:
    return bundle.items["num_train"].to_numpy().astype(np.int64)


def _popularity_bias(lists: np.ndarray, targets: np.ndarray, popularity: np.ndarray) -> dict[str, Any]:
    percentiles = metrics.popularity_percentiles(popularity)
    exposure = np.bincount(lists[lists >= 0], minlength=len(popularity))
    taken = np.bincount(targets[targets != UNKNOWN_ITEM], minlength=len(popularity))
    # Tenths of the catalogue by rank, equals in row order: each holds the same number of items.
    tenths = np.empty(len(popularity), np.int64)
    tenths[np.argsort(popularity, kind="stable")] = np.arange(len(popularity)) * 10 // len(popularity)

    def share(counts: np.ndarray) -> list[float]:
        return (np.bincount(tenths, weights=counts, minlength=10) / max(1, counts.sum())).tolist()

    return {
        "mean_percentile": float(np.average(percentiles, weights=exposure)),
        "mean_percentile_of_targets": float(np.average(percentiles, weights=taken)) if taken.any() else None,
        "gini": metrics.gini(exposure),
        "share_by_tenth": {"recommended": share(exposure), "targets": share(taken), "training": share(popularity)},
    }


def summary_rows(result: dict) -> list[tuple[str, str]]:
    """The closing table of the command."""
    cut = 10 if 10 in result["k"] else max(result["k"])
    names = [f"ndcg@{cut}", f"recall@{cut}", f"mrr@{cut}"]
    rows = [("stage", "".join(f"{name:>12}" for name in names))]
    stages = {**result["sources"], "retrieval (fused)": result["retrieval"], "final": result["final"]}
    rows += [(title, "".join(f"{figures[name]:>12.4f}" for name in names)) for title, figures in stages.items()]
    if f"{names[0]}_interval" in result["final"]:
        low, high = result["final"][f"{names[0]}_interval"]
        rows.append((f"final {names[0]}", f"95% interval {low:.4f} to {high:.4f} over {result['users']:,} users"))
    deepest = max(result["k"])
    recalls = (result["retrieval"][f"recall@{deepest}"], result["union"][f"recall@{deepest}"])
    rows.append((f"candidate recall@{deepest}", f"{recalls[0]:.4f}; by any source, {recalls[1]:.4f}"))
    ranker = result["ranker"]
    if ranker["auc"] is not None:
        text = (
            f"AUC {ranker['auc']:.4f}, log-loss {ranker['logloss']:.4f}, calibration error {ranker['ece']:.4f} (label: {ranker['label']})"
        )
        rows.append(("ranker", text))
    bias = result["popularity_bias"]
    rows.append(("beyond accuracy", f"coverage {result['coverage']:.3f}, novelty {result['novelty']:.2f} bits, Gini {bias['gini']:.3f}"))
    rows.append(("targets", f"{result['targets']:,} in {result['seconds']:.0f} s, {'masked' if result['masked'] else 'unmasked'}"))
    return rows
