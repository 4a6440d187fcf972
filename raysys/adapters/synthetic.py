"""Data with planted truth: what a model should find is known, at any size, in constant memory.

Items belong to clusters and have Zipf popularity. A user has a few tastes (clusters).
A user's next item comes, with probability `markov`, from the successor of the last item's
cluster; else, with probability `taste`, from one of the user's tastes; else from anywhere.
Within a cluster items are drawn by popularity. An event is a like with a probability that
depends on whether the item's cluster is to the user's taste, else a view.
`truth.json` holds all of it.
"""

import math

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


def generate(writer: ContractWriter, *, users: int, items: int, events: int, seed: int) -> None:
    """Write a synthetic data set; the same arguments give the same rows.

    Args:
        writer: where to.
        users: at least 1; every user gets at least one event.
        items: at least 2.
        events: expected number, at least `users`; what was drawn stands in truth.json.
        seed: random seed.

    Raises:
        ConfigError: a size is too small or the seed negative.
    """
    if users < 1 or items < 2 or events < users or seed < 0:
        got = f"{users}, {items}, {events}, {seed}"
        raise ConfigError(f"import synthetic: expected users >= 1, items >= 2, events >= users, seed >= 0; got {got}")
    clusters = max(2, min(50, round(math.sqrt(items) / 2)))
    cluster = np.arange(items) % clusters
    weight = 1.0 / (1 + np.arange(items) // clusters) ** ZIPF
    members = [np.flatnonzero(cluster == index) for index in range(clusters)]
    cumulative = [np.cumsum(weight[rows]) / weight[rows].sum() for rows in members]
    shuffled = np.random.default_rng([seed, 0]).permutation(clusters)
    successor = np.empty(clusters, np.int64)
    successor[shuffled] = np.roll(shuffled, -1)
    writer.add_table("items", _items(cluster))
    totals = _Totals()
    step = max(1, min(BLOCK_USERS, BLOCK_EVENTS * users // events))
    for first in range(0, users, step):
        block = _Block(np.random.default_rng([seed, 1, first]), min(step, users - first), events / users, clusters)
        frame = block.events(first, members, cumulative, successor, totals)
        writer.add_interactions(frame)
    truth = {
        "seed": seed,
        "users": users,
        "items": items,
        "clusters": clusters,
        "item_cluster": "item i<n> belongs to cluster n % clusters and is member number n // clusters (from 0) of it",
        "item_weight": "1 / (1 + member number) ** zipf_exponent within the cluster",
        "successor": successor.tolist(),
        "markov": MARKOV,
        "taste": TASTE,
        "tastes_per_user": min(TASTES, clusters),
        "like_if_taste": LIKE_TASTE,
        "like_otherwise": LIKE_OTHER,
        "zipf_exponent": ZIPF,
        "events": totals.events,
        "likes": totals.likes,
        "successor_rate": totals.successors / max(1, totals.transitions),
        "successor_rate_expected": MARKOV + (1 - MARKOV) / clusters,
    }
    writer.add_json("truth.json", truth)
    writer.notes.append(f"{clusters} clusters; the next event follows the successor cluster with probability {MARKOV}; see truth.json")


class _Totals:
    events = likes = transitions = successors = 0


class _Block:
    """Some users, simulated side by side, one step of all users at a time."""

    def __init__(self, rng: np.random.Generator, users: int, events_per_user: float, clusters: int) -> None:
        self.rng = rng
        self.users = users
        self.clusters = clusters
        self.tastes = np.argsort(rng.random((users, clusters)), axis=1)[:, : min(TASTES, clusters)]
        self.lengths = 1 + rng.poisson(events_per_user - 1, users)

    def events(self, first_user: int, members: list, cumulative: list, successor: np.ndarray, totals: _Totals) -> pl.DataFrame:
        rng, steps = self.rng, int(self.lengths.max())
        now = START + rng.integers(0, SPAN_S // 2, self.users)
        gap = SPAN_S / 2 / (steps + 1)
        last = np.full(self.users, -1)
        parts = []
        for step in range(steps):
            active = np.flatnonzero(self.lengths > step)
            choice = rng.random(len(active))
            own = self.tastes[active, rng.integers(0, self.tastes.shape[1], len(active))]
            anywhere = rng.integers(0, self.clusters, len(active))
            follow = (last[active] >= 0) & (choice < MARKOV)
            to_taste = ~follow & (rng.random(len(active)) < TASTE / (1 - MARKOV))
            picked = np.where(follow, successor[last[active]], np.where(to_taste, own, anywhere))
            item = _draw(picked, rng.random(len(active)), members, cumulative)
            moved = last[active] >= 0
            totals.transitions += int(moved.sum())
            totals.successors += int((picked == successor[last[active]])[moved].sum())
            last[active] = picked
            now[active] += 1 + rng.exponential(gap, len(active)).astype(np.int64)
            liked = rng.random(len(active)) < np.where((self.tastes[active] == picked[:, None]).any(1), LIKE_TASTE, LIKE_OTHER)
            parts.append((active, item, now[active], liked))
            totals.events += len(active)
            totals.likes += int(liked.sum())
        user, item, time, like = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        order = np.argsort(user, kind="stable")
        return pl.DataFrame({"u": user[order] + first_user, "i": item[order], "timestamp": time[order], "like": like[order]}).select(
            user_id=pl.format("u{}", "u"),
            item_id=pl.format("i{}", "i"),
            timestamp=pl.col("timestamp").cast(pl.Int64),
            event=pl.when("like").then(pl.lit("like")).otherwise(pl.lit("view")),
        )


def _draw(picked: np.ndarray, uniform: np.ndarray, members: list, cumulative: list) -> np.ndarray:
    item = np.empty(len(picked), np.int64)
    for cluster in np.unique(picked):
        rows = picked == cluster
        item[rows] = members[cluster][np.searchsorted(cumulative[cluster], uniform[rows], side="right").clip(max=len(members[cluster]) - 1)]
    return item


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
