"""Data with planted truth: what a model should find is known, at any size, in constant memory.

Items belong to clusters and have Zipf popularity. A user has a few tastes (clusters).
A user's next item comes, with probability `markov`, from the successor of the last item's
cluster; else, with probability `taste`, from one of the user's tastes; else from anywhere.
Within a cluster items are drawn by popularity. An event is a like with a probability that
depends on whether the item's cluster is to the user's taste, else a view.
With a flip, every cluster has another successor from some moment on, for everybody at once,
while items stay what they are: the law over tastes changes, and histories do not tell which
law holds. `truth.json` holds all of it.
"""

import math
from dataclasses import dataclass

import numpy as np
import polars as pl

from raysys.adapters.contract import ContractWriter
from raysys.errors import ConfigError

BLOCK_USERS, BLOCK_EVENTS = 2_000, 1_000_000
"""Users simulated side by side: at most so many, and about so many events in memory."""
START = 1_700_000_000
"""UTC epoch seconds of the first event: 2023-11-14."""
SPAN_S = 90 * 86_400
TASTES = 3
MARKOV, TASTE = 0.5, 0.35
LIKE_TASTE, LIKE_OTHER = 0.6, 0.1
ZIPF = 1.0
WORDS = (
    "amber birch cedar delta ember fjord grove hazel indigo jasper kelp "
    "lotus maple nectar onyx pearl quartz river sage topaz umber violet willow"
).split()


HEAVY_SESSIONS, SESSION_EVENTS = 1000, 50
"""The heavy user's time is cut into at most so many stretches, of at least about so many events, that are simulated side by side."""


def generate(
    writer: ContractWriter,
    *,
    users: int,
    items: int,
    events: int,
    seed: int,
    files: int = 0,
    heavy_user: float = 0.0,
    flip: float = 0.0,
) -> None:
    """Write a synthetic data set; the same arguments give the same rows.

    Args:
        writer: where to.
        users: at least 1; every user gets at least one event.
        items: at least 2.
        events: expected number, at least `users`; what was drawn stands in truth.json.
        seed: random seed.
        files: spread the events over so many files by time, each with events of all users; 0 = users one after the other.
        heavy_user: share of all events that one more user, the last, has.
        flip: share of the events' time after which clusters have other successors; 0 for never. Of more than two clusters.

    Raises:
        ConfigError: a size is too small or too large, or the seed negative.
    """
    if users < 1 or items < 2 or events < users or seed < 0 or files < 0 or not 0 <= heavy_user < 1 or not 0 <= flip < 1:
        got = f"{users}, {items}, {events}, {seed}, {files}, {heavy_user}, {flip}"
        raise ConfigError(
            "import synthetic: expected users >= 1, items >= 2, events >= users, seed >= 0, files >= 0, heavy-user in [0, 1), "
            f"flip in [0, 1); got {got}"
        )
    world = _World.draw(items, seed, flip)
    writer.add_table("items", _items(world.cluster))
    totals = _Totals()
    heavy = round(heavy_user * events)
    events_per_user = max(1.0, (events - heavy) / users)
    step = max(1, min(BLOCK_USERS, int(BLOCK_EVENTS / events_per_user)))
    for first in range(0, users, step):
        block = _Block.of_users(np.random.default_rng([seed, 1, first]), first, min(step, users - first), events_per_user, world)
        _write(writer, block.events(world, totals), files)
    for first in range(0, heavy, BLOCK_EVENTS):
        size = min(BLOCK_EVENTS, heavy - first)
        block = _Block.of_one(np.random.default_rng([seed, 2, first]), users, first / heavy, size / heavy, size, world)
        _write(writer, block.events(world, totals), files)
    truth = {
        "seed": seed,
        "users": users,
        "items": items,
        "clusters": world.clusters,
        "item_cluster": "item i<n> belongs to cluster n % clusters and is member number n // clusters (from 0) of it",
        "item_weight": "1 / (1 + member number) ** zipf_exponent within the cluster",
        "successor": world.successor.tolist(),
        "flip_time": world.flip_time,
        "successor_after_flip": world.successor_after.tolist() if flip else None,
        "markov": MARKOV,
        "taste": TASTE,
        "tastes_per_user": min(TASTES, world.clusters),
        "like_if_taste": LIKE_TASTE,
        "like_otherwise": LIKE_OTHER,
        "zipf_exponent": ZIPF,
        "heavy_user": f"u{users}" if heavy else None,
        "events": totals.events,
        "likes": totals.likes,
        "successor_rate": totals.successors / max(1, totals.transitions),
        "successor_rate_expected": MARKOV + (1 - MARKOV) / world.clusters,
    }
    writer.add_json("truth.json", truth)
    writer.notes.append(f"{world.clusters} clusters; the next event follows the successor with probability {MARKOV}; see truth.json")


def _write(writer: ContractWriter, frame: pl.DataFrame, files: int) -> None:
    if not files:
        writer.add_interactions(frame)
        return
    frame = frame.sort("timestamp", maintain_order=True)
    edges = np.searchsorted(frame["timestamp"].to_numpy(), START + np.arange(1, files) * SPAN_S / files)
    bounds = [0, *edges.tolist(), len(frame)]
    for shard, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        writer.add_interactions(frame[first:last], shard)


class _Totals:
    events = likes = transitions = successors = 0


@dataclass(frozen=True)
class _World:
    """Items by cluster.

    Attributes:
        cluster: (N,) of every item. successor: (C,) cluster that tends to follow.
        members: (N,) items ordered by cluster. cumulative: (N,) their cumulative weight within the cluster, plus the cluster.
        successor_after: (C,) the same for events from `flip_time` on, UTC epoch seconds; None for never.
    """

    cluster: np.ndarray
    successor: np.ndarray
    members: np.ndarray
    cumulative: np.ndarray
    successor_after: np.ndarray
    flip_time: int | None

    @property
    def clusters(self) -> int:
        return len(self.successor)

    @classmethod
    def draw(cls, items: int, seed: int, flip: float) -> "_World":
        clusters = max(2, min(50, round(math.sqrt(items) / 2)))
        cluster = np.arange(items) % clusters
        weight = 1.0 / (1 + np.arange(items) // clusters) ** ZIPF
        members = [np.flatnonzero(cluster == index) for index in range(clusters)]
        cumulative = [index + np.cumsum(weight[rows]) / weight[rows].sum() for index, rows in enumerate(members)]
        shuffled = np.random.default_rng([seed, 0]).permutation(clusters)
        successor = np.empty(clusters, np.int64)
        successor[shuffled] = np.roll(shuffled, -1)
        after = _other_cycle(successor, np.random.default_rng([seed, 3])) if flip else successor
        flip_time = int(START + flip * SPAN_S) if flip else None
        return cls(cluster, successor, np.concatenate(members), np.concatenate(cumulative), after, flip_time)

    def successors(self, clusters: np.ndarray, time: np.ndarray) -> np.ndarray:
        """What tends to follow each cluster in an event of this time."""
        if self.flip_time is None:
            return self.successor[clusters]
        return np.where(time < self.flip_time, self.successor[clusters], self.successor_after[clusters])

    def item(self, picked: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """An item of each picked cluster, by popularity."""
        # One search for all clusters; rounding must not lead into the next one.
        found = np.searchsorted(self.cumulative, picked + uniform, side="right")
        last = np.searchsorted(self.cumulative, picked + 1.0 - 1e-12)
        return self.members[np.minimum(found, last)]


def _other_cycle(successor: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(C,) a cycle through all clusters in which none has the successor that it had, nor, where there is room, the predecessor."""
    clusters, predecessor = len(successor), np.argsort(successor)
    if clusters < 3:
        raise ConfigError(
            f"import synthetic: expected more than 2 clusters of items for a flip, got {clusters}; more items make more clusters"
        )
    while True:
        shuffled = rng.permutation(clusters)
        after = np.empty(clusters, np.int64)
        after[shuffled] = np.roll(shuffled, -1)
        if (after != successor).all() and (clusters < 6 or (after != predecessor).all()):
            return after


@dataclass(frozen=True)
class _Block:
    """Histories that are simulated side by side, one step of all at a time.

    Attributes:
        user: (H,) number of the user of each history. tastes: (H, TASTES) clusters.
        lengths: (H,) events. begin: (H,) seconds of the first event. gap: mean seconds to the next.
    """

    rng: np.random.Generator
    user: np.ndarray
    tastes: np.ndarray
    lengths: np.ndarray
    begin: np.ndarray
    gap: float

    @classmethod
    def of_users(cls, rng: np.random.Generator, first: int, users: int, events_per_user: float, world: _World) -> "_Block":
        tastes = np.argsort(rng.random((users, world.clusters)), axis=1)[:, : min(TASTES, world.clusters)]
        lengths = 1 + rng.poisson(events_per_user - 1, users)
        begin = START + rng.integers(0, SPAN_S // 2, users)
        return cls(rng, first + np.arange(users), tastes, lengths, begin, SPAN_S / 2 / (int(lengths.max()) + 1))

    @classmethod
    def of_one(cls, rng: np.random.Generator, user: int, since: float, share: float, events: int, world: _World) -> "_Block":
        """A stretch of one user's time, `since` and `share` of SPAN_S, cut into sessions one after the other."""
        sessions = max(1, min(HEAVY_SESSIONS, events // SESSION_EVENTS))
        tastes = np.tile(np.arange(min(TASTES, world.clusters)), (sessions, 1))
        lengths = np.diff(np.linspace(0, events, sessions + 1).astype(np.int64))
        width = SPAN_S * share / sessions
        begin = (START + SPAN_S * since + np.arange(sessions) * width).astype(np.int64)
        return cls(rng, np.full(sessions, user), tastes, lengths, begin, max(0.0, width / (int(lengths.max()) + 1) - 1))

    def events(self, world: _World, totals: _Totals) -> pl.DataFrame:
        rng, steps = self.rng, int(self.lengths.max())
        now = self.begin.copy()
        last = np.full(len(self.user), -1)
        parts = []
        for step in range(steps):
            active = np.flatnonzero(self.lengths > step)
            choice = rng.random(len(active))
            own = self.tastes[active, rng.integers(0, self.tastes.shape[1], len(active))]
            anywhere = rng.integers(0, world.clusters, len(active))
            moved = last[active] >= 0
            follow = moved & (choice < MARKOV)
            to_taste = ~follow & (rng.random(len(active)) < TASTE / (1 - MARKOV))
            within = rng.random(len(active))
            now[active] += 1 + rng.exponential(self.gap, len(active)).astype(np.int64)
            successor = world.successors(last[active], now[active])
            picked = np.where(follow, successor, np.where(to_taste, own, anywhere))
            item = world.item(picked, within)
            totals.transitions += int(moved.sum())
            totals.successors += int((picked == successor)[moved].sum())
            last[active] = picked
            liked = rng.random(len(active)) < np.where((self.tastes[active] == picked[:, None]).any(1), LIKE_TASTE, LIKE_OTHER)
            parts.append((active, item, now[active], liked))
            totals.events += len(active)
            totals.likes += int(liked.sum())
        history, item, time, like = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        order = np.argsort(history, kind="stable")
        columns = {"u": self.user[history[order]], "i": item[order], "timestamp": time[order], "like": like[order]}
        return pl.DataFrame(columns).select(
            user_id=pl.format("u{}", "u"),
            item_id=pl.format("i{}", "i"),
            timestamp=pl.col("timestamp").cast(pl.Int64),
            event=pl.when("like").then(pl.lit("like")).otherwise(pl.lit("view")),
        )


def _items(cluster: np.ndarray) -> pl.DataFrame:
    names = [
        WORDS[index % len(WORDS)] + ("" if index < len(WORDS) else f" {index // len(WORDS) + 1}") for index in range(cluster.max() + 1)
    ]
    number = np.arange(len(cluster))
    frame = pl.DataFrame({"n": number, "name": np.array(names)[cluster]})
    return frame.select(
        item_id=pl.format("i{}", "n"),
        title=pl.format("{} {}", pl.col("name").str.to_titlecase(), pl.col("n")),
        text=pl.format("something about {}", "name"),
        categories=pl.concat_list("name"),
    )
