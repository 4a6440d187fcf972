"""Pools of a bundle: which of its sources need an index, and the index of each in a folder of the node.

An index is found by what its vectors are, not by whose they are: the next
version of a bundle that changed nothing about its content vectors finds that
index ready, and versions of several registries share what they have in common.
"""

import hashlib
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from raysys import storage
from raysys.bundle import Bundle
from raysys.index.config import IndexConfig
from raysys.index.files import drop_unused, open_or_build
from raysys.models.base import SparseSource, VectorSource
from raysys.models.fusion import Fusion
from raysys.models.popularity import Popularity
from raysys.pools.config import PoolConfig
from raysys.pools.retrieve import Pools
from raysys.pools.sources import Pool, SparsePool, StaticPool, VectorPool

LOG = logging.getLogger(__name__)
TUNING_HISTORIES = 256
KEPT_INDEXES = 8
"""Index folders that a node keeps, the last used: two versions of three sources, and some to go back to."""


def open_pools(
    bundle: Bundle, sources: Mapping[str, Any], fusion: Fusion, config: PoolConfig, *, folder: str | None = None
) -> Pools | None:
    """The pools of a bundle; its indexes are opened, or built now, which takes minutes at a million items.

    Args:
        bundle: whose.
        sources: models of the mixture, by name.
        fusion: the mixture.
        config: settings.
        folder: of the node's indexes; `cache/indexes` of the home folder when None.

    Returns:
        None where every item is to be scored: the catalogue is small, or popularity, which every item has, is not in the mixture.
    """
    num_items = bundle.items.num_rows
    if not config.applies(num_items) or "popularity" not in sources:
        return None
    folder = folder or str(storage.home() / "cache" / "indexes")
    vectors: dict[str, VectorPool] = {}
    for name, model in {**sources, **{name: model for name, model in bundle.models.items() if name == "content"}}.items():
        if isinstance(model, VectorSource):
            vectors[name] = _vector_pool(bundle, name, model, fusion.temperatures.get(name, 1.0), config, folder)
    pools: dict[str, Pool] = {}
    for name, model in sources.items():
        temperature = fusion.temperatures[name]
        if isinstance(model, Popularity):
            pools[name] = StaticPool(model.log_counts, temperature=temperature)
        elif isinstance(model, SparseSource):
            pools[name] = SparsePool(model, temperature=temperature)
        else:
            pools[name] = vectors[name]
    drop_unused(folder, KEPT_INDEXES)
    return Pools(pools, fusion, vectors.get("content"), num_items, config.size, config.few, config.sample + config.size)


def _vector_pool(bundle: Bundle, name: str, source: VectorSource, temperature: float, config: PoolConfig, folder: str) -> VectorPool:
    evidence, vectors = source.evidence, np.ascontiguousarray(source.item_vectors, np.float32)
    rows = np.arange(len(vectors))
    if evidence is not None:
        # What it knows nothing of must not come up: a zero vector is no neighbour of anything.
        vectors, rows = np.where(evidence[:, None], vectors, np.float32(0)), np.flatnonzero(evidence)
    histories = bundle.histories.sample(TUNING_HISTORIES)
    users = source.user_vectors(histories) if len(histories) else None
    settings = IndexConfig(kind="approximate", k=min(config.size, len(vectors)), target_recall=config.target_recall)
    key, started = hashlib.sha256(vectors.data).hexdigest(), time.monotonic()
    place = storage.join(folder, key[:32])
    built = not os.path.exists(place)
    index = open_or_build(place, vectors, key=key, config=settings, queries=users)
    LOG.info("index of %s: %s in %.1f s", name, "built" if built else "opened", time.monotonic() - started)
    sample = np.sort(np.random.default_rng(0).choice(rows, min(config.sample, len(rows)), replace=False))
    return VectorPool(source, index, temperature=temperature, head=config.size, sample=sample)
