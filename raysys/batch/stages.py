"""What is computed for a part: lists of the whole pipeline, of retrieval, of the encoder alone, or vectors. No Ray here.

Legend: U users of a part, N items, D dimension, k list length.
"""

import numpy as np
import pyarrow as pa
import torch

from raysys.bundle import Bundle
from raysys.errors import BundleIncompatible
from raysys.index import exact
from raysys.models.base import top_k
from raysys.models.interest import InterestRetriever
from raysys.pipeline import Pipeline, available_mask
from raysys.pools.config import PoolConfig
from raysys.queries import Queries

STAGES = ("final", "retrieval", "interest")
"""Lists as served; in retrieval's order; by the interest encoder's dot product alone, which is the fast one."""
EMBEDDINGS = "embeddings"
MAX_BATCH_SCORES = 1 << 23
"""Scores of one source in a batch; a batch takes fewer users where the catalogue is large."""


class Stage:
    """One stage of one bundle, part after part.

    Args:
        bundle: with the models of the stage.
        stage: one of STAGES, or EMBEDDINGS.
        k: list length.
        batch_size: users at once, at most.
        threads: of the exact search.
        pools: where retrieval takes pools; nowhere when None.
    """

    def __init__(self, bundle: Bundle, stage: str, *, k: int, batch_size: int, threads: int, pools: PoolConfig | None = None):
        self.bundle, self.stage, self.k, self.threads = bundle, stage, k, threads
        self.available = available_mask(bundle)
        if stage in STAGES[:2]:
            self.pipeline = Pipeline(bundle).pooled(pools or PoolConfig(items_from=0))
            width = bundle.items.num_rows if self.pipeline.pools is None else self.pipeline.pools.width
        else:
            self.encoder = encoder_of(bundle)
            width = bundle.items.num_rows
            self.device_items = torch.from_numpy(self.encoder.item_vectors).cuda() if torch.cuda.is_available() else None
        self.batch_size = max(1, min(batch_size, MAX_BATCH_SCORES // width))
        self.item_ids = bundle.items["item_id"].combine_chunks()

    def table(self, keys: pa.Array, name: str, queries: Queries) -> pa.Table:
        """The rows of one output file, in the order of the part.

        Args:
            keys: (U,) user keys or ids.
            name: of their column.
            queries: U histories.
        """
        if self.stage == EMBEDDINGS:
            vectors = self._user_vectors(queries)
            return pa.table({name: keys, "num_events": pa.array(queries.lengths, pa.int32()), "vector": vector_column(vectors)})
        rows, scores, probabilities = self._interest(queries) if self.stage == "interest" else self._pipeline(queries)
        found = rows >= 0
        offsets = pa.array(np.concatenate([[0], np.cumsum(found.sum(axis=1))]), pa.int32())
        columns = {
            "item_id": self.item_ids.take(pa.array(rows[found])),
            "score": pa.array(scores[found], pa.float32()),
            "probability": pa.array(probabilities[found], pa.float32(), from_pandas=True),
        }
        return pa.table({name: keys, **{key: pa.ListArray.from_arrays(offsets, column) for key, column in columns.items()}})

    def _pipeline(self, queries: Queries) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        parts = []
        for first in range(0, len(queries), self.batch_size):
            batch = queries[first : first + self.batch_size]
            blocked = (batch.indptr, batch.items)
            if self.stage == "final":
                parts.append(self.pipeline.recommend(batch, self.k, allowed=self.available, blocked=blocked))
            else:
                candidates = self.pipeline.retrieve(batch, self.k, allowed=self.available, blocked=blocked).candidates
                order = top_k(candidates.fused, self.k)
                items, fused = (np.take_along_axis(array, order, 1) for array in (candidates.items, candidates.fused))
                parts.append((items, fused, np.full(items.shape, np.nan, np.float32)))
        rows, scores, probabilities = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return rows, scores, probabilities

    def _interest(self, queries: Queries) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """By dot product alone; nothing for users without history, of whom the encoder knows nothing."""
        vectors, seen = self._user_vectors(queries), (queries.indptr, queries.items)
        allowed = self.available & self.encoder.warm
        if self.device_items is None:
            rows, scores = exact.exact_top_k(vectors, self.encoder.item_vectors, self.k, seen=seen, allowed=allowed, threads=self.threads)
        else:
            on_device = torch.from_numpy(allowed).to(self.device_items.device)
            found = [
                exact.top_k_on_device(
                    vectors[first : first + 1024], self.device_items, self.k, seen=(batch.indptr, batch.items), allowed=on_device
                )
                for first in range(0, len(queries), 1024)
                for batch in [queries[first : first + 1024]]
            ]
            rows, scores = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        rows[queries.lengths == 0] = -1
        return rows, scores, np.full(rows.shape, np.nan, np.float32)

    def _user_vectors(self, queries: Queries) -> np.ndarray:
        """(U, D) float32; zero without history."""
        batches = [queries[first : first + self.batch_size] for first in range(0, len(queries), self.batch_size)]
        return np.concatenate([self.encoder.user_vectors(batch) for batch in batches])


def item_vectors_table(bundle: Bundle) -> pa.Table:
    """Item vectors as `export-embeddings` writes them: (N rows) item_id, trained, vector."""
    encoder = encoder_of(bundle)
    return pa.table(
        {"item_id": bundle.items["item_id"], "trained": pa.array(encoder.warm), "vector": vector_column(np.asarray(encoder.item_vectors))}
    )


def encoder_of(bundle: Bundle) -> InterestRetriever:
    """The bundle's interest encoder.

    Raises:
        BundleIncompatible: it was trained without.
    """
    if "interest" not in bundle.models:
        raise BundleIncompatible(
            f"bundle {bundle.version}: expected an interest encoder, found {', '.join(bundle.models)}; train with it in sources"
        )
    return bundle.models["interest"]


def vector_column(vectors: np.ndarray) -> pa.Array:
    """(U, D) float32 as fixed-size lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).ravel(), pa.float32()), vectors.shape[1])
