"""Fusion of retrieval sources: a mixture of their softmax distributions over the catalogue.

Each source's scores become probabilities at its own temperature; probabilities
are added with weights. What one source is sure of survives another's silence,
which a sum of scores or of ranks would drown.

Legend: B queries, N items, S sources, V validation queries.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np

POPULARITY_FLOOR = 1e-4
"""Least weight of popularity: it orders what no other source has an opinion on, and answers to empty histories."""
TEMPERATURES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0)
"""Candidates for a source's temperature, relative to the spread of its scores."""
STEPS = (0.0, 0.25, 0.5, 0.75, 1.33, 2.0, 4.0)
"""Factors tried on a weight in coordinate ascent."""


@dataclass(frozen=True)
class Fusion:
    """Weights (summing to 1) and temperatures by source name."""

    weights: dict[str, float]
    temperatures: dict[str, float]

    @classmethod
    def of(cls, weights: Mapping[str, float], temperatures: Mapping[str, float]) -> "Fusion":
        """Normalise weights, keeping popularity at its floor at least."""
        kept = dict(weights)
        if "popularity" in kept:
            kept["popularity"] = max(kept["popularity"], POPULARITY_FLOOR)
        total = sum(kept.values())
        if total <= 0:
            raise ValueError(f"expected at least one positive weight, got {kept}")
        return cls({name: weight / total for name, weight in kept.items()}, dict(temperatures))

    @classmethod
    def from_dict(cls, values: dict) -> "Fusion":
        """Back from `to_dict`."""
        return cls(dict(values["weights"]), dict(values["temperatures"]))

    def to_dict(self) -> dict:
        """For a manifest."""
        return asdict(self)

    def log_probs(self, scores: np.ndarray, source: str) -> np.ndarray:
        """(B, N) float32 log softmax of (B, N) scores at the source's temperature."""
        return log_softmax(scores / np.float32(self.temperatures[source]))

    def fuse(self, log_probs: Mapping[str, np.ndarray], *, empty: np.ndarray | None = None) -> np.ndarray:
        """(B, N) float32 log of the mixture; rows marked in `empty` (B,) bool follow popularity alone.

        Sources without weight are skipped; weights of those missing in `log_probs` are simply not there.
        """
        used = [name for name in log_probs if self.weights.get(name, 0.0) > 0]
        mixture = np.zeros_like(log_probs[used[0]])
        for name in used:
            mixture += np.float32(self.weights[name]) * np.exp(log_probs[name])
        with np.errstate(divide="ignore"):
            fused = np.log(mixture)
        if empty is not None and "popularity" in log_probs and empty.any():
            fused[empty] = log_probs["popularity"][empty]
        # A probability below the smallest float must not make an item unrecommendable.
        return np.maximum(fused, np.float32(-100.0))


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """(B, N) float32 log softmax over the last axis."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def choose_fusion(
    sources: Mapping[str, Callable[[slice], np.ndarray]],
    targets: np.ndarray,
    allowed: Callable[[slice], np.ndarray],
    *,
    start: Mapping[str, float] | None = None,
    cutoff: int = 10,
    keep: int = 300,
    chunk: int = 256,
    rounds: int = 3,
) -> tuple[Fusion, dict]:
    """Temperatures, then weights, that maximise NDCG on validation queries.

    Only the best `keep` items of each source and the target are looked at: no
    other item can reach the first `cutoff` places. That bounds memory to
    V * (S * keep) values whatever the catalogue.

    Args:
        sources: name -> scores of a slice of the V queries, (b, N) float32.
        targets: (V,) int64 item rows; rows that are masked or unknown never hit.
        allowed: slice -> (b, N) bool mask of items that may be answered.
        start: weights to begin from; equal ones when None.
        cutoff: k of NDCG@k.
        keep: best items a source that are looked at.
        chunk: queries at once.
        rounds: passes of coordinate ascent.

    Returns:
        The fusion, and a report: ndcg of each source alone, of each left out, and fused.
    """
    names = list(sources)
    pools = _Pools(sources, targets, allowed, keep=keep, chunk=chunk)
    temperatures = {name: 1.0 for name in names}
    base = "interest" if "interest" in names else max(names, key=lambda name: pools.ndcg({name: 1.0}, temperatures, cutoff))
    # The model's own softmax is calibrated by its loss; others are scaled to add most to it.
    for name in names:
        if name == base:
            continue
        spread = pools.spread[name]

        def gain(factor: float, name: str = name, spread: float = spread) -> float:
            return pools.ndcg({base: 0.5, name: 0.5}, {**temperatures, name: factor * spread}, cutoff)

        temperatures[name] = max(TEMPERATURES, key=gain) * spread
    weights = dict(start) if start is not None else {name: 1.0 / len(names) for name in names}
    best = pools.ndcg(weights, temperatures, cutoff)
    for _ in range(rounds):
        before = best
        for name in names:
            for factor in STEPS:
                trial = {**weights, name: weights[name] * factor if weights[name] > 0 else 0.1 * factor}
                if sum(trial.values()) <= 0:
                    continue
                value = pools.ndcg(trial, temperatures, cutoff)
                # A source has to earn its place: equal quality goes to the smaller mixture.
                if value > best + 1e-5 or (factor == 0.0 and value >= best - 1e-5):
                    weights, best = trial, value
        for name in names:
            if weights[name] > 0:
                for factor in (0.7, 1.4):
                    trial_t = {**temperatures, name: temperatures[name] * factor}
                    value = pools.ndcg(weights, trial_t, cutoff)
                    if value > best + 1e-5:
                        temperatures, best = trial_t, value
        if best - before < 1e-4:
            break
    fusion = Fusion.of(weights, temperatures)
    left_out = {name: pools.ndcg({**fusion.weights, name: 0.0}, temperatures, cutoff) for name in names if 0 < fusion.weights[name] < 1}
    alone = {name: pools.ndcg({name: 1.0}, temperatures, cutoff) for name in names}
    return fusion, {
        "alone": alone,
        "left_out": left_out,
        "fused": pools.ndcg(fusion.weights, temperatures, cutoff),
        "queries": len(targets),
    }


class _Pools:
    """For each query the items that can matter, with every source's score and softmax normaliser per temperature."""

    def __init__(self, sources: Mapping[str, Callable], targets: np.ndarray, allowed: Callable, *, keep: int, chunk: int):
        self.spread: dict[str, float] = {}
        parts: dict[str, list[np.ndarray]] = {name: [] for name in sources}
        self._full: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in sources}
        valid, hits = [], []
        width = keep * len(sources) + 1
        for first in range(0, len(targets), chunk):
            rows = slice(first, min(first + chunk, len(targets)))
            mask, target = allowed(rows), targets[rows]
            scores = {name: source(rows) for name, source in sources.items()}
            found = (target >= 0) & mask[np.arange(len(mask)), np.maximum(target, 0)]
            picks = [np.maximum(target, 0)[:, None]]
            for values in scores.values():
                masked = np.where(mask, values, -np.inf)
                count = min(keep, masked.shape[1])
                picks.append(np.argpartition(-masked, count - 1, axis=1)[:, :count])
            columns = np.concatenate(picks, axis=1)
            columns = np.pad(columns, ((0, 0), (0, width - columns.shape[1])), mode="edge")
            order = np.argsort(columns, axis=1, kind="stable")
            ordered = np.take_along_axis(columns, order, 1)
            repeated = np.zeros_like(columns, bool)
            np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
            valid.append(~repeated & np.take_along_axis(mask, columns, 1))
            hits.append(found)
            for name, values in scores.items():
                parts[name].append(np.take_along_axis(values, columns, 1).astype(np.float32))
                # A histogram-free normaliser: the whole row in half precision, shifted by its peak.
                peak = values.max(axis=1, keepdims=True)
                self._full[name].append(((values - peak).astype(np.float16), peak[:, 0]))
        self._scores = {name: np.concatenate(values) for name, values in parts.items()}
        self._valid, self._hits = np.concatenate(valid), np.concatenate(hits)
        self._probabilities: dict[tuple[str, float], np.ndarray] = {}
        for name, values in self._scores.items():
            peaks = np.where(self._valid, values, -np.inf).max(axis=1)
            top = np.sort(np.where(self._valid, values, -np.inf), axis=1)[:, -min(100, values.shape[1])]
            gaps = (peaks - top)[np.isfinite(peaks - top)]
            self.spread[name] = float(max(np.median(gaps), 1e-3)) if len(gaps) else 1.0

    def ndcg(self, weights: Mapping[str, float], temperatures: Mapping[str, float], cutoff: int) -> float:
        used = {name: weight for name, weight in weights.items() if weight > 0}
        if not used:
            return 0.0
        mixture = sum(weight * self._probability(name, temperatures[name]) for name, weight in used.items())
        assert isinstance(mixture, np.ndarray)
        target = mixture[:, :1]
        ranks = ((mixture > target) & self._valid).sum(axis=1)
        # Ties count half: a source that cannot tell items apart must not look good.
        ranks = ranks + 0.5 * ((mixture == target) & self._valid)[:, 1:].sum(axis=1)
        return float(np.where(self._hits & (ranks < cutoff), 1.0 / np.log2(ranks + 2.0), 0.0).mean())

    def _probability(self, name: str, temperature: float) -> np.ndarray:
        key = (name, round(temperature, 9))
        if key not in self._probabilities:
            if len(self._probabilities) > 40:
                self._probabilities.pop(next(iter(self._probabilities)))
            inverse = np.float32(1.0 / temperature)
            masses = [np.exp(shifted.astype(np.float32) * inverse).sum(axis=1) for shifted, _ in self._full[name]]
            peaks = np.concatenate([peak for _, peak in self._full[name]])
            normaliser = peaks * inverse + np.log(np.concatenate(masses))
            self._probabilities[key] = np.exp(self._scores[name] * inverse - normaliser[:, None])
        return self._probabilities[key]
