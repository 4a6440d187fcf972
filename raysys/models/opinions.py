"""What users thought of items, read from the events of their histories; features of P(positive event | item taken).

Items have an offset and a few factors, learnt from the grades of events
(`grading.py`) by alternating ridge regression; a user is folded in from the
history, so that nothing is stored about users and a new event counts at once.
Knows no retrieval and no labels; see `judge.py`.

Legend: B queries, K candidates, W history window, D factors, N items, E events, F features.
Source: Koren, Bell & Volinsky, "Matrix Factorization Techniques for Recommender Systems", Computer 2009 (offsets and factors).
"""

from dataclasses import asdict, dataclass

import numpy as np

from raysys.models.base import Arrays, Meta
from raysys.models.grading import Grading
from raysys.prepare.dataset import Sequences
from raysys.queries import Queries

SESSION_S = 1800
"""Events within so many seconds before the request are of its session."""
CHUNK_EVENTS = 100_000
"""Events whose outer products are held at once."""

FEATURES = (
    "user_offset",
    "user_likes",
    "user_recent",
    "user_latest",
    "user_spread",
    "history",
    "gap",
    "session",
    "item_offset",
    "item_likes",
    "item_count",
    "agreement",
    "expected",
    "near_grade",
    "near_mass",
    "content_grade",
    "content_mass",
)
"""Columns of `Opinions.features`."""


@dataclass(frozen=True)
class OpinionConfig:
    """How grades are smoothed and factored."""

    dim: int = 12
    """D, factors of an item."""
    ridge: float = 8.0
    """Pull of factors towards zero, in events."""
    item_prior: float = 5.0
    """Events of the average grade that every item starts with."""
    user_prior: float = 5.0
    """The same for a user."""
    passes: int = 8
    """Alternations between users and items."""
    window: int = 200
    """W, last events of a history that are looked at."""
    near: int = 50
    """Last events that a candidate is compared with, item by item."""


class Opinions:
    """Offsets and factors of items.

    Args:
        grading: how events are read.
        counts, likes: (N,) float32 events of each item, and positive ones.
        residuals: (N,) float32 sum over an item's events of grade less the user's offset.
        factors: (N, D) float32.
        config: settings.
        ordinal_time: times carry order only; features of time are then 0.
    """

    def __init__(
        self,
        grading: Grading,
        counts: np.ndarray,
        likes: np.ndarray,
        residuals: np.ndarray,
        factors: np.ndarray,
        config: OpinionConfig,
        *,
        ordinal_time: bool,
    ):
        self.grading, self.config, self.ordinal_time = grading, config, ordinal_time
        self.counts, self.likes, self.residuals, self.factors = (a.astype(np.float32) for a in (counts, likes, residuals, factors))

    @property
    def offsets(self) -> np.ndarray:
        """(N,) float32 how much better than usual an item is found, shrunk towards 0 where few have said so."""
        return self.residuals / (self.counts + self.config.item_prior)

    @classmethod
    def fit(
        cls,
        sequences: Sequences,
        num_items: int,
        grading: Grading,
        config: OpinionConfig | None = None,
        *,
        ordinal_time: bool = False,
        seed: int = 0,
    ) -> "Opinions":
        """Learn from the events given, all of which have a known item.

        Args:
            sequences: U users, E events.
            num_items: N.
            grading: of the whole training part.
            config: settings.
            ordinal_time: see the class.
            seed: of the first factors.
        """
        config = config or OpinionConfig()
        items, users, num_users = sequences.items, sequences.rows, len(sequences)
        grades = grading.grade(sequences.events, sequences.values).astype(np.float64)
        counts = np.bincount(items, minlength=num_items)
        per_user = np.bincount(users, minlength=num_users)
        likes = np.bincount(items, weights=grading.liked(sequences.events, sequences.values), minlength=num_items)
        of_user, of_item, residuals = np.zeros(num_users), np.zeros(num_items), np.zeros(num_items)
        for _ in range(config.passes):
            residuals[:] = np.bincount(items, weights=grades - of_user[users], minlength=num_items)
            of_item = residuals / (counts + config.item_prior)
            of_user = np.bincount(users, weights=grades - of_item[items], minlength=num_users) / (per_user + config.user_prior)
        left = grades - of_item[items] - of_user[users]
        factors = np.random.default_rng(seed).normal(0, 0.1, (num_items, config.dim))
        by_item = np.argsort(items, kind="stable")
        item_ptr = np.concatenate([[0], np.cumsum(counts)])
        for _ in range(config.passes):
            of_users = _ridge(factors[items], left, sequences.indptr, config.ridge)
            factors = _ridge(of_users[users[by_item]], left[by_item], item_ptr, config.ridge)
        return cls(grading, counts, likes, residuals, factors, config, ordinal_time=ordinal_time)

    def update(self, sequences: Sequences, new: np.ndarray) -> "Opinions":
        """Counts and offsets with more events in them; factors stay as they are.

        Args:
            sequences: histories with the new events in their place, items all known.
            new: (E,) bool.
        """
        at = np.flatnonzero(new)
        items, events, values = sequences.items[at], sequences.events[at], sequences.values[at]
        residual = self.grading.grade(events, values) - self._user_offsets(sequences.queries_before(at, max_events=self.config.window))
        add = [np.bincount(items, weights, len(self.counts)) for weights in (None, self.grading.liked(events, values), residual)]
        counts, likes, residuals = (old + more for old, more in zip((self.counts, self.likes, self.residuals), add, strict=True))
        return Opinions(self.grading, counts, likes, residuals, self.factors, self.config, ordinal_time=self.ordinal_time)

    def grown(self, num_new: int) -> "Opinions":
        """With rows for new items, of whom nothing has been said."""
        none = np.zeros(num_new, np.float32)
        counts, likes, residuals = (np.concatenate([column, none]) for column in (self.counts, self.likes, self.residuals))
        factors = np.concatenate([self.factors, np.zeros((num_new, self.factors.shape[1]), np.float32)])
        return Opinions(self.grading, counts, likes, residuals, factors, self.config, ordinal_time=self.ordinal_time)

    def features(self, queries: Queries, items: np.ndarray, vectors: np.ndarray, content: np.ndarray) -> np.ndarray:
        """(B, K, F) float32, see FEATURES; they need nothing but the history and tables by item.

        Args:
            queries: B histories.
            items: (B, K) int rows in [0, N).
            vectors: (N + more, D') vectors of items, such as the encoder's.
            content: (N + more, C) content vectors, C may be 0.
        """
        config, offsets = self.config, self.offsets
        grade, liked, history, real = self.graded(queries, config.window)
        left = np.where(real, grade - offsets[history], 0.0)
        count = real.sum(axis=1)
        user_offset = left.sum(axis=1) / (count + config.user_prior)
        age = np.where(real, count[:, None] - 1 - np.arange(real.shape[1]), 0)
        faded = [_faded_mean(left, np.where(real, decay**age, 0.0)) for decay in (0.9, 0.6)]
        spread = np.sqrt((np.where(real, left - user_offset[:, None], 0.0) ** 2).sum(axis=1) + config.user_prior) / np.sqrt(
            count + config.user_prior
        )
        gap, session = self._times(queries)
        about_user = [
            user_offset,
            _log_odds((liked & real).sum(axis=1), count, self.grading.share, config.user_prior),
            *faded,
            spread,
            np.log1p(count),
            gap,
            session,
        ]
        left = np.where(real, left - user_offset[:, None], 0.0)
        own = np.where(real[..., None], self.factors[history], 0.0)
        normal = own.transpose(0, 2, 1) @ own + config.ridge * np.eye(own.shape[2])
        taste = np.linalg.solve(normal, (left[:, None, :] @ own)[:, 0, :, None])[..., 0].astype(np.float32)
        agreement = (self.factors[items] @ taste[:, :, None])[..., 0]
        about_item = [
            offsets[items],
            _log_odds(self.likes[items], self.counts[items], self.grading.share, config.item_prior),
            np.log1p(self.counts[items]),
        ]
        first = max(0, real.shape[1] - config.near)  # rows are left-aligned: short ones lie in front
        near = [self._near(items, history, left, real, first, table) for table in (vectors, content)]
        columns = [
            *(np.broadcast_to(column[:, None], items.shape) for column in about_user),
            *about_item,
            agreement,
            user_offset[:, None] + about_item[0] + agreement,
            *near[0],
            *near[1],
        ]
        return np.stack(columns, axis=2).astype(np.float32)

    def graded(self, queries: Queries, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Last events as matrices: (B, W) float32 grades, bool likes, int64 item rows, and bool where they are real."""
        at, real = queries.last(length)
        if not len(queries.items):
            return np.zeros(at.shape, np.float32), np.zeros(at.shape, bool), at, real
        events, values = queries.events[at], queries.values[at]
        return self.grading.grade(events, values), self.grading.liked(events, values), queries.items[at].astype(np.int64), real

    def _user_offsets(self, queries: Queries) -> np.ndarray:
        grade, _, history, real = self.graded(queries, self.config.window)
        left = np.where(real, grade - self.offsets[history], 0.0)
        return left.sum(axis=1) / (real.sum(axis=1) + self.config.user_prior)

    def _times(self, queries: Queries) -> tuple[np.ndarray, np.ndarray]:
        """(B,) log of the seconds since the last event, and of the number of events of this session."""
        if self.ordinal_time or not len(queries.items):
            return np.zeros(len(queries)), np.zeros(len(queries))
        last = queries.times[np.maximum(queries.indptr[1:] - 1, 0)]
        gap = np.where(queries.lengths > 0, np.maximum(queries.now - last, 0), 0)
        recent = queries.now[queries.rows] - queries.times <= SESSION_S
        return np.log1p(gap), np.log1p(np.bincount(queries.rows, weights=recent, minlength=len(queries)))

    def _near(
        self, items: np.ndarray, history: np.ndarray, left: np.ndarray, real: np.ndarray, first: int, table: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(B, K) grades of like items in the history, weighted by squared cosine, and the weight there is."""
        if not table.shape[1]:
            return np.zeros(items.shape, np.float32), np.zeros(items.shape, np.float32)
        # Of histories longer than the window only the end is looked at; shorter ones stand at the front of the row.
        count = real.sum(axis=1)
        columns = np.arange(real.shape[1] - first)[None, :] + np.maximum(count - (real.shape[1] - first), 0)[:, None]
        rows = np.arange(len(items))[:, None]
        similar = np.maximum(_unit(table[items]) @ _unit(table[history[rows, columns]]).transpose(0, 2, 1), 0.0)
        weight = similar**2 * real[rows, columns][:, None, :]
        mass = weight.sum(axis=2)
        return (weight @ left[rows, columns][:, :, None])[..., 0] / (mass + 1.0), mass

    def to_arrays(self) -> tuple[Arrays, Meta]:
        """Tables by item, and how events are read."""
        arrays = {"counts": self.counts, "likes": self.likes, "residuals": self.residuals, "factors": self.factors}
        of_codes = {name: getattr(self.grading, name) for name in ("always", "least", "mean", "std")}
        arrays |= {f"grading.{name}": array.astype(np.float32) for name, array in of_codes.items()}
        return arrays, {"config": asdict(self.config), "share": self.grading.share, "ordinal_time": self.ordinal_time}

    @classmethod
    def from_arrays(cls, arrays: Arrays, meta: Meta) -> "Opinions":
        """The model back from `to_arrays`."""
        of_codes = {name: arrays[f"grading.{name}"] for name in ("least", "mean", "std")}
        grading = Grading(always=arrays["grading.always"].astype(bool), share=meta["share"], **of_codes)
        counts, likes, residuals, factors = (arrays[name] for name in ("counts", "likes", "residuals", "factors"))
        return cls(grading, counts, likes, residuals, factors, OpinionConfig(**meta["config"]), ordinal_time=meta["ordinal_time"])


def _ridge(inputs: np.ndarray, targets: np.ndarray, indptr: np.ndarray, ridge: float) -> np.ndarray:
    """(G, D) solutions of one ridge regression a group of rows; zero for an empty group.

    Args:
        inputs: (E, D) rows, group by group.
        targets: (E,).
        indptr: (G+1,) where groups begin.
        ridge: added to the diagonal.
    """
    dim, groups = inputs.shape[1], len(indptr) - 1
    solutions = np.zeros((groups, dim))
    first = 0
    while first < groups:
        stop = max(first + 1, int(np.searchsorted(indptr, indptr[first] + CHUNK_EVENTS, side="right")) - 1)
        filled = first + np.flatnonzero(np.diff(indptr[first : stop + 1]))
        if len(filled):
            part = slice(indptr[first], indptr[stop])
            starts = indptr[filled] - indptr[first]
            x, y = inputs[part], targets[part]
            normal = np.add.reduceat(x[:, :, None] * x[:, None, :], starts) + ridge * np.eye(dim)
            solutions[filled] = np.linalg.solve(normal, np.add.reduceat(x * y[:, None], starts)[..., None])[..., 0]
        first = stop
    return solutions


def _faded_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(B,) weighted means of (B, W) values, shrunk towards 0 by one event."""
    return (values * weights).sum(axis=1) / (weights.sum(axis=1) + 1.0)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-6)


def _log_odds(likes: np.ndarray, count: np.ndarray, share: float, prior: float) -> np.ndarray:
    """Log-odds of the shrunk share of likes, less that of the base rate."""
    liked = (likes + prior * share) / (count + prior)
    return np.log(liked / (1 - liked)) - np.log(share / (1 - share))
