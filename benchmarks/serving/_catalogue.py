"""A bundle over a catalogue of any size: vectors in clusters, histories that stay in a few of them, everything else as training makes it.

Nothing is learnt but the ranker's first steps; the work of an answer is that of a trained bundle of the same shape without content.
"""

import numpy as np
import pyarrow as pa
import torch

from raysys.bundle import Bundle, Histories
from raysys.models.covisit import Covisitation, CovisitConfig
from raysys.models.fusion import Fusion
from raysys.models.interest import InterestConfig, InterestEncoder, InterestRetriever
from raysys.models.popularity import Popularity
from raysys.models.ranker import RankerConfig
from raysys.pipeline import Pipeline
from raysys.pools.config import PoolConfig
from raysys.prepare.dataset import Sequences
from raysys.train.ranker import train_ranker

USERS, CLUSTER, DIM = 3_000, 100, 64
"""Users; items of a cluster; width of vectors."""
EVENTS = (50, 200)
"""Shortest and longest history."""
EXAMPLES = 256


def build_bundle(items: int, seed: int = 0) -> Bundle:
    """Encoder, co-visitation, popularity and ranker over so many items."""
    rng = np.random.default_rng(seed)
    data = histories_of(items, rng)
    counts = np.bincount(data.items, minlength=items)
    torch.manual_seed(seed)
    encoder = InterestEncoder(items, 2, InterestConfig(dim=DIM, num_layers=2, max_length=50))
    centres = rng.standard_normal((-(-items // CLUSTER), DIM), dtype=np.float32)
    with torch.no_grad():
        for first in range(0, items, 100_000):
            rows = np.arange(first, min(first + 100_000, items))
            vectors = centres[rows // CLUSTER] + 0.7 * rng.standard_normal((len(rows), DIM), dtype=np.float32)
            encoder.items.weight[rows] = 0.02 * torch.from_numpy(vectors)
    models = {
        "interest": InterestRetriever.from_encoder(encoder.eval(), np.ones(items)),
        "covisit": Covisitation.fit(data, items, CovisitConfig(window=10)),
        "popularity": Popularity.fit(data, items),
    }
    temperatures = {"interest": 1.0, "covisit": 0.5, "popularity": 1.0}
    mixture = Fusion.of({"interest": 0.6, "covisit": 0.35, "popularity": 0.05}, temperatures).to_dict()
    table = pa.table(
        {
            "item_idx": pa.array(np.arange(items), pa.int32()),
            "item_id": [f"i{row}" for row in range(items)],
            "num_train": pa.array(counts, pa.int64()),
            "kind": pa.array(np.arange(items) % 1000, pa.int64()),  # a filter on it keeps one item in a thousand
        }
    )
    histories = Histories.build(data, user_ids(), max_events=EVENTS[1])
    bundle = Bundle(table, models, {"mixture": mixture, "ranker_weight": 0.5}, histories)
    positions = data.last_positions()[:EXAMPLES]
    queries = data.queries_before(positions)
    bundle.models["ranker"], _ = train_ranker(
        queries,
        Pipeline(bundle).pooled(PoolConfig()).retrieve(queries).candidates,
        data.items[positions].astype(np.int64),
        None,
        item_vectors=models["interest"].item_vectors,
        content_vectors=None,
        item_counts=counts,
        config=RankerConfig(epochs=1),
        seed=seed,
    )
    return bundle


def manifest(items: int) -> dict:
    """What `Bundle.write` has to be told."""
    return {
        "events": ["other", "view"],
        "config": {},
        "data": {"items": items},
        "metrics": {},
        "watermark": 1_700_000_000,
        "log_offset": None,
    }


def user_ids() -> list[str]:
    """Ids by user row."""
    return [f"u{user}" for user in range(USERS)]


def histories_of(items: int, rng: np.random.Generator) -> Sequences:
    """Histories in three clusters each, first items of a cluster most."""
    lengths = rng.integers(EVENTS[0], EVENTS[1] + 1, USERS)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    homes = rng.integers(0, max(1, items // CLUSTER), (USERS, 3))
    users = np.repeat(np.arange(USERS), lengths)
    within = np.minimum(rng.zipf(1.2, len(users)) - 1, CLUSTER - 1)
    rows = np.minimum(homes[users, rng.integers(0, 3, len(users))] * CLUSTER + within, items - 1).astype(np.int32)
    times = 1_600_000_000 + 3600 * (np.arange(len(users)) - indptr[users])
    ones = np.ones(len(users), np.float32)
    return Sequences(
        np.arange(USERS, dtype=np.int32), indptr, rows, np.ones(len(users), np.int8), times, ones, ones > 0, np.zeros(len(users), np.int8)
    )
