"""A bundle: one immutable, checksummed version of everything an answer needs.

    BUNDLE/
      manifest.json          format, version, created, config, data fingerprint, metrics, events, models, sha256 of every file
      vocabulary.parquet     item_idx, item_id
      items.parquet          item attributes, row = item_idx
      histories.parquet      user_key (keyed hash), item_idx, event, timestamp, value: where serving starts from; holds no user ids
      NAME.safetensors       arrays of one model; its settings stand in manifest["models"][NAME]

Knows files and models, not requests (`pipeline.py`) and not versions in use (`registry.py`).
"""

import hashlib
import importlib
import os
import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.numpy import save as save_arrays

from raysys import storage
from raysys.errors import BundleCorrupt, BundleIncompatible, BundleNotFound
from raysys.events.identity import key_id, user_key
from raysys.models.base import Arrays
from raysys.packing import packed, unpacked
from raysys.prepare.dataset import Sequences
from raysys.queries import Queries
from raysys.schema import ITEM_ID, ITEM_IDX, UNKNOWN_ITEM

FORMAT = "raysys-bundle/2"
WRITTEN = ("format", "version", "created", "user_key_id", "history_max_events", "fusion", "models", "files", "packing")
"""What `Bundle.write` puts into a manifest itself."""
NUM_CANDIDATES = 200
"""Items that retrieval hands to ranking, where a bundle does not say."""
KEPT_COPIES = 8
"""Copies of remote bundles that a node keeps on its disk, the last opened; each is read whole when it is opened."""
MANIFEST, VOCABULARY, ITEMS, HISTORIES = "manifest.json", "vocabulary.parquet", "items.parquet", "histories.parquet"

MODEL_CLASSES = {
    "interest": "raysys.models.interest:InterestRetriever",
    "covisit": "raysys.models.covisit:Covisitation",
    "recent": "raysys.models.covisit:Covisitation",
    "kinds": "raysys.models.kinds:Kinds",
    "linear": "raysys.models.linear:Linear",
    "popularity": "raysys.models.popularity:Popularity",
    "content": "raysys.models.content:ContentNeighbours",
    "dot_product": "raysys.models.dot_product:DotProduct",
    "ranker": "raysys.models.ranker:Ranker",
}
"""Model name in a manifest -> class; an own table, because a name in a file must not choose what is imported."""

HISTORY_SCHEMA = pa.schema(
    [
        ("user_key", pa.binary(16)),
        (ITEM_IDX, pa.list_(pa.int32())),
        ("event", pa.list_(pa.int8())),
        ("timestamp", pa.list_(pa.int64())),
        ("value", pa.list_(pa.float32())),  # NaN where the event has none
    ]
)


@dataclass(frozen=True)
class Histories:
    """The last events of each known user, found by keyed hash.

    Attributes:
        table: HISTORY_SCHEMA rows.
        max_events: bound on the length of each list.
    """

    table: pa.Table
    max_events: int

    @classmethod
    def build(cls, sequences: Sequences, user_ids: list[str], *, max_events: int) -> "Histories":
        """Cut every user's known-item events to the last `max_events`.

        Args:
            sequences: U users; rows without events are left out.
            user_ids: U ids, in the order of the users.
            max_events: events kept a user.
        """
        known = sequences.where(sequences.items != UNKNOWN_ITEM)
        lengths = np.minimum(np.diff(known.indptr), max_events)
        rows = np.flatnonzero(lengths)
        lengths = lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        take = np.arange(offsets[-1]) + np.repeat(known.indptr[1:][rows] - lengths - offsets[:-1], lengths)
        lists = [
            pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(array[take], field.type.value_type))
            for array, field in zip((known.items, known.events, known.times, known.values), list(HISTORY_SCHEMA)[1:], strict=True)
        ]
        keys = pa.array([user_key(user_ids[row]) for row in rows], pa.binary(16))
        return cls(pa.table([keys, *lists], schema=HISTORY_SCHEMA), max_events)

    @classmethod
    def stack(cls, parts: Iterable["Histories"]) -> "Histories":
        """Those of one or more groups of users, one after the other."""
        found = list(parts)
        return cls(pa.concat_tables([part.table for part in found]), found[0].max_events)

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        prefixes = np.array([int.from_bytes(key.as_py()[:8], "big") for key in self.table["user_key"]], dtype=np.uint64)
        order = np.argsort(prefixes, kind="stable")
        return prefixes[order], order

    @cached_property
    def _lists(self) -> tuple[np.ndarray, list[np.ndarray]]:
        columns = [self.table[name].combine_chunks() for name in HISTORY_SCHEMA.names[1:]]
        columns = [column.chunk(0) if isinstance(column, pa.ChunkedArray) else column for column in columns]
        first = columns[0].offsets.to_numpy() if len(columns[0]) else np.zeros(1, np.int32)
        return first - first[0], [column.flatten().to_numpy() for column in columns]

    def lookup(self, user_id: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
        """(items int32, events int8, times int64, values float32) of a user, oldest first; None for a stranger."""
        key = user_key(user_id)
        prefixes, order = self._index
        prefix = np.uint64(int.from_bytes(key[:8], "big"))
        for position in range(np.searchsorted(prefixes, prefix), np.searchsorted(prefixes, prefix, side="right")):
            row = order[position]
            if self.table["user_key"][int(row)].as_py() == key:
                offsets, arrays = self._lists
                items, events, times, values = (array[offsets[row] : offsets[row + 1]] for array in arrays)
                return items, events, times, values
        return None

    def sample(self, count: int) -> Queries:
        """Histories of at most so many users, spread evenly, asked right after their last event."""
        offsets, arrays = self._lists
        rows = np.arange(len(self))[:: max(1, len(self) // count)][:count]
        lengths = (offsets[rows + 1] - offsets[rows]).astype(np.int64)
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        take = np.arange(indptr[-1]) - np.repeat(indptr[:-1] - offsets[rows], lengths)
        items, events, times, values = (array[take] for array in arrays)
        return Queries(items, events, times, values, indptr, times[indptr[1:] - 1])

    def __len__(self) -> int:
        return self.table.num_rows


@dataclass
class Bundle:
    """A version in memory. `models` holds every retriever by name and, if there is one, the ranker.

    Attributes:
        items: item attributes, row = item_idx.
        models: name in MODEL_CLASSES -> model.
        fusion: settings of `models.fusion.Fusion` as a dict.
        histories: what serving knows of the users of the training data.
        manifest: as on disk; empty before `write`.
    """

    items: pa.Table
    models: dict[str, Any]
    fusion: dict
    histories: Histories
    manifest: dict = field(default_factory=dict)

    @property
    def version(self) -> str:
        """Version id, sortable by time of creation."""
        return self.manifest["version"]

    @property
    def events(self) -> list[str]:
        """Event names by code; code 0 is for all others."""
        return self.manifest["events"]

    @property
    def num_candidates(self) -> int:
        """Items that retrieval hands to ranking."""
        return int(self.fusion.get("num_candidates", NUM_CANDIDATES))

    @property
    def told(self) -> dict[str, Any]:
        """What the manifest says beyond what `write` puts there: for the manifest of a version that is made from this one."""
        return {name: value for name, value in self.manifest.items() if name not in WRITTEN}

    @cached_property
    def event_codes(self) -> dict[str, int]:
        """Code by event name."""
        return {name: code for code, name in enumerate(self.events)}

    @cached_property
    def item_ids(self) -> list[str]:
        """Item id by row."""
        return self.items[ITEM_ID].to_pylist()

    @cached_property
    def item_index(self) -> dict[str, int]:
        """Row by item id."""
        return {item_id: row for row, item_id in enumerate(self.item_ids)}

    @property
    def content_vectors(self) -> np.ndarray | None:
        """(N, D) float32 unit content vectors, or None without a content model."""
        content = self.models.get("content")
        return None if content is None else content.item_vectors

    @property
    def key_problem(self) -> str | None:
        """Why no user's history can be found here, None where it can: keys are hashes under a secret that this machine must share."""
        written_with = self.manifest["user_key_id"]
        if written_with == key_id() or len(self.histories) == 0:
            return None
        return (
            f"the histories of {self.version} were written with user key {written_with}, this machine has {key_id()}: "
            "its users look like strangers here; set RAYSYS_USER_KEY or RAYSYS_HOME as where it was trained"
        )

    def write(self, uri: str, *, manifest: Mapping[str, Any], packing: bool = False) -> str:
        """Write the bundle to an empty or missing folder; complete or absent, never half.

        Args:
            uri: target folder; an existing bundle there is replaced.
            manifest: what the caller knows: config, data, metrics, events, ...
            packing: write arrays in fewer bytes (`packing.py`), with a rounding error.

        Returns:
            The version id.
        """
        files: dict[str, bytes] = {
            VOCABULARY: _parquet(self.items.select([ITEM_IDX, ITEM_ID])),
            ITEMS: _parquet(self.items),
            HISTORIES: _parquet(self.histories.table),
        }
        metas, notes = {}, {}
        for name, model in self.models.items():
            arrays, metas[name] = model.to_arrays()
            if packing:
                arrays, notes[name] = packed(arrays)
            files[f"{name}.safetensors"] = save_arrays({key: np.ascontiguousarray(array) for key, array in arrays.items()})
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}
        created = datetime.now(UTC)
        content_id = hashlib.sha256("".join(digests.values()).encode()).hexdigest()[:8]
        self.manifest = {
            "format": FORMAT,
            "version": f"{created:%Y%m%dT%H%M%S}{created.microsecond // 1000:03d}Z-{content_id}",
            "created": created.isoformat(timespec="seconds"),
            **manifest,
            "user_key_id": key_id(),
            "history_max_events": self.histories.max_events,
            "fusion": self.fusion,
            "models": metas,
            "packing": notes,
            "files": digests,
        }
        local = storage.is_local(uri)
        target = storage.beside(uri, f".tmp-{secrets.token_hex(6)}") if local else uri
        for name, content in files.items():
            storage.write_bytes(storage.join(target, name), content)
        storage.write_json(storage.join(target, MANIFEST), self.manifest)
        if local:
            storage.replace_dir(storage.resolve(target)[1], storage.resolve(uri)[1])
        return self.version

    @classmethod
    def open(cls, uri: str, *, only: Collection[str] | None = None) -> "Bundle":
        """Read a bundle after checking its format and checksums.

        Args:
            uri: its folder; a remote one is copied to this node's cache first.
            only: names of the models to load; all when None.

        Raises:
            BundleNotFound, BundleIncompatible, BundleCorrupt: with the reason.
        """
        local = _cached(uri)
        manifest = verify(local)
        models = {}
        for name, meta in manifest["models"].items():
            if only is not None and name not in only:
                continue
            arrays = unpacked(_mapped(storage.join(local, f"{name}.safetensors")), manifest.get("packing", {}).get(name, {}))
            models[name] = load_model(name, arrays, meta)
        return cls(
            storage.read_table(storage.join(local, ITEMS)),
            models,
            manifest["fusion"],
            Histories(storage.read_table(storage.join(local, HISTORIES)), manifest["history_max_events"]),
            manifest,
        )


def read_manifest(uri: str) -> dict:
    """The manifest, checked for format only.

    Raises:
        BundleNotFound, BundleIncompatible: with the reason.
    """
    path = storage.join(uri, MANIFEST)
    if not storage.exists(path):
        raise BundleNotFound(f"{uri}: expected a bundle with {MANIFEST}, found none; run `raysys train --out {uri}`")
    manifest = storage.read_json(path)
    if manifest.get("format") != FORMAT:
        raise BundleIncompatible(f"{uri}: expected bundle format {FORMAT}, found {manifest.get('format')!r}; train again with this version")
    return manifest


def verify(uri: str) -> dict:
    """Check format and the checksum of every file; return the manifest.

    Raises:
        BundleNotFound, BundleIncompatible, BundleCorrupt: with the reason.
    """
    manifest = read_manifest(uri)
    for name, expected in manifest["files"].items():
        path = storage.join(uri, name)
        if not storage.exists(path):
            raise BundleCorrupt(f"{uri}: {name} is missing; publish the bundle again from where it was trained")
        found = storage.sha256(path)
        if found != expected:
            raise BundleCorrupt(f"{uri}: {name} has sha256 {found[:12]}, the manifest says {expected[:12]}; publish the bundle again")
    return manifest


def load_model(name: str, arrays: Arrays, meta: dict) -> Any:
    """A model of MODEL_CLASSES from its arrays and settings.

    Raises:
        BundleIncompatible: another version of the code wrote it.
    """
    try:
        return _model_class(name).from_arrays(arrays, meta)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BundleIncompatible(f"model {name!r} was written by another version of raysys ({error}); train again") from error


def _mapped(uri: str) -> Arrays:
    """The arrays of a local file as its pages: processes of a node share them, and whoever writes to one gets a copy of that page."""
    with safe_open(storage.resolve(uri)[1], framework="pt") as file:
        return {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118: it is no dict


def _model_class(name: str) -> Any:
    if name not in MODEL_CLASSES:
        raise BundleIncompatible(f"unknown model {name!r} in the bundle; known: {', '.join(MODEL_CLASSES)}")
    module, _, attribute = MODEL_CLASSES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _cached(uri: str) -> str:
    """A local copy of a remote bundle, one a node and version, named by its manifest's checksum."""
    if storage.is_local(uri):
        return uri
    read_manifest(uri)
    cache = Path(storage.home()) / "cache" / "bundles" / storage.sha256(storage.join(uri, MANIFEST))
    if not (cache / MANIFEST).exists():
        partial = cache.with_name(f"{cache.name}.tmp-{secrets.token_hex(6)}")
        storage.copy_tree(uri, str(partial))
        storage.replace_dir(str(partial), str(cache))
        copies = sorted((path for path in cache.parent.iterdir() if ".tmp-" not in path.name), key=lambda path: path.stat().st_mtime)
        for old in copies[:-KEPT_COPIES]:
            storage.remove(str(old))
    os.utime(cache)
    return str(cache)
