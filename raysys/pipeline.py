"""One request, or a batch of them, from history to ranked items. No Ray, no HTTP, no state.

Serving, evaluation, training of the ranker and the command line all run this
code; that is what makes an offline figure a statement about the live answer.

A source scores the whole catalogue, or, where that is large and `pooled` was called, names its best items by an index (`pools/`).

Legend: B queries, N catalogue items, K candidates, S sources, D content dimension.
"""

from dataclasses import dataclass

import numpy as np

from raysys.bundle import Bundle
from raysys.models.base import Candidates, top_k
from raysys.models.frozen_encoder import freeze_encoder
from raysys.models.frozen_ranker import freeze_ranker
from raysys.models.fusion import Fusion
from raysys.models.popularity import Popularity
from raysys.pools.config import PoolConfig
from raysys.pools.open import open_pools
from raysys.pools.retrieve import Pools
from raysys.queries import Queries

Blocked = tuple[np.ndarray, np.ndarray]
"""(indptr (B+1,), rows): item rows that must not be answered to each query."""
JUDGED = 50
"""Places of an answer that get the judge's probability: it costs as much as the rest of ranking, and lists are rarely longer."""
LIVE_FIRST_RANK = 3
"""Best place (0-based) a brand-new item can take: it displaces nobody from the very top unseen."""
LIVE_MAX_RANK = 15
"""A new item is shown only where fewer than this many catalogue items fit the user better by content."""
LIVE_TOLERANCE = 0.9
"""Content scores within a tenth of each other count as equal: a new item need not beat a whole series of its like."""
LIVE_MAX_SHARE = 0.3
"""At most this share of an answer are brand-new items."""


@dataclass(frozen=True)
class Retrieved:
    """Candidates, and what it takes to place items that no model row knows yet.

    Attributes:
        candidates: K per query, best fused first.
        profiles: (B, D) float32 content profile of each history; None where nobody wants it, or without content vectors.
        affinity: (B, closest) float32 content scores of the best fitting catalogue items that may be answered, descending; likewise.
    """

    candidates: Candidates
    profiles: np.ndarray | None
    affinity: np.ndarray | None


@dataclass(frozen=True)
class Reason:
    """Why an item is in the answer: the source that spoke for it most, and the past item behind it."""

    kind: str
    because: int | None = None
    """Item row of the history that contributed most, None where no single one did."""


class Pipeline:
    """The models of one bundle, composed."""

    def __init__(self, bundle: Bundle, *, num_candidates: int | None = None):
        self.bundle = bundle
        self.num_candidates = num_candidates or bundle.num_candidates
        self.ranker_weight = float(bundle.fusion.get("ranker_weight", 0.0))
        self.ranker = bundle.models.get("ranker")
        self.content = bundle.models.get("content")
        self.use(Fusion.from_dict(bundle.fusion["mixture"]))

    def use(self, fusion: Fusion) -> None:
        """Set the mixture, and with it the sources that are computed: those with weight, and those the ranker looks at."""
        self.fusion = fusion
        self.pools: Pools | None = None
        # A retrieval replica holds no ranker, but must compute what the ranker elsewhere looks at.
        looked_at = self.ranker.sources if self.ranker is not None else self.bundle.fusion.get("ranker_sources", ())
        models = self.bundle.models
        self.sources = {
            name: models[name] for name, weight in fusion.weights.items() if name in models and (weight > 0 or name in looked_at)
        }

    def to(self, device: str) -> "Pipeline":
        """Compute on this device of torch from now on, where a model uses torch at all; the others stay as they are."""
        for model in self.bundle.models.values():
            if hasattr(model, "to"):
                model.to(device)
        return self

    def frozen(self) -> "Pipeline":
        """Encode and rank in fewer operations from now on, to the same figures but for rounding: for whoever answers one at a time."""
        if "interest" in self.bundle.models:
            freeze_encoder(self.bundle.models["interest"])
        if self.ranker is not None:
            freeze_ranker(self.ranker)
        return self

    def pooled(self, config: PoolConfig, *, folder: str | None = None) -> "Pipeline":
        """Retrieve from pools from now on, where the catalogue is as large as the settings say; see `pools.open.open_pools`."""
        self.pools = open_pools(self.bundle, self.sources, self.fusion, config, folder=folder)
        return self

    @property
    def num_items(self) -> int:
        """N, items with a model row."""
        return self.bundle.items.num_rows

    def source_log_probs(self, queries: Queries) -> dict[str, np.ndarray]:
        """(B, N) float32 log-probability of the next item under each source in use, of every item whatever the catalogue's size.

        Read-only, since what is the same for all queries is computed once for all.
        """
        found = {}
        for name, model in self.sources.items():
            alike = isinstance(model, Popularity)
            found[name] = self.fusion.log_probs(model.log_counts[None, :] if alike else model.scores(queries), name)
            if alike:
                found[name] = np.broadcast_to(found[name], (len(queries), self.num_items))
        return found

    def retrieve(
        self,
        queries: Queries,
        k: int | None = None,
        *,
        allowed: np.ndarray | None = None,
        blocked: Blocked | None = None,
        log_probs: dict[str, np.ndarray] | None = None,
        closest: int = 0,
    ) -> Retrieved:
        """Fuse the sources over the catalogue, mask, take the best; from pools where there are and no log-probabilities are given.

        Args:
            queries: B histories.
            k: candidates a query; the bundle's number when None.
            allowed: (B, N) or (N,) bool; masked before the cut, so that filters still return k items.
            blocked: rows that are masked too.
            log_probs: what `source_log_probs(queries)` gave, when the caller has it already.
            closest: best content scores wanted of each query, for `live_ranks`; 0 for none, nor profiles.
        """
        k = self.num_candidates if k is None else k
        if log_probs is None and self.pools is not None:
            return Retrieved(*self.pools.retrieve(queries, k, allowed=allowed, blocked=blocked, closest=closest))
        if log_probs is None:
            log_probs = self.source_log_probs(queries)
        fused = _masked(self.fusion.fuse(log_probs, empty=queries.lengths == 0), -np.inf, allowed, blocked)
        items = top_k(fused, k)
        fused_BK = np.take_along_axis(fused, items, 1)
        per_source = _gather(log_probs, items)
        items = np.where(np.isfinite(fused_BK), items, -1).astype(np.int32)
        candidates = Candidates(items, fused_BK.astype(np.float32), per_source, tuple(log_probs))
        if self.content is None or not closest:
            return Retrieved(candidates, None, None)
        profiles = self.content.user_vectors(queries)
        # Where content is a source the order is known already; the product with all items is not done twice.
        near = log_probs["content"].copy() if "content" in log_probs else profiles @ self.content.item_vectors.T
        near = _masked(near, -np.inf, allowed, blocked)
        best = top_k(near, closest)
        affinity = np.einsum("bd,bkd->bk", profiles, self.content.item_vectors[best])
        return Retrieved(candidates, profiles, np.where(np.isfinite(np.take_along_axis(near, best, 1)), affinity, np.float32(-1.0)))

    def candidates_of(self, queries: Queries, items: np.ndarray, *, log_probs: dict[str, np.ndarray] | None = None) -> Candidates:
        """Given items as candidates, with what retrieval says about them.

        Args:
            queries: B histories.
            items: (B, K) int item rows, all real.
            log_probs: what `source_log_probs(queries)` gave, when the caller has it already.
        """
        if log_probs is None:
            found = self._log_probs_of(queries, items)
        else:
            found = {name: np.take_along_axis(values, items, 1) for name, values in log_probs.items()}
        fused = self.fusion.fuse(found, empty=queries.lengths == 0)
        return Candidates(items.astype(np.int32), fused.astype(np.float32), np.stack(list(found.values()), axis=-1), tuple(found))

    def _log_probs_of(self, queries: Queries, items: np.ndarray) -> dict[str, np.ndarray]:
        """(B, K) float32 log-probability of given (B, K) items under each source in use."""
        if self.pools is not None:
            return self.pools.log_probs(queries, items)
        return {name: np.take_along_axis(values, items, 1) for name, values in self.source_log_probs(queries).items()}

    def rank(self, queries: Queries, candidates: Candidates) -> tuple[np.ndarray, np.ndarray]:
        """Scores to order candidates by, and calibrated probabilities.

        Returns:
            (B, K) float32 scores (-inf at padding) and (B, K) float32 P(positive event | shown), NaN where not calibrated and, where
            there is a judge, beyond the first JUDGED places.
        """
        if self.ranker is None:
            return candidates.fused, np.full(candidates.items.shape, np.nan, np.float32)
        logits, probabilities = self.ranker.score(queries, candidates)
        scores = candidates.fused if self.ranker_weight == 0.0 else mix_scores(candidates.fused, logits, self.ranker_weight)
        if self.ranker.judge is not None:
            best = top_k(scores, JUDGED)
            np.put_along_axis(probabilities, best, self.ranker.judged(queries, candidates.take(np.arange(len(queries)), best)), 1)
        return scores, probabilities

    def recommend(
        self, queries: Queries, n: int, *, allowed: np.ndarray | None = None, blocked: Blocked | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The n best items a query, as (B, n) int32 rows (-1 padded), scores and probabilities."""
        candidates = self.retrieve(queries, max(n, self.num_candidates), allowed=allowed, blocked=blocked).candidates
        scores, probabilities = self.rank(queries, candidates)
        order = top_k(scores, n)
        picked = (np.take_along_axis(array, order, 1) for array in (candidates.items, scores, probabilities))
        items, scores, probabilities = picked
        return items, scores, probabilities

    def explain(self, query: Queries, items: np.ndarray) -> list[Reason]:
        """One reason an item for a single query.

        Args:
            query: B = 1.
            items: (K,) item rows.
        """
        log_probs = self._log_probs_of(query, np.asarray(items)[None, :])
        names = [name for name in log_probs if self.fusion.weights[name] > 0]
        shares = np.stack([np.log(self.fusion.weights[name]) + log_probs[name][0] for name in names])
        if len(query.items) == 0:
            return [Reason("popularity")] * len(items)
        models = self.bundle.models
        named = [name for name in ("covisit", "recent", "kinds", "linear") if name in models]
        because: dict[str, np.ndarray] = {name: models[name].contributions(query, items) for name in named}
        if self.content is not None:
            similar = self.content.item_vectors[query.items] @ self.content.item_vectors[items].T
            because["content"] = np.where(similar.max(axis=0) > 0, query.items[similar.argmax(axis=0)], -1)
        reasons = []
        for column, winner in enumerate(shares.argmax(axis=0)):
            kind = names[winner]
            # The encoder names no past item; the strongest co-visited one is the most understandable hint.
            source = because.get("covisit" if kind == "interest" else kind)
            item = int(source[column]) if source is not None else -1
            reasons.append(Reason(kind, item if item >= 0 else None))
        return reasons


def _masked(values: np.ndarray, hidden: float, allowed: np.ndarray | None, blocked: Blocked | None) -> np.ndarray:
    """(B, N) values, or `hidden` where an item may not be answered; may write into `values`."""
    if allowed is not None:
        values = np.where(allowed, values, np.float32(hidden))
    if blocked is not None:
        values[np.repeat(np.arange(len(values)), np.diff(blocked[0])), blocked[1]] = hidden
    return values


def _gather(log_probs: dict[str, np.ndarray], items: np.ndarray) -> np.ndarray:
    """(B, K, S) float32 of the given (B, K) columns of each source."""
    return np.stack([np.take_along_axis(values, items, 1) for values in log_probs.values()], axis=-1).astype(np.float32)


def seen_mask(queries: Queries, num_items: int) -> np.ndarray:
    """(B, N) bool, True where the item is not in the query's history."""
    allowed = np.ones((len(queries), num_items), bool)
    allowed[queries.rows, queries.items] = False
    return allowed


def mix_scores(fused: np.ndarray, logits: np.ndarray, weight: float) -> np.ndarray:
    """Retrieval's log-probability plus `weight` times the ranker's, both normalised over the candidates.

    Args:
        fused: (B, K) float32, -inf at padding.
        logits: (B, K) float32, -inf at padding.
        weight: dimensionless, 0 keeps retrieval order.
    """
    with np.errstate(invalid="ignore"):
        mixed = _log_softmax(fused) + weight * _log_softmax(logits)
    return np.where(np.isfinite(fused), mixed, -np.inf).astype(np.float32)


def _log_softmax(values: np.ndarray) -> np.ndarray:
    peak = values.max(axis=1, keepdims=True)
    peak = np.where(np.isfinite(peak), peak, 0.0)
    with np.errstate(divide="ignore"):
        return values - peak - np.log(np.exp(values - peak).sum(axis=1, keepdims=True))


def live_ranks(profile: np.ndarray, affinity: np.ndarray, live_vectors: np.ndarray) -> np.ndarray:
    """Places for items that no model knows yet, by how well their content fits one user.

    A new item takes the place that content alone would give it among the whole
    catalogue, a little below the top: the first of its kind does not have to
    beat what the models are sure of, and a user whom it does not fit never sees it.

    Args:
        profile: (D,) float32 content profile of the user.
        affinity: (P,) float32, the user's best content scores, descending.
        live_vectors: (M, D) float32 unit content vectors of the new items.

    Returns:
        (M,) int64 0-based rank in the answer, or -1 where the item does not fit.
    """
    scores = live_vectors @ profile
    better = (affinity[None, :] * LIVE_TOLERANCE > scores[:, None]).sum(axis=1)
    fits = (better < len(affinity)) & (scores > 0)
    return np.where(fits, LIVE_FIRST_RANK + better, -1)


@dataclass(frozen=True)
class Answer:
    """A finished answer for one user, without HTTP around it."""

    strategy: str
    """`personalized` for a user with history, else `cold_start`."""
    items: list[int]
    scores: list[float]
    probabilities: list[float | None]


def recommend_user(bundle: Bundle, user_id: str, k: int) -> Answer:
    """The k best unseen items for a user of the bundle, or by popularity for a stranger."""
    history = bundle.histories.lookup(user_id)
    if history is None:
        empty = np.zeros(0, np.int64)
        history = (empty.astype(np.int32), empty.astype(np.int8), empty, empty.astype(np.float32))
    items, events, times, values = history
    now = times[-1] if len(times) else bundle.manifest.get("watermark") or 0
    queries = Queries(items, events, times, values, np.array([0, len(items)], np.int64), np.array([now], np.int64))
    allowed = seen_mask(queries, bundle.items.num_rows) & available_mask(bundle)
    rows, scores, probabilities = Pipeline(bundle).recommend(queries, k, allowed=allowed)
    found = rows[0] >= 0
    return Answer(
        "personalized" if len(items) else "cold_start",
        rows[0][found].tolist(),
        scores[0][found].tolist(),
        [None if np.isnan(p) else float(p) for p in probabilities[0][found]],
    )


def available_mask(bundle: Bundle) -> np.ndarray:
    """(N,) bool, False for items that the catalogue marks as not available."""
    if "available" not in bundle.items.column_names:
        return np.ones(bundle.items.num_rows, bool)
    return bundle.items["available"].fill_null(True).to_numpy()
