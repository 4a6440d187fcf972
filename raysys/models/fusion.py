"""Fusion of retrieval sources: a mixture of their softmax distributions over the catalogue.

Each source's scores become probabilities at its own temperature; probabilities
are added with weights. What one source is sure of survives another's silence,
which a sum of scores or of ranks would drown.

Legend: B queries, N items, S sources, V validation queries.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

POPULARITY_FLOOR = 1e-4
"""Least weight of popularity: it orders what no other source has an opinion on, and answers to empty histories."""
TEMPERATURES = (0.02, 0.04, 0.07, 0.12, 0.2, 0.35, 0.6, 1.0, 2.0, 5.0)
"""Candidates for a source's temperature, relative to the distance of its first from its hundredth score."""
RATIOS = (0.1, 0.3, 1.0, 3.0)
"""Weights tried for a source that joins, relative to the first one's 1."""
STEPS = (0.5, 0.75, 1.33, 2.0)
"""Factors tried on a weight in coordinate ascent."""
STARTS = 3
"""Sources that selection starts from: the strongest first leads to a local optimum. On Beauty it left the encoder out; starting from the
encoder too, the mixture's NDCG@10 on queries that it was not chosen by rose from .0764 to .0780."""
MAX_PASSES = 4
KEPT_PROBABILITIES = 40
"""Matrices of pool probabilities kept at once; bounds memory."""
AT_ONCE = 2**16
"""Values that softmax and mixture take through all their steps before the next ones: as many as a core's cache keeps."""
MIN_GAIN = 2e-4
"""NDCG that a source must add to be used: less is noise of the validation sample."""


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
        return log_softmax(scores, self.temperatures[source])

    def fuse(self, log_probs: Mapping[str, np.ndarray], *, empty: np.ndarray | None = None) -> np.ndarray:
        """(B, N) float32 log of the mixture; rows marked in `empty` (B,) bool follow popularity alone.

        Sources without weight are skipped; weights of those missing in `log_probs` are simply not there.
        """
        used = [name for name in log_probs if self.weights.get(name, 0.0) > 0]
        fused = np.zeros(log_probs[used[0]].shape, np.float32)
        for rows in _blocks(fused.shape):
            mixture = fused[rows]
            for name in used:
                share = np.exp(log_probs[name][rows])
                share *= np.float32(self.weights[name])
                mixture += share
            with np.errstate(divide="ignore"):
                np.log(mixture, out=mixture)
        if empty is not None and "popularity" in log_probs and empty.any():
            fused[empty] = log_probs["popularity"][empty]
        # A probability below the smallest float must not make an item unrecommendable.
        return np.maximum(fused, np.float32(-100.0), out=fused)


def log_softmax(scores: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """(B, N) float32 log softmax over the last axis of (B, N) scores divided by a temperature."""
    found = np.empty(scores.shape, np.float32)
    for rows in _blocks(scores.shape):
        logits = np.divide(scores[rows], np.float32(temperature), out=found[rows])
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return found


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    height = max(1, AT_ONCE // max(1, shape[1]))
    return (slice(first, first + height) for first in range(0, shape[0], height))


def choose_fusion(
    sources: Mapping[str, Callable[[slice], np.ndarray]],
    targets: np.ndarray,
    allowed: Callable[[slice], np.ndarray],
    *,
    cutoff: int = 10,
    keep: int = 100,
    chunk: int = 256,
    doubt: float = 0.0,
    calm: Sequence[float] = (1.0,),
    present: Fusion | None = None,
) -> tuple[Fusion, dict]:
    """Sources, weights and temperatures that maximise NDCG on validation queries, by greedy forward selection.

    Only the best `keep` items of each source and the target are looked at: no
    other item can reach the first `cutoff` places. That bounds memory to
    V * (S * keep) values whatever the catalogue.

    Args:
        sources: name -> scores of a slice of the V queries, (b, N) float32.
        targets: (V,) int64 item rows; rows that are masked or unknown never hit.
        allowed: slice -> (b, N) bool mask of items that may be answered.
        cutoff: k of NDCG@k.
        keep: best items a source that are looked at.
        chunk: queries at once.
        doubt: standard errors of the strongest source's NDCG by which another source must help to be used, and another start than
            the encoder's must be better; for few queries, which tell no less from luck.
        calm: factors of all temperatures that are tried at the end; of those that cost no NDCG beyond the doubt, the one with the least
            log loss is taken. For sources that are surer than they should be.
        present: a mixture that is kept, but for what `calm` does to it, unless the best that is found is better beyond the doubt.

    Returns:
        The fusion, and the report of `judge_fusion` on the same queries.
    """
    pools = Pools(sources, targets, allowed, keep=keep, chunk=chunk)
    names = list(sources)
    # A model's own softmax is what its loss calibrated; scores of the others have no such scale, so theirs is searched.
    temperatures = {name: 1.0 for name in names}

    def figure(weights: Mapping[str, float], chosen: Mapping[str, float]) -> float:
        return pools.ndcg(weights, chosen, cutoff)

    alone = {name: figure({name: 1.0}, temperatures) for name in names}
    # Two regimes, because ascent does not cross from one to the other: peaked softmaxes, where what one source is sure of
    # wins; and flat ones, where a mixture is a linear sum of scores, and agreement wins.
    strongest = sorted(names, key=lambda name: alone[name])[-STARTS:]
    uncertain = doubt * pools.standard_error({strongest[-1]: 1.0}, temperatures, cutoff) if doubt else 0.0
    min_gain = max(MIN_GAIN, uncertain)
    starts = {("interest", 1.0)} if "interest" in names else set()
    starts |= {(name, factor * pools.spread[name]) for name in strongest for factor in (TEMPERATURES[0], TEMPERATURES[-1])}
    # The encoder's own temperature first: where another one orders no better it would only sharpen what the loss had calibrated.
    ordered = sorted(starts, key=lambda start: (start != ("interest", 1.0), start))
    outcomes = [_grow(figure, names, first, {**temperatures, first: start}, pools.spread, min_gain) for first, start in ordered]
    favoured = [outcomes[0]]
    if present is not None:
        held = {name: present.weights.get(name, 0.0) for name in names}, {**temperatures, **present.temperatures}
        favoured.append((*held, figure(*held)))
    chosen = max(outcomes, key=lambda outcome: outcome[2])
    for outcome in favoured:
        if outcome[2] >= chosen[2] - uncertain:
            chosen = outcome
    weights, temperatures, best = chosen
    fusion = Fusion.of({name: weights.get(name, 0.0) for name in names}, temperatures)
    calmed = [Fusion(fusion.weights, {name: factor * value for name, value in temperatures.items()}) for factor in calm]
    kept = [one for one in calmed if pools.ndcg(one.weights, one.temperatures, cutoff) >= best - uncertain]
    fusion = min(kept or [fusion], key=lambda one: pools.log_loss(one.weights, one.temperatures))
    return fusion, _report(fusion, pools, cutoff)


def judge_fusion(
    fusion: Fusion,
    sources: Mapping[str, Callable[[slice], np.ndarray]],
    targets: np.ndarray,
    allowed: Callable[[slice], np.ndarray],
    *,
    cutoff: int = 10,
    keep: int = 100,
    chunk: int = 256,
) -> dict:
    """NDCG of a given mixture, of its sources alone, and of it without each; arguments as for `choose_fusion`."""
    return _report(fusion, Pools(sources, targets, allowed, keep=keep, chunk=chunk), cutoff)


NOT_JUDGED: dict = {"alone": {}, "left_out": {}, "fused": None, "queries": 0}
"""The report where there is nothing to judge on."""


def _report(fusion: Fusion, pools: "Pools", cutoff: int) -> dict:
    temperatures = fusion.temperatures
    used = {name: weight for name, weight in fusion.weights.items() if weight > 0}
    return {
        "alone": {name: pools.ndcg({name: 1.0}, temperatures, cutoff) for name in fusion.weights},
        "left_out": {name: pools.ndcg({**used, name: 0.0}, temperatures, cutoff) for name in used if len(used) > 1},
        "fused": pools.ndcg(used, temperatures, cutoff),
        "queries": len(pools),
    }


Figure = Callable[[Mapping[str, float], Mapping[str, float]], float]


def _grow(
    figure: Figure, names: list[str], first: str, temperatures: dict[str, float], spread: Mapping[str, float], min_gain: float
) -> tuple[dict[str, float], dict[str, float], float]:
    """Greedy forward selection from one source: add whichever helps most, refine, repeat."""
    weights = {first: 1.0}
    best = figure(weights, temperatures)
    while left := [name for name in names if name not in weights]:
        trials = [
            (figure({**weights, name: ratio}, {**temperatures, name: factor * spread[name]}), name, ratio, factor * spread[name])
            for name in left
            for factor in TEMPERATURES
            for ratio in RATIOS
        ]
        value, name, ratio, temperature = max(trials)
        if value <= best + min_gain:
            break  # nobody else earns a place
        weights, temperatures = {**weights, name: ratio}, {**temperatures, name: temperature}
        weights, temperatures, best = _refine(figure, weights, temperatures, value)
    return weights, temperatures, best


def _refine(
    figure: Figure,
    weights: dict[str, float],
    temperatures: dict[str, float],
    best: float,
) -> tuple[dict[str, float], dict[str, float], float]:
    """Coordinate ascent over weights and temperatures of the sources in use."""
    for _ in range(MAX_PASSES):
        before = best
        for name in weights:
            for factor in STEPS:
                trial = {**weights, name: weights[name] * factor}
                if (value := figure(trial, temperatures)) > best:
                    weights, best = trial, value
            for factor in (0.7, 1.4):
                warmer = {**temperatures, name: temperatures[name] * factor}
                if (value := figure(weights, warmer)) > best:
                    temperatures, best = warmer, value
        if best - before < MIN_GAIN:
            break
    return weights, temperatures, best


class Pools:
    """For each of V queries the P items that can matter, with every source's score and softmax normaliser per temperature.

    Attributes:
        scores: name -> (V, P) float32; column 0 is the target.
        valid: (V, P) bool, items that may be answered, each once.
        hits: (V,) bool, whether the target may be answered at all.
        spread: name -> median distance of the first from the hundredth score.
    """

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
                # The whole row, for its normaliser at any temperature: half precision will do once it is shifted by its peak.
                peak = values.max(axis=1, keepdims=True)
                shifted = np.maximum(values - peak, np.float32(-6e4)).astype(np.float16)
                self._full[name].append((shifted, peak[:, 0]))
        self.scores = {name: np.concatenate(values) for name, values in parts.items()}
        self.valid, self.hits = np.concatenate(valid), np.concatenate(hits)
        self._probabilities: dict[tuple[str, float], np.ndarray] = {}
        self._normalisers: dict[tuple[str, float], np.ndarray] = {}
        for name, values in self.scores.items():
            peaks = np.where(self.valid, values, -np.inf).max(axis=1)
            top = np.sort(np.where(self.valid, values, -np.inf), axis=1)[:, -min(100, values.shape[1])]
            gaps = (peaks - top)[np.isfinite(peaks - top)]
            self.spread[name] = float(max(np.median(gaps), 1e-3)) if len(gaps) else 1.0

    def __len__(self) -> int:
        return len(self.hits)

    def ndcg(self, weights: Mapping[str, float], temperatures: Mapping[str, float], cutoff: int) -> float:
        """Mean NDCG at a cut-off of the mixture."""
        return float(self._ndcgs(weights, temperatures, cutoff).mean())

    def _ndcgs(self, weights: Mapping[str, float], temperatures: Mapping[str, float], cutoff: int) -> np.ndarray:
        used = {name: weight for name, weight in weights.items() if weight > 0}
        if not used:
            return np.zeros(len(self))
        mixture = sum(weight * self._probability(name, temperatures[name]) for name, weight in used.items())
        assert isinstance(mixture, np.ndarray)
        target = mixture[:, :1]
        ranks = ((mixture > target) & self.valid).sum(axis=1)
        # Ties count half: a source that cannot tell items apart must not look good.
        ranks = ranks + 0.5 * ((mixture == target) & self.valid)[:, 1:].sum(axis=1)
        return np.where(self.hits & (ranks < cutoff), 1.0 / np.log2(ranks + 2.0), 0.0)

    def standard_error(self, weights: Mapping[str, float], temperatures: Mapping[str, float], cutoff: int) -> float:
        """Of `ndcg`."""
        return float(self._ndcgs(weights, temperatures, cutoff).std() / np.sqrt(max(1, len(self))))

    def log_loss(self, weights: Mapping[str, float], temperatures: Mapping[str, float]) -> float:
        """Mean log loss, in nats, of the targets that may be answered under a mixture; 0 without any."""
        if not self.hits.any():
            return 0.0
        shares = [weight * self._probability(name, temperatures[name])[self.hits, 0] for name, weight in weights.items() if weight > 0]
        return float(-np.log(np.maximum(np.sum(shares, axis=0), 1e-30)).mean())

    def _probability(self, name: str, temperature: float) -> np.ndarray:
        key = (name, round(temperature, 9))
        if key not in self._probabilities:
            if len(self._probabilities) > KEPT_PROBABILITIES:
                self._probabilities.pop(next(iter(self._probabilities)))
            exponents = self.scores[name] * np.float32(1.0 / temperature) - self.log_normaliser(name, temperature)[:, None]
            self._probabilities[key] = np.exp(exponents)
        return self._probabilities[key]

    def log_normaliser(self, name: str, temperature: float) -> np.ndarray:
        """(V,) float32 log of the sum of exp(score / temperature) over the whole catalogue."""
        key = (name, round(temperature, 9))
        if key not in self._normalisers:  # a number a query, but made from the whole catalogue: never twice
            inverse = np.float32(1.0 / temperature)
            masses = [np.exp(shifted.astype(np.float32) * inverse).sum(axis=1) for shifted, _ in self._full[name]]
            peaks = np.concatenate([peak for _, peak in self._full[name]])
            self._normalisers[key] = peaks * inverse + np.log(np.concatenate(masses))
        return self._normalisers[key]
