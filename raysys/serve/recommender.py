"""One HTTP request, from checked body to answer. No Ray and no FastAPI here.

Owns the order of things: who the user is, what they did, what may be shown,
retrieval, ranking, live items, diversity, reasons; and what to do when a stage
fails. Models run behind `Backend`, wherever that is.

Legend: K candidates, N bundle items, M live items.
"""

import itertools
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from raysys.bundle import Bundle
from raysys.errors import StateError
from raysys.events.state import UserState
from raysys.models.base import Candidates, top_k
from raysys.pipeline import LIVE_MAX_RANK, LIVE_MAX_SHARE, live_ranks
from raysys.queries import Queries
from raysys.schema import HistoryEvent
from raysys.serve.api import HistoryItem, RankBody, RecommendBody
from raysys.serve.catalogue import Catalogue
from raysys.serve.fallback import Followers, fallback
from raysys.serve.metrics import Metrics
from raysys.serve.request import Budget, Deadline, Lack, Ranked, Stages
from raysys.serve.stage import Stage
from raysys.serve.trouble import Trouble

LOG = logging.getLogger("ray.serve")
T = TypeVar("T")
NO_MODEL = Lack("no_model", "no model published")
SOURCE_SHARE = 0.1
"""A source is named for an item when at least this share of the item's fused probability is its."""
REASON_TEXT = {
    "covisit": "people who chose {title} chose this next",
    "recent": "people who choose {title} these days choose this next",
    "kinds": "people who choose things like {title} go on to this these days",
    "linear": "goes with {title}",
    "interest": "fits what you have been choosing, {title} above all",
    "dot_product": "fits what you have been choosing",
    "content": "similar to {title}",
    "popularity": "popular now",
    "new": "new, and similar to what you like",
}
REASON_TEXT_WITHOUT_ITEM = {
    "interest": "fits what you have been choosing",
    "covisit": "often chosen next",
    "recent": "often chosen next these days",
    "kinds": "what people go on to these days",
    "linear": "goes with what you chose",
    "content": "fits your taste",
}


@dataclass(frozen=True)
class RetrievedOne:
    """Retrieval's answer for one query: `pipeline.Retrieved` without the batch axis."""

    items: np.ndarray
    """(K,) int32, best first, without padding."""
    fused: np.ndarray
    """(K,) float32 log-probability."""
    log_probs: np.ndarray
    """(K, S) float32 by source."""
    sources: tuple[str, ...]
    profile: np.ndarray | None
    affinity: np.ndarray | None
    """(closest,) float32 or more; neither where none were wanted of its batch."""


class Backend(Protocol):
    """Where the models run; every call names the version, so that one answer never mixes two."""

    async def retrieve(
        self, version: str, query: Queries, k: int, allowed: np.ndarray | None, blocked: np.ndarray, closest: int = 0
    ) -> RetrievedOne:
        """K candidates among `allowed` (N,) bool without the `blocked` rows, and as many of the `closest` content scores."""
        ...

    async def rank(self, version: str, query: Queries, retrieved: RetrievedOne) -> tuple[np.ndarray, np.ndarray]:
        """(K,) scores and (K,) probabilities (NaN where not calibrated)."""
        ...

    async def explain(self, version: str, query: Queries, items: np.ndarray) -> list[tuple[str, int | None]]:
        """(kind, item row behind it or None) for each item row."""
        ...


@dataclass
class Version:
    """What the ingress holds of a bundle: everything but the models that score."""

    bundle: Bundle
    catalogue: Catalogue
    popular: np.ndarray
    """(N,) int64 item rows by training interactions, descending: the last resort."""
    followers: Followers | None = None
    """What follows each item: the resort before that; None where it is switched off or the bundle has no co-visitation."""
    weights: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, bundle: Bundle, catalogue: Catalogue, width: int = 20) -> "Version":
        """Build from a bundle opened for the ingress.

        Args:
            bundle: with its content vectors and, for followers, its co-visitation.
            catalogue: of the same bundle.
            width: followers kept an item; 0 for none.
        """
        counts = bundle.items["num_train"].to_numpy()
        covisit = bundle.models.get("covisit")
        followers = Followers.of(covisit, width) if width and covisit is not None else None
        return cls(bundle, catalogue, np.argsort(-counts, kind="stable"), followers, bundle.fusion["mixture"]["weights"])


@dataclass(frozen=True)
class _Past:
    """What somebody did: E events that the bundle knows, as its rows, then what came since."""

    rows: np.ndarray  # (E,) int32
    codes: np.ndarray  # (E,) int8 event codes
    times: np.ndarray  # (E,) int64 UTC epoch seconds
    values: np.ndarray  # (E,) float32, NaN for none
    since: list[HistoryEvent]


NO_PAST = (np.zeros(0, np.int32), np.zeros(0, np.int8), np.zeros(0, np.int64), np.zeros(0, np.float32))


class Recommender:
    """Answers requests with one version's models and the present state.

    Args:
        state: history, users, item changes.
        backend: runs the models.
        clock: UTC epoch seconds now.
        budget: time limits of a request and its stages.
        metrics: what is counted, here and by whoever shares it.
        history_limit: last events handed to the models.
    """

    def __init__(
        self,
        state: UserState,
        backend: Backend,
        *,
        clock: Callable[[], float] = time.time,
        budget: Budget | None = None,
        metrics: Metrics | None = None,
        history_limit: int = 200,
    ):
        self.state, self.backend, self.clock = state, backend, clock
        self.budget = budget or Budget()
        self.history_limit = history_limit
        self.metrics = metrics or Metrics()
        self.metrics.before_export.append(self._measure_version)
        self.trouble = Trouble()
        self._retrieval, self._ranking, self._explaining = Stage("retrieval"), Stage("ranking"), Stage("explain")
        self.version: Version | None = None
        self._empty = Catalogue(_no_items())

    @property
    def catalogue(self) -> Catalogue:
        """The items of the current version, or only the live ones while nothing is published."""
        return self.version.catalogue if self.version is not None else self._empty

    def sync_items(self) -> None:
        """Take in item changes of any process; cheap when there are none."""
        catalogue = self.catalogue
        if self._from_state(self.state.item_sequence, 0) > catalogue.sequence:
            catalogue.apply(self._from_state(lambda: self.state.items_since(catalogue.sequence), []))

    async def recommend(self, body: RecommendBody, deadline: Deadline | None = None) -> dict[str, Any]:
        """Answer `POST /v1/recommend`.

        Args:
            body: the request.
            deadline: when the answer is due; by the budget when None.

        Raises:
            SchemaError: a filter that is not understood.
        """
        stages, deadline = Stages(), deadline or Deadline.after(self.budget.whole_s)
        self.sync_items()
        version = self.version
        past, strategy, unread = self._past(body, version)
        stages.mark("state")
        compiled = self.catalogue.compile(body.filter)
        blocked_ids, blocked = self._blocked(body, past, version)
        wanted = None if body.include is None else set(body.include)
        if version is None:
            ranked = self._fallback(body.offset + body.n, None, blocked_ids, wanted, body.filter)
            return self._answer(body, ranked, stages, strategy="fallback", lack=NO_MODEL)
        query = self._query(version, past)
        strategy, lack = self._checked(version, body.user_id, query, strategy)
        allowed = self._allowed(version, body.filter, wanted)
        need = body.offset + body.n
        k = max(version.bundle.num_candidates, need + 1)
        # What is close by content is only compared with new items, and only for who has a history.
        closest = LIVE_MAX_RANK if strategy != "cold_start" and self.catalogue.live_matrix[0] else 0
        try:
            retrieved = await self._retrieval.ask(
                deadline,
                self.budget.retrieval_s,
                lambda: self.backend.retrieve(version.bundle.version, query, k, allowed, blocked, closest),
            )
        except Exception as error:  # whatever broke, what follows the last items and what is popular still answers
            failed = self._failed("retrieval", error)
            stages.mark("retrieval")
            blocked_ids |= {version.catalogue.item_ids[row] for row in blocked}
            ranked = self._fallback(need, query, blocked_ids, wanted, body.filter)
            stages.mark("rerank")
            return self._answer(body, ranked, stages, strategy="fallback", lack=failed)
        stages.mark("retrieval")
        scores, probabilities, unranked = await self._rank(version, query, retrieved, deadline)
        lack = lack or unranked or unread
        stages.mark("ranking")
        order = np.argsort(-scores, kind="stable")
        if body.diversity > 0:
            order = self._diversify(version, retrieved.items, scores, order, need, body.diversity)
        order = order[:need]
        ranked = self._ranked(version, query, retrieved, order, scores, probabilities, by="retrieval" if unranked else "ranking")
        if closest:
            self._insert_live(ranked, retrieved, blocked_ids, wanted, compiled, need)
        stages.mark("rerank")
        reasons = None
        if body.explain:
            reasons = await self._reasons(version, query, ranked, deadline)
            stages.mark("explain")
        return self._answer(body, ranked, stages, strategy=strategy, lack=lack, reasons=reasons)

    async def rank(self, body: RankBody, deadline: Deadline | None = None) -> dict[str, Any]:
        """Answer `POST /v1/rank`: the given items in the user's order; unknown ones last, with score null.

        Args:
            body: the request.
            deadline: when the answer is due; by the budget when None.
        """
        stages, deadline = Stages(), deadline or Deadline.after(self.budget.whole_s)
        self.sync_items()
        version = self.version
        past, strategy, unread = self._past(body, version)
        stages.mark("state")
        candidates = list(dict.fromkeys(body.candidates))
        usable = [
            item for item in candidates if self.catalogue.known(item) and self.catalogue.attributes(item).get("available") is not False
        ]
        if version is None:
            return self._answer(body, Ranked("popularity").with_rest(usable), stages, strategy="fallback", lack=NO_MODEL)
        query = self._query(version, past)
        rows = np.array([row for item in usable if (row := version.catalogue.index.get(item)) is not None], np.int64)
        strategy, lack = self._checked(version, body.user_id, query, strategy)
        allowed = np.zeros(len(version.catalogue.item_ids), bool)
        allowed[rows] = True
        try:
            retrieved = await self._retrieval.ask(
                deadline,
                self.budget.retrieval_s,
                lambda: self.backend.retrieve(version.bundle.version, query, max(1, len(rows)), allowed, np.zeros(0, np.int32)),
            )
        except Exception as error:
            failed = self._failed("retrieval", error)
            stages.mark("retrieval")
            ranked = self._fallback(len(usable), query, set(), set(usable), {})
            return self._answer(body, ranked.with_rest(candidates), stages, strategy="fallback", lack=failed)
        stages.mark("retrieval")
        scores, probabilities, unranked = await self._rank(version, query, retrieved, deadline)
        lack = lack or unranked or unread
        stages.mark("ranking")
        order = np.argsort(-scores, kind="stable")
        ranked = self._ranked(version, query, retrieved, order, scores, probabilities, by="retrieval" if unranked else "ranking")
        reasons = await self._reasons(version, query, ranked, deadline) if body.explain else None
        return self._answer(body, ranked.with_rest(candidates), stages, strategy=strategy, lack=lack, reasons=reasons)

    async def similar(self, item_id: str, n: int, deadline: Deadline | None = None) -> dict[str, Any]:
        """Answer `GET /v1/items/{item_id}/similar`: what follows from that item alone; for one that no model knows yet, by content."""
        stages, body = Stages(), RecommendBody(history=[HistoryItem(item_id=item_id)], n=n, return_metadata=True)
        self.sync_items()
        version, vector = self.version, self.catalogue.live.get(item_id)
        if version is None or vector is None or version.bundle.content_vectors is None:
            return await self.recommend(body, deadline)
        ids, live_vectors = self.catalogue.live_matrix
        known = np.where(version.catalogue.available, version.bundle.content_vectors @ vector, -np.inf)
        scores, names = np.concatenate([known, live_vectors @ vector]), version.catalogue.item_ids
        ranked = Ranked("content")
        for at in top_k(scores[None, :], n + 1)[0].tolist():
            name, row = (names[at], at) if at < len(names) else (ids[at - len(names)], -1)
            if name != item_id and scores[at] > 0:
                ranked.append(name, row, "content", round(float(scores[at]), 6))
        return self._answer(body, ranked, stages, strategy="session", lack=None)

    def held_about(self, user_id: str) -> dict[str, Any]:
        """Answer `GET /v1/users/{user_id}`: all that state and the current bundle hold about a user."""
        erased_at, version = self.state.erased_at(user_id), self.version
        learnt = None if erased_at is not None or version is None else version.bundle.histories.lookup(user_id)
        events = [
            {"item_id": event.item_id, "event": event.event, "timestamp": event.timestamp, "value": event.value}
            for event in self.state.history(user_id)
        ]
        training = []
        if learnt is not None and version is not None:
            ids, names = version.catalogue.item_ids, version.bundle.events
            training = [
                {"item_id": ids[i], "event": names[e], "timestamp": int(t), "value": _value(v)} for i, e, t, v in zip(*learnt, strict=True)
            ]
        held = {"user_id": user_id, "attributes": self.state.user(user_id) or {}, "events": events, "training_events": training}
        seen = {"counters": self.state.counters(user_id), "seen": sorted(self.state.seen(user_id))}
        if erased_at is None:
            return {**held, **seen, "erasure": None}
        version_name, holds = self.last_version_with(user_id)
        return {**held, **seen, "erasure": {"at": erased_at, "first_version_without": None if holds else version_name}}

    def last_version_with(self, user_id: str) -> tuple[str | None, bool]:
        """The version in use, and whether its histories hold the user, hidden or not."""
        version = self.version
        if version is None:
            return None, False
        return version.bundle.version, version.bundle.histories.lookup(user_id) is not None

    def _failed(self, stage: str, error: Exception) -> Lack:
        """Count a failed stage; the first of each kind, and then every thousandth, is logged with where it happened."""
        kind, counted = type(error).__name__, self.metrics.stage_failures
        if counted.values.get((stage, kind), 0) % 1000 == 0:
            LOG.warning("%s failed: %s: %s", stage, kind, error, exc_info=error)
        counted.add(stage, kind)
        return Lack(stage, f"{stage} failed ({kind})")

    def _measure_version(self) -> None:
        """Gauges of the version in use, as of now."""
        if self.version is None:
            return
        manifest, now = self.version.bundle.manifest, self.clock()
        self.metrics.model_info.only(1, self.version.bundle.version)
        if manifest.get("created"):
            self.metrics.model_age_s.set(now - datetime.fromisoformat(manifest["created"]).timestamp())
        if manifest.get("watermark") and manifest.get("time") != "ordinal":
            self.metrics.newest_event_age_s.set(now - manifest["watermark"])

    def _from_state(self, read: Callable[[], T], otherwise: T) -> T:
        """What the state says, or `otherwise` where it cannot be reached: an answer without a history is better than none."""
        try:
            return read()
        except StateError as error:
            self._failed("state", error)
            return otherwise

    def _past(self, body: RecommendBody | RankBody, version: Version | None) -> tuple[_Past, str, Lack | None]:
        """Bundle history, then events since, then what the request itself brings; the strategy if the models know any of it; what fails."""
        unread: list[HistoryEvent] = []
        unknown: float | None = 0.0
        learnt = NO_PAST
        events: list[HistoryEvent] = []
        live: list[HistoryEvent] = []
        if body.user_id is not None:
            user_id = body.user_id
            live = self._from_state(lambda: self.state.history(user_id), unread)
            # A state that cannot be read cannot say who was erased either.
            if version is not None and live is not unread and self._from_state(lambda: self.state.erased_at(user_id), unknown) is None:
                learnt = _bundle_history(version, user_id, live)
            events += live
        if body.session_id is not None and body.user_id is None:
            session_id = body.session_id
            live = self._from_state(lambda: self.state.session_history(session_id), unread)
            events += live
        known = len(learnt[0]) + len(events)
        strategy = "personalized" if known and body.user_id is not None else "session" if known else "cold_start"
        if body.history:
            now = self.clock()
            for entry in body.history:
                item = HistoryItem(item_id=entry) if isinstance(entry, str) else entry
                events.append(HistoryEvent(item.item_id, item.event, item.timestamp or now, item.value))
            strategy = strategy if strategy == "personalized" else "session"
        return _Past(*learnt, events), strategy, Lack("state", "state cannot be read (StateError)") if live is unread else None

    def _blocked(self, body: RecommendBody, past: _Past, version: Version | None) -> tuple[set[str], np.ndarray]:
        """Items that must not be in the answer: ids, and (n,) int32 rows of the version, which are not all among the ids."""
        ids, rows = set(body.exclude), past.rows[:0]
        if body.exclude_seen is not False:
            kinds = None if body.exclude_seen is True else set(body.exclude_seen)
            ids |= {event.item_id for event in past.since if kinds is None or event.event in kinds}
            if body.user_id is not None:
                ids |= self._from_state(lambda: self.state.seen(str(body.user_id), kinds), set())
            rows = past.rows
            if kinds is not None and version is not None:
                rows = rows[np.array([name in kinds for name in version.bundle.events])[past.codes]]
        if version is not None:
            index = version.catalogue.index
            rows = np.append(rows, np.array([row for item in ids if (row := index.get(item)) is not None], np.int32))
        return ids, rows

    def _checked(self, version: Version, user_id: str | None, query: Queries, strategy: str) -> tuple[str, Lack | None]:
        """The strategy by what the models have to go on, and why the answer is less than it could be."""
        if len(query.items):
            return strategy, None
        if user_id is not None and version.bundle.key_problem is not None:
            return "cold_start", Lack("user_key", "histories unreadable: the bundle was written with another user key")
        return "cold_start", None

    def _query(self, version: Version, past: _Past) -> Queries:
        index, codes = version.catalogue.index, version.bundle.event_codes
        since = [
            (row, codes.get(event.event, 0), event.timestamp, np.nan if event.value is None else event.value)
            for event in past.since
            if (row := index.get(event.item_id)) is not None
        ]
        new = [np.array([entry[column] for entry in since], np.float64) for column in range(4)]
        known = (past.rows, past.codes, past.times, past.values)
        both = (np.append(old, column.astype(old.dtype))[-self.history_limit :] for old, column in zip(known, new, strict=True))
        rows, events, times, values = both
        return Queries(rows, events, times, values, np.array([0, len(rows)], np.int64), np.array([int(self.clock())], np.int64))

    def _allowed(self, version: Version, rules: dict[str, Any], wanted: set[str] | None) -> np.ndarray:
        mask = version.catalogue.available
        if rules:
            made = version.catalogue.masks_made
            mask = mask & version.catalogue.filter_mask(rules)
            self.metrics.filter_masks.add("kept" if version.catalogue.masks_made == made else "made")
        if wanted is not None:
            chosen = np.zeros(len(mask), bool)
            chosen[[row for item in wanted if (row := version.catalogue.index.get(item)) is not None]] = True
            mask = mask & chosen
        return mask

    async def _rank(
        self, version: Version, query: Queries, retrieved: RetrievedOne, deadline: Deadline
    ) -> tuple[np.ndarray, np.ndarray, Lack | None]:
        self.metrics.candidates.observe(len(retrieved.items))
        try:
            scores, probabilities = await self._ranking.ask(
                deadline, self.budget.ranking_s, lambda: self.backend.rank(version.bundle.version, query, retrieved)
            )
            return scores, probabilities, None
        except Exception as error:  # retrieval order is a good answer
            return retrieved.fused, np.full(len(retrieved.fused), np.nan, np.float32), self._failed("ranking", error)

    def _ranked(
        self,
        version: Version,
        query: Queries,
        retrieved: RetrievedOne,
        order: np.ndarray,
        scores: np.ndarray,
        probabilities: np.ndarray,
        *,
        by: str,
    ) -> Ranked:
        rows = retrieved.items[order].astype(np.int64)
        weights = np.array([max(version.weights.get(name, 0.0), 1e-12) for name in retrieved.sources])
        shares = np.exp(np.log(weights) + retrieved.log_probs[order] - retrieved.fused[order, None])
        chances = [None if p != p else round(p, 6) for p in probabilities[order].tolist()]  # NaN alone differs from itself
        sources: list[list[str]] = []
        if len(query.items) == 0:  # fusion follows popularity alone there; what the others say about nobody is a constant
            shares, sources = shares[:0], [["popularity"] for _ in rows]
        for best_first, share in zip(np.argsort(-shares, axis=1).tolist(), shares.tolist(), strict=True):
            sources.append([retrieved.sources[s] for s in best_first if share[s] >= SOURCE_SHARE or s == best_first[0]])
        ids = version.catalogue.item_ids
        return Ranked(by, [ids[row] for row in rows.tolist()], rows, [round(s, 6) for s in scores[order].tolist()], chances, sources)

    def _insert_live(
        self, ranked: Ranked, retrieved: RetrievedOne, blocked: set[str], wanted: set[str] | None, compiled: dict, need: int
    ) -> None:
        ids, vectors = self.catalogue.live_matrix
        if not ids or retrieved.profile is None or retrieved.affinity is None or not np.any(retrieved.profile):
            return
        ranks = live_ranks(retrieved.profile, retrieved.affinity, vectors)
        room = max(1, int(LIVE_MAX_SHARE * need))
        placed = 0
        for at in np.argsort(np.where(ranks < 0, np.iinfo(np.int64).max, ranks), kind="stable"):
            if ranks[at] < 0 or placed == room:
                break
            item_id = ids[at]
            if item_id in blocked or (wanted is not None and item_id not in wanted) or not self.catalogue.matches(item_id, compiled):
                continue
            # Its place is by rank; its score is the one that keeps the list ordered.
            position = min(int(ranks[at]), len(ranked.item_ids))
            score = ranked.scores[position] if position < len(ranked.scores) else (ranked.scores[-1] if ranked.scores else 0.0)
            ranked.item_ids.insert(position, item_id)
            ranked.rows = np.insert(ranked.rows, position, -1)
            ranked.scores.insert(position, score)
            ranked.probabilities.insert(position, None)
            ranked.sources.insert(position, ["new"])
            placed += 1

    def _diversify(self, version: Version, items: np.ndarray, scores: np.ndarray, order: np.ndarray, n: int, strength: float) -> np.ndarray:
        """Maximal marginal relevance over content vectors among the best 5n candidates (Carbonell & Goldstein, SIGIR 1998)."""
        vectors = version.bundle.content_vectors
        if vectors is None or len(order) == 0:
            return order
        pool = order[: 5 * n]
        relevance = np.linspace(1.0, 0.0, len(pool))  # by rank: scores of different users have different scales
        pool_vectors = vectors[items[pool]].astype(np.float32)
        closest = np.zeros(len(pool), np.float32)
        chosen: list[int] = []
        left = np.ones(len(pool), bool)
        for _ in range(min(n, len(pool))):
            value = np.where(left, (1 - strength) * relevance - strength * closest, -np.inf)
            best = int(value.argmax())
            chosen.append(best)
            left[best] = False
            closest = np.maximum(closest, pool_vectors @ pool_vectors[best])
        return pool[np.array(chosen, np.int64)]

    async def _reasons(self, version: Version, query: Queries, ranked: Ranked, deadline: Deadline) -> list[list[dict]]:
        rows = ranked.rows[ranked.rows >= 0]
        try:
            found = await self._explaining.ask(
                deadline, self.budget.ranking_s, lambda: self.backend.explain(version.bundle.version, query, rows)
            )
        except Exception as error:
            self._failed("explain", error)
            return [[] for _ in ranked.item_ids]
        reasons, by_row = [], iter(found)
        for row in ranked.rows:
            kind, because = next(by_row) if row >= 0 else ("new", None)
            item_id = None if because is None else version.catalogue.item_ids[because]
            text = REASON_TEXT_WITHOUT_ITEM.get(kind) if item_id is None else None
            text = text or REASON_TEXT[kind].format(title=self.catalogue.title(item_id) if item_id else "")
            reasons.append([{"kind": kind, "item_id": item_id, "text": text}])
        return reasons

    def _fallback(self, n: int, query: Queries | None, blocked: set[str], wanted: set[str] | None, rules: dict[str, Any]) -> Ranked:
        """Without any model replica: what follows the history, then what is popular."""
        version, following = self.version, None
        if version is not None and query is not None and version.followers is not None:
            following = version.followers.next_items(query)
        popular = self._popular(n + len(blocked) + 100)
        return fallback(self.catalogue, n, following=following, popular=popular, blocked=blocked, wanted=wanted, rules=rules)

    def _popular(self, count: int) -> Iterator[str]:
        """Item ids by the bundle's counts, then by those of live events; each is looked up when it is asked for."""
        version = self.version
        yield from (version.catalogue.item_ids[row] for row in version.popular) if version is not None else ()
        yield from itertools.chain(self._from_state(lambda: self.state.popular(count), []), self.catalogue.live)

    def _answer(
        self,
        body: RecommendBody | RankBody,
        ranked: Ranked,
        stages: Stages,
        *,
        strategy: str,
        lack: Lack | None,
        reasons: list[list[dict]] | None = None,
    ) -> dict[str, Any]:
        first = body.offset if isinstance(body, RecommendBody) else 0
        last = first + body.n if isinstance(body, RecommendBody) else len(ranked.item_ids)
        items = []
        for at in range(first, min(last, len(ranked.item_ids))):
            item: dict[str, Any] = {
                "item_id": ranked.item_ids[at],
                "rank": at + 1,
                "score": ranked.scores[at],
                "probability": ranked.probabilities[at],
                "sources": ranked.sources[at],
            }
            if reasons is not None:
                item["reasons"] = reasons[at]
            if body.return_metadata:
                item["metadata"] = self.catalogue.attributes(ranked.item_ids[at])
            items.append(item)
        answer: dict[str, Any] = {
            "recommendation_id": uuid.uuid4().hex,
            "user_id": body.user_id,
            "model_version": self.version.bundle.version if self.version is not None else None,
            "strategy": strategy,
            "degraded": lack is not None,
            "degraded_reason": None if lack is None else lack.text,
            "ab_group": None,
            "items": items,
        }
        if body.debug:
            answer["stages"] = stages.milliseconds
        self.metrics.answers.add("rank" if isinstance(body, RankBody) else "recommend", strategy, ranked.by, lack.kind if lack else "none")
        for stage, milliseconds in stages.milliseconds.items():
            self.metrics.stage_ms.observe(milliseconds, stage)
        self.metrics.stage_ms.observe(stages.whole_ms, "whole")
        if lack is not None:
            self.trouble.degraded(answer, lack, by=ranked.by, stages=stages.milliseconds)
        return answer


def pad_candidates(retrieved: list[RetrievedOne]) -> Candidates:
    """Candidates of different lengths as one batch, padded with -1."""
    K = max(len(one.items) for one in retrieved)
    sources = retrieved[0].sources
    items = np.full((len(retrieved), K), -1, np.int32)
    fused = np.full((len(retrieved), K), -np.inf, np.float32)
    log_probs = np.full((len(retrieved), K, len(sources)), -np.inf, np.float32)
    for row, one in enumerate(retrieved):
        count = len(one.items)
        items[row, :count], fused[row, :count], log_probs[row, :count] = one.items, one.fused, one.log_probs
    return Candidates(items, fused, log_probs, sources)


def _bundle_history(version: Version, user_id: str, live: list[HistoryEvent]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows, event codes, times and values in the bundle, without what state still has too (a later bundle learnt from the log)."""
    found = version.bundle.histories.lookup(user_id)
    if found is None:
        return NO_PAST
    if not live:
        return found
    index = version.catalogue.index
    again = {(index.get(event.item_id), int(event.timestamp)) for event in live}
    rows, codes, times, values = found
    kept = np.array([event not in again for event in zip(rows.tolist(), times.tolist(), strict=True)], bool)
    return rows[kept], codes[kept], times[kept], values[kept]


def _value(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _no_items() -> pa.Table:
    return pa.table({"item_id": pa.array([], pa.string())})
