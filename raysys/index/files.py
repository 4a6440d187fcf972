"""Index files: built once a node, mapped by every process, checked when opened.

    FOLDER/index.faiss                       approximate
    FOLDER/values.npy [scales.npy]           exact
    FOLDER/manifest.json                     kind, shape, what was tuned, checksums; written last

A folder belongs to the node's cache, not to the bundle: everything in it follows
from the bundle and the settings.
"""

import contextlib
import fcntl
import io
import logging
import os
import time
from dataclasses import asdict

import numpy as np
import pyarrow as pa

from raysys import storage
from raysys.errors import BundleCorrupt, BundleIncompatible, BundleNotFound, RaysysError
from raysys.index import approximate
from raysys.index.config import IndexConfig
from raysys.index.items import Base, ExactBase, ItemIndex
from raysys.index.vectors import from_arrays, stored_as

FORMAT = 1
MANIFEST, FAISS = "manifest.json", "index.faiss"

logger = logging.getLogger(__name__)


def build(folder: str, vectors: np.ndarray, *, config: IndexConfig, queries: np.ndarray | None = None, key: str = "") -> dict:
    """Write the index of a catalogue.

    Args:
        folder: a local folder; files of an older index in it are replaced.
        vectors: (N, D) finite float32.
        config: exact or approximate, and how well.
        queries: (B, D) float32 like those that will come, to tune on; item vectors stand in for them when None, which is
            right only where queries are distributed as items are.
        key: names what the vectors came from.

    Returns:
        The manifest.

    Raises:
        SchemaError: vectors are no finite matrix.
    """
    started = time.perf_counter()
    kind = config.chosen(len(vectors)) if len(vectors) else "exact"
    storage_name = config.storage if kind == "exact" else "float32"
    stored = stored_as(storage_name, vectors)
    manifest = {"format": FORMAT, "key": key, "config": asdict(config), "kind": kind, "storage": storage_name, "shape": list(vectors.shape)}
    names = []
    if kind == "approximate":
        values = stored.block(0, len(vectors))
        content, tuned = approximate.build(values, values if queries is None else queries, k=config.k, target_recall=config.target_recall)
        storage.write_bytes(storage.join(folder, FAISS), pa.py_buffer(content))
        names.append(FAISS)
        manifest["tuned"] = asdict(tuned)
    else:
        for name, array in stored.arrays().items():
            file = io.BytesIO()
            np.save(file, array)
            storage.write_bytes(storage.join(folder, f"{name}.npy"), file.getbuffer())
            names.append(f"{name}.npy")
    paths = {name: storage.join(folder, name) for name in names}
    manifest["files"] = {name: {"bytes": os.path.getsize(path), "sha256": storage.sha256(path)} for name, path in paths.items()}
    manifest["seconds"] = round(time.perf_counter() - started, 3)
    storage.write_json(storage.join(folder, MANIFEST), manifest)
    return manifest


def read_manifest(folder: str) -> dict:
    """The manifest of an index.

    Raises:
        BundleNotFound: there is none.
        BundleCorrupt: it cannot be read.
        BundleIncompatible: it is of another format.
    """
    path = storage.join(folder, MANIFEST)
    if not storage.exists(path):
        raise BundleNotFound(f"{folder}: expected {MANIFEST} of an item index, found none; build it")
    try:
        manifest = storage.read_json(path)
        version = manifest["format"]
    except (RaysysError, ValueError, KeyError, TypeError) as error:
        raise BundleCorrupt(f"{path}: expected the manifest of an item index ({error}); remove the folder and build again") from None
    if version != FORMAT:
        raise BundleIncompatible(f"{path}: expected index format {FORMAT}, found {version}; remove the folder and build again")
    return manifest


def open_index(folder: str) -> ItemIndex:
    """Map an index; its pages are shared with every other process that does.

    Raises:
        BundleNotFound: nothing is there.
        BundleCorrupt: a file is missing, or its content is not what was written.
        BundleIncompatible: another format.
    """
    manifest = read_manifest(folder)
    try:
        for name, expected in manifest["files"].items():
            path = storage.join(folder, name)
            found = {"bytes": os.path.getsize(path), "sha256": storage.sha256(path)}
            if found != expected:
                raise BundleCorrupt(f"{path}: expected {expected}, found {found}; remove the folder and build again")
        base: Base
        if manifest["kind"] == "approximate":
            base = approximate.InvertedLists(storage.join(folder, FAISS), manifest["tuned"]["probes"], manifest["tuned"]["filtered"])
        else:
            paths = {name.removesuffix(".npy"): storage.join(folder, name) for name in manifest["files"]}
            # An empty array cannot be mapped.
            arrays = {name: np.load(path, mmap_mode="r" if manifest["shape"][0] else None) for name, path in paths.items()}
            base = ExactBase(from_arrays(manifest["storage"], arrays))
        config = IndexConfig(**manifest["config"])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise BundleCorrupt(f"{folder}: expected an item index, {error}; remove the folder and build again") from None
    return ItemIndex(base, max_fresh=config.max_fresh)


def open_or_build(folder: str, vectors: np.ndarray, *, key: str, config: IndexConfig, queries: np.ndarray | None = None) -> ItemIndex:
    """The index of a catalogue, from the node's cache or built now; of several processes one builds and the others wait.

    Args:
        folder: a local folder for this key alone.
        vectors: as in `build`.
        key: what the vectors came from, such as version and source; an index of another key or configuration is built again.
        config: as in `build`.
        queries: as in `build`.
    """
    os.makedirs(folder, exist_ok=True)
    with open(storage.join(folder, ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            manifest = read_manifest(folder)
            if manifest["key"] == key and manifest["config"] == asdict(config) and manifest["shape"] == list(vectors.shape):
                return open_index(folder)
        except BundleNotFound:
            pass
        except (BundleCorrupt, BundleIncompatible) as error:
            logger.warning("item index is built again: %s", error)
        build(folder, vectors, config=config, queries=queries, key=key)
        return open_index(folder)


def drop_unused(root: str, keep: int) -> None:
    """Remove the index folders below `root` that were opened or built longest ago, all but the last `keep`.

    Who has one of them mapped keeps it: the pages stay until they are unmapped.
    """
    locks = {name: storage.join(root, name, ".lock") for name in os.listdir(root)}
    used = {name: os.path.getmtime(lock) for name, lock in locks.items() if os.path.exists(lock)}
    for name in sorted(used, key=lambda one: used[one])[:-keep]:
        with open(locks[name], "a") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not while somebody opens or builds it
            storage.remove(storage.join(root, name))
