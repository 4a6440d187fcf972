"""A small world with a planted truth, and a bundle trained on it in about a second, without Ray.

Items stand in NUM_CLUSTERS clusters whose titles tell them; every user walks
through one cluster in order. So the right answer is known: the next items of
the user's own cluster.
"""

import numpy as np
import pyarrow as pa
import torch

from raysys.bundle import Bundle, Histories
from raysys.features.text import TextEncoder, item_text
from raysys.models.content import ContentNeighbours
from raysys.models.covisit import Covisitation
from raysys.models.fusion import Fusion
from raysys.models.interest import InterestConfig, InterestEncoder, InterestRetriever
from raysys.models.popularity import Popularity
from raysys.models.ranker import RankerConfig
from raysys.pipeline import Pipeline, seen_mask
from raysys.prepare.dataset import Sequences
from raysys.train.batches import InMemory
from raysys.train.encoder import EncoderTrainConfig, train_encoder
from raysys.train.ranker import train_ranker

NUM_CLUSTERS, CLUSTER_ITEMS, NUM_USERS = 6, 20, 180
THEMES = [
    "space battle rockets",
    "romantic wedding love",
    "cooking pasta kitchen",
    "murder detective crime",
    "jungle animals wild",
    "piano jazz music",
]
EVENTS = ["other", "view", "rating"]


def cluster_of(item_id: str) -> int:
    """Cluster of an item id such as `item-017`."""
    return int(item_id.split("-")[1]) // CLUSTER_ITEMS


def items_table() -> pa.Table:
    """The catalogue."""
    rows = np.arange(NUM_CLUSTERS * CLUSTER_ITEMS)
    return pa.table(
        {
            "item_idx": pa.array(rows, pa.int32()),
            "item_id": [f"item-{row:03d}" for row in rows],
            "num_train": pa.array(np.full(len(rows), 20), pa.int64()),
            "title": [f"{THEMES[row // CLUSTER_ITEMS]} {row % CLUSTER_ITEMS}" for row in rows],
            "categories": [[THEMES[row // CLUSTER_ITEMS].split()[0]] for row in rows],
            "year": pa.array(1980 + rows % CLUSTER_ITEMS, pa.int64()),
            "available": [bool(row != 5) for row in rows],
        }
    )


def sequences(seed: int = 0) -> Sequences:
    """NUM_USERS walks of 8 to 12 steps, user u in cluster u mod NUM_CLUSTERS; mostly one step ahead, sometimes two."""
    rng = np.random.default_rng(seed)
    walks = []
    for user in range(NUM_USERS):
        steps = np.cumsum(rng.choice([1, 2], size=rng.integers(8, 13), p=[0.8, 0.2]))
        walks.append((user % NUM_CLUSTERS) * CLUSTER_ITEMS + (rng.integers(CLUSTER_ITEMS) + steps) % CLUSTER_ITEMS)
    lengths = np.array([len(walk) for walk in walks])
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    items = np.concatenate(walks).astype(np.int32)
    values = np.where(rng.random(len(items)) < 0.6, 5.0, 2.0).astype(np.float32)
    times = 1_700_000_000 + np.concatenate([np.arange(n) * 3600 for n in lengths]).astype(np.int64)
    return Sequences(
        np.arange(NUM_USERS, dtype=np.int32),
        indptr,
        items,
        np.full(len(items), 2, np.int8),
        times,
        values,
        values >= 4,
        np.zeros(len(items), np.int8),
    )


def user_ids() -> list[str]:
    """Ids by user row."""
    return [f"user-{user}" for user in range(NUM_USERS)]


def build_bundle(seed: int = 0) -> Bundle:
    """Every model, in memory, not yet written."""
    torch.set_num_threads(2)
    table, data = items_table(), sequences(seed)
    num_items = table.num_rows
    counts = np.bincount(data.items, minlength=num_items)
    torch.manual_seed(seed)
    encoder = InterestEncoder(num_items, len(EVENTS), InterestConfig(dim=32, num_layers=1, max_length=16, dropout=0.1))
    train_encoder(encoder, InMemory(data), EncoderTrainConfig(epochs=8, batch_size=32, lr=5e-3, warmup_steps=5), seed=seed)
    columns = zip(table["title"].to_pylist(), table["categories"].to_pylist(), strict=True)
    models = {
        "interest": InterestRetriever.from_encoder(encoder, counts),
        "covisit": Covisitation.fit(data, num_items),
        "content": ContentNeighbours.fit(TextEncoder().encode([item_text(title, None, kinds) for title, kinds in columns])),
        "popularity": Popularity.fit(data, num_items),
    }
    temperatures = {"interest": 1.0, "covisit": 0.5, "content": 0.1, "popularity": 1.0}
    mixture = Fusion.of({"interest": 0.5, "covisit": 0.3, "content": 0.15, "popularity": 0.05}, temperatures)
    histories = Histories.build(data, user_ids(), max_events=50)
    bundle = Bundle(table, models, {"mixture": mixture.to_dict(), "ranker_weight": 0.3}, histories)
    pipeline = Pipeline(bundle, num_candidates=40)
    positions = data.last_positions()
    queries = data.queries_before(positions)
    candidates = pipeline.retrieve(queries, allowed=seen_mask(queries, num_items)).candidates
    ranker, _ = train_ranker(
        queries,
        candidates,
        data.items[positions].astype(np.int64),
        None,
        item_vectors=models["interest"].item_vectors,
        content_vectors=models["content"].item_vectors,
        item_counts=counts,
        config=RankerConfig(epochs=2),
        seed=seed,
    )
    models["ranker"] = ranker
    return bundle


def manifest() -> dict:
    """What a bundle's writer adds."""
    return {
        "events": EVENTS,
        "fit": "train",
        "config": {},
        "data": {"fingerprint": "planted"},
        "metrics": {},
        "watermark": 1_700_100_000,
        "time": "utc",
    }
