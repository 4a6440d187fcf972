"""Metrics of rankings and of probabilities, in plain NumPy. Knows nothing of models or files.

A query with one target is described by the 1-based rank of the target, 0 when
it was not ranked (a miss). Values are per query; `mean_with_intervals` makes
means of them and resamples users, because queries of one user are not
independent.

Legend: Q queries, N items, K list length, T targets of all queries together, U users, M metrics.
"""

from collections.abc import Mapping, Sequence

import numpy as np


def target_ranks(scores: np.ndarray, targets: np.ndarray, allowed: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """Rank of one target a query among the whole catalogue, ties broken at random.

    A random place among equals is what a scorer without opinion deserves; the
    best place would reward constant scores, the worst would punish sparse ones.

    Args:
        scores: (Q, N) float, higher is better; -inf allowed, NaN not.
        targets: (Q,) int item rows; negative where the item is unknown (a miss).
        allowed: (Q, N) bool, items that may be ranked; a target that may not is a miss. None for all.
        rng: source of the tie breaks.

    Returns:
        (Q,) int64 1-based ranks, 0 for a miss.
    """
    known = targets >= 0
    rows = np.arange(len(targets))
    target_scores = scores[rows, np.where(known, targets, 0)][:, None]
    better, equal = scores > target_scores, scores == target_scores
    if allowed is not None:
        better, equal = better & allowed, equal & allowed
        known = known & allowed[rows, np.where(known, targets, 0)]
    others = np.maximum(equal.sum(axis=1) - 1, 0)
    return np.where(known, 1 + better.sum(axis=1) + rng.integers(0, others + 1), 0)


def list_ranks(lists: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Rank of one target a query in a ranked list.

    Args:
        lists: (Q, K) int item rows, best first; negative values pad.
        targets: (Q,) int item rows; negative where the item is unknown (a miss).

    Returns:
        (Q,) int64 1-based ranks, 0 for a miss.
    """
    hits = (lists == targets[:, None]) & (targets >= 0)[:, None]
    return np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, 0)


def rank_metrics(ranks: np.ndarray, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Recall (= hit rate), NDCG and reciprocal rank of queries with one target each.

    Args:
        ranks: (Q,) int 1-based, 0 for a miss.
        ks: cut-offs.

    Returns:
        `{"recall@10": (Q,) float64, "ndcg@10": ..., "mrr@10": ...}` for each k.
    """
    safe = np.maximum(ranks, 1)
    values = {}
    for k in ks:
        hit = (ranks > 0) & (ranks <= k)
        values[f"recall@{k}"] = hit.astype(np.float64)
        values[f"ndcg@{k}"] = np.where(hit, 1.0 / np.log2(safe + 1), 0.0)
        values[f"mrr@{k}"] = np.where(hit, 1.0 / safe, 0.0)
    return values


def set_metrics(lists: np.ndarray, targets: np.ndarray, indptr: np.ndarray, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Recall, hit rate, NDCG and reciprocal rank of the first hit, for queries with several targets.

    Args:
        lists: (Q, K) int item rows, best first, without repeats; negative values pad.
        targets: (T,) int item rows, distinct within a query; negative ones count as misses.
        indptr: (Q+1,) int; targets of query q are `targets[indptr[q]:indptr[q+1]]`, at least one.
        ks: cut-offs; recall divides by all targets, NDCG by the best possible list of length k.

    Returns:
        `{"recall@10": (Q,) float64, "hit@10": ..., "ndcg@10": ..., "mrr@10": ...}` for each k.
    """
    counts = np.diff(indptr)
    rows = np.repeat(np.arange(len(counts)), counts)
    known = targets >= 0
    width = int(max(targets.max(initial=0), lists.max(initial=0))) + 1
    wanted = rows[known] * width + targets[known]
    listed = np.where(lists >= 0, np.arange(len(lists))[:, None] * width + lists, -1)
    hits = np.isin(listed, wanted)
    ranks = np.arange(1, lists.shape[1] + 1)
    gains = 1.0 / np.log2(ranks + 1)
    ideal = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(np.arange(2, max(ks) + 2)))])
    values = {}
    for k in ks:
        top = hits[:, :k]
        values[f"recall@{k}"] = top.sum(axis=1) / counts
        values[f"hit@{k}"] = top.any(axis=1).astype(np.float64)
        values[f"ndcg@{k}"] = (top * gains[:k]).sum(axis=1) / ideal[np.minimum(counts, k)]
        values[f"mrr@{k}"] = (top / ranks[:k]).max(axis=1, initial=0.0)
    return values


def mean_with_intervals(
    values: Mapping[str, np.ndarray], users: np.ndarray, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, float | list[float]]:
    """Means over queries, with percentile bootstrap intervals over users.

    The same resamples serve all metrics, so that two of them can be compared.
    Wrong for a handful of users: a percentile interval is then too narrow.

    Args:
        values: metric name -> (Q,) float64.
        users: (Q,) int, the user of each query.
        resamples: bootstrap resamples; 0 leaves the intervals out.
        level: coverage, in (0, 1).
        seed: of the resampling.

    Returns:
        `{NAME: mean, f"{NAME}_interval": [low, high]}`.
    """
    names = list(values)
    means: dict[str, float | list[float]] = {name: float(np.mean(values[name])) if len(users) else 0.0 for name in names}
    if resamples == 0 or len(users) == 0:
        return means
    _, group = np.unique(users, return_inverse=True)
    num_users = int(group.max()) + 1
    sums = np.stack([np.bincount(group, weights=values[name], minlength=num_users) for name in names], axis=1)  # (U, M)
    sums = np.concatenate([sums, np.bincount(group, minlength=num_users)[:, None]], axis=1)
    rng = np.random.default_rng(seed)
    draws = np.empty((resamples, len(names)))
    for first in range(0, resamples, 64):  # so many at once are one matrix product, and a few MB
        size = min(64, resamples - first)
        weights = np.stack([np.bincount(rng.integers(0, num_users, num_users), minlength=num_users) for _ in range(size)])
        totals = weights.astype(np.float64) @ sums
        draws[first : first + size] = totals[:, :-1] / totals[:, -1:]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    result: dict[str, float | list[float]] = {}
    for column, name in enumerate(names):
        result[name] = means[name]
        result[f"{name}_interval"] = [float(low[column]), float(high[column])]
    return result


def auc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Probability that a random positive scores above a random negative, ties counting one half.

    Args:
        scores: (Q,) float.
        labels: (Q,) bool.

    Returns:
        None when one class is missing.
    """
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if positives == 0 or negatives == 0:
        return None
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2  # 1-based, averaged over ties
    return float((mean_rank[inverse][labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def log_loss(probabilities: np.ndarray, labels: np.ndarray, *, floor: float = 1e-7) -> float:
    """Mean negative log-likelihood in nats; probabilities are clipped to [floor, 1 - floor]."""
    clipped = np.clip(probabilities.astype(np.float64), floor, 1 - floor)
    return float(-np.mean(np.where(labels, np.log(clipped), np.log1p(-clipped))))


def reliability(probabilities: np.ndarray, labels: np.ndarray, *, bins: int = 10) -> dict[str, list]:
    """Predicted against observed frequency in bins of about equal mass; equal predictions share a bin.

    Args:
        probabilities: (Q,) float in [0, 1].
        labels: (Q,) bool.
        bins: bins at most.

    Returns:
        `{"predicted": [...], "observed": [...], "count": [...]}`, by rising prediction.
    """
    edges = np.unique(np.quantile(probabilities, np.linspace(0, 1, bins + 1)[1:-1], method="higher"))
    members = np.searchsorted(edges, probabilities, side="right")
    counts = np.bincount(members)
    filled = counts > 0
    predicted = np.bincount(members, weights=probabilities)[filled] / counts[filled]
    observed = np.bincount(members, weights=labels)[filled] / counts[filled]
    return {"predicted": predicted.tolist(), "observed": observed.tolist(), "count": counts[filled].tolist()}


def calibration_error(curve: Mapping[str, list]) -> float:
    """Expected calibration error: mean gap between predicted and observed of a `reliability` curve, weighted by count."""
    gaps = np.abs(np.subtract(curve["predicted"], curve["observed"]))
    return float(np.average(gaps, weights=curve["count"]))


def coverage(lists: np.ndarray, num_items: int) -> float:
    """Share of the catalogue that is in at least one list; negative entries pad."""
    return len(np.unique(lists[lists >= 0])) / num_items


def novelty(lists: np.ndarray, popularity: np.ndarray) -> float:
    """Mean self-information of the listed items in bits, -log2 of each item's share of events.

    Args:
        lists: (Q, K) int item rows; negative values pad.
        popularity: (N,) events an item; one is added to each, so that an unseen item is finite.
    """
    share = (popularity + 1) / (popularity.sum() + len(popularity))
    return float(-np.log2(share)[lists[lists >= 0]].mean())


def popularity_percentiles(popularity: np.ndarray) -> np.ndarray:
    """(N,) float64 in (0, 1): share of the catalogue that is less popular, equals counting one half; mean 0.5."""
    _, inverse, counts = np.unique(popularity, return_inverse=True, return_counts=True)
    return ((np.cumsum(counts) - counts / 2) / len(popularity))[inverse]


def gini(counts: np.ndarray) -> float:
    """Inequality of exposure: 0 when all items are listed equally often, near 1 when one item takes all.

    Args:
        counts: (N,) times each item was listed, zeros included.
    """
    total = counts.sum()
    if total == 0:
        return 0.0
    ordered, n = np.sort(counts), len(counts)
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * total))
