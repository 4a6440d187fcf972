"""Where the targets stand at each stage of the pipeline, gathered batch by batch.

Legend: B queries of a batch, Q of all batches, N items, K candidates, S sources.
"""

from collections import defaultdict
from typing import Any

import numpy as np

from raysys.evaluate import metrics
from raysys.models.base import top_k
from raysys.pipeline import Pipeline, seen_mask
from raysys.queries import Queries
from raysys.schema import UNKNOWN_ITEM


class Stages:
    """Ranks of the targets at each stage, gathered batch by batch.

    Attributes:
        ranks: stage -> list of (B,) ranks; stages are "final", "retrieval", the sources, and "unmasked NAME" of each; masked as the
            first are, also "without NAME", fused retrieval without that source, and "union", the best rank by any source of the mixture.
        lists: (B, K) final lists of each batch.
        repeated: targets that the user had seen before.
        empty: queries without any history.
    """

    def __init__(self, pipeline: Pipeline, *, mask: bool, list_k: int, seed: int):
        self.pipeline, self.mask, self.list_k = pipeline, mask, list_k
        self.rng, self.rng_without = np.random.default_rng(seed), np.random.default_rng([seed, 1])
        # Sources that fusion switched off are measured too: the table says why they were.
        self.unused = {name: model for name, model in pipeline.bundle.models.items() if name != "ranker" and name not in pipeline.sources}
        self.source_names = [*pipeline.sources, *self.unused]
        self.mixed = [name for name in pipeline.sources if pipeline.fusion.weights[name] > 0]
        self.ranks: dict[str, list[np.ndarray]] = defaultdict(list)
        self.lists: list[np.ndarray] = []
        self.repeated = self.empty = 0
        self._targets: list[np.ndarray] = []
        self._logged: list[np.ndarray] = []
        self._candidates: list[tuple[np.ndarray, np.ndarray]] = []

    def targets(self) -> np.ndarray:
        """(Q,) int32 item rows."""
        return np.concatenate(self._targets)

    def add(self, queries: Queries, targets: np.ndarray) -> None:
        """Run all stages for one batch.

        Args:
            queries: B histories.
            targets: (B,) int32 item rows, UNKNOWN_ITEM possible.
        """
        log_probs = self.pipeline.source_log_probs(queries)
        unseen = seen_mask(queries, self.pipeline.num_items)
        self.repeated += int((~unseen[np.arange(len(targets)), targets] & (targets != UNKNOWN_ITEM)).sum())
        self.empty += int((queries.lengths == 0).sum())
        self._targets.append(targets)
        scores = {**log_probs, **{name: model.scores(queries) for name, model in self.unused.items()}}
        for prefix, allowed in (("", unseen), ("unmasked ", None)) if self.mask else (("", None),):
            for name, values in scores.items():
                self.ranks[prefix + name].append(metrics.target_ranks(values, targets, allowed, self.rng))
            retrieved = self.pipeline.retrieve(queries, allowed=allowed, log_probs=log_probs)
            ranked, probabilities = self.pipeline.rank(queries, retrieved.candidates)
            final = np.take_along_axis(retrieved.candidates.items, top_k(ranked, self.list_k), 1)
            self.ranks[prefix + "retrieval"].append(metrics.list_ranks(retrieved.candidates.items, targets))
            self.ranks[prefix + "final"].append(metrics.list_ranks(final, targets))
            if not prefix:
                self._add_mixture(log_probs, queries.lengths == 0, targets, allowed)
                self.lists.append(final)
                items = retrieved.candidates.items
                self._candidates.append((probabilities[items >= 0], (items == targets[:, None])[items >= 0]))
                self._logged.append(self._probabilities_of(queries, targets, log_probs))

    def _add_mixture(self, log_probs: dict[str, np.ndarray], empty: np.ndarray, targets: np.ndarray, allowed: np.ndarray | None) -> None:
        """What each source in the mixture adds: fused retrieval without it, and the best rank that any of them gives."""
        best = np.stack([self.ranks[name][-1] for name in self.mixed])
        best = np.where(best > 0, best, np.iinfo(np.int64).max).min(axis=0)
        self.ranks["union"].append(np.where(best < np.iinfo(np.int64).max, best, 0))
        for name in self.mixed if len(self.mixed) > 1 else ():
            rest = {other: values for other, values in log_probs.items() if other in self.mixed and other != name}
            fused = self.pipeline.fusion.fuse(rest, empty=empty)
            self.ranks[f"without {name}"].append(metrics.target_ranks(fused, targets, allowed, self.rng_without))

    def add_shown(self, queries: Queries, items: np.ndarray) -> None:
        """Events that say only that an item was shown (or skipped): examples for the ranker; call after all `add`.

        Args:
            queries: B histories.
            items: (B,) int32 item rows, UNKNOWN_ITEM possible.
        """
        self._logged.append(self._probabilities_of(queries, items, self.pipeline.source_log_probs(queries)))

    def _probabilities_of(self, queries: Queries, items: np.ndarray, log_probs: dict[str, np.ndarray]) -> np.ndarray:
        """(B,) float32 probability of one item a query, ranked alone; NaN where it is unknown or the ranker not calibrated."""
        known = items != UNKNOWN_ITEM
        alone = self.pipeline.candidates_of(queries, np.where(known, items, 0)[:, None], log_probs=log_probs)
        return np.where(known, self.pipeline.rank(queries, alone)[1][:, 0], np.nan)

    def ranker_figures(self, positive: np.ndarray) -> dict[str, Any]:
        """AUC, log-loss and calibration of the ranker's probabilities; null where they cannot be had.

        Args:
            positive: (Q,) bool, whether each event is positive: all of `add`, then all of `add_shown`.
        """
        logged = np.concatenate(self._logged)
        known = ~np.isnan(logged)
        if known.any() and 0 < positive[known].sum() < known.sum():
            probabilities, labels = logged[known], positive[known]
            label, negatives = "positive event", "logged events that are not positive"
        else:
            probabilities, labels = (np.concatenate(parts) for parts in zip(*self._candidates, strict=True))
            label, negatives = "held-out item", "the other retrieved candidates"
        given = ~np.isnan(probabilities)  # none for empty histories
        probabilities, labels = probabilities[given], labels[given]
        if not len(probabilities):
            return {"auc": None, "logloss": None, "ece": None, "label": None, "negatives": None}
        curve = metrics.reliability(probabilities, labels)
        return {
            "auc": metrics.auc(probabilities, labels),
            "logloss": metrics.log_loss(probabilities, labels),
            "ece": metrics.calibration_error(curve),
            "label": label,
            "negatives": negatives,
            "examples": len(labels),
            "base_rate": float(labels.mean()),
            "logloss_of_base_rate": metrics.log_loss(np.full(len(labels), labels.mean()), labels),
            "reliability": curve,
        }
