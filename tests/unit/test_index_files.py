import json
import os
import subprocess
import sys

import numpy as np
import pytest

from raysys.errors import BundleCorrupt, BundleIncompatible, BundleNotFound, SchemaError
from raysys.index.approximate import InvertedLists
from raysys.index.config import IndexConfig
from raysys.index.exact import exact_top_k
from raysys.index.files import build, open_index, open_or_build
from raysys.index.items import ExactBase
from raysys.index.vectors import stored_as

KINDS = [IndexConfig(kind="exact"), IndexConfig(kind="exact", storage="int8"), IndexConfig(kind="approximate", target_recall=0.9, k=10)]
MAPPED = """
import os, sys
import numpy as np
from raysys.index.config import IndexConfig
from raysys.index.files import open_or_build
folder, kind, storage, items = sys.argv[1], sys.argv[2], sys.argv[3], np.load(sys.argv[4])
index = open_or_build(folder, items, key="b-1", config=IndexConfig(kind=kind, storage=storage, target_recall=0.9, k=10))
rows, _ = index.search(items[:3], 10)
maps = [line.split() for line in open("/proc/self/maps") if folder in line]
print(rows.tolist(), sorted({(fields[1], fields[4]) for fields in maps}), os.stat(folder + "/manifest.json").st_mtime_ns)
"""


def flipped(content):
    """One bit near the end, inside the vectors."""
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


def vectors(count=3000, dim=16, seed=0):
    values = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.mark.parametrize(("kind", "storage"), [("exact", "int8"), ("approximate", "float32")])
def test_of_two_processes_one_builds_and_both_map_its_file(kind, storage, tmp_path):
    """Told by the inode that each has mapped, readable and shared, and by when the manifest was written."""
    items, folder = vectors(), str(tmp_path / "index")
    np.save(tmp_path / "items.npy", items)
    arguments = [sys.executable, "-c", MAPPED, folder, kind, storage, str(tmp_path / "items.npy")]
    both = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=300)[0] for process in both]
    name = "values.npy" if kind == "exact" else "index.faiss"
    assert answers[0] == answers[1]
    assert str(("r--s", str(os.stat(tmp_path / "index" / name).st_ino))) in answers[0]
    assert answers[0].startswith(str(open_index(folder).search(items[:3], 10)[0].tolist()))
    assert not [name for name in os.listdir(folder) if ".tmp" in name]


def test_kind_follows_the_size(tmp_path):
    config = IndexConfig(approximate_from=1000, k=10)
    for count, kind, base in ((0, "exact", ExactBase), (999, "exact", ExactBase), (1000, "approximate", InvertedLists)):
        manifest = build(str(tmp_path / str(count)), vectors(count), config=config)
        assert manifest["kind"] == kind
        index = open_index(str(tmp_path / str(count)))
        assert isinstance(index.base, base) and len(index) == count
        index.insert([5000], vectors(1, seed=3))
        assert index.search(vectors(1, seed=3), 2)[0][0, 0] == 5000


def test_tuning_reaches_its_target_with_few_lists(tmp_path):
    """On queries that it was not tuned on; the more recall is asked for, the more lists are read."""
    rng = np.random.default_rng(0)
    centres = vectors(100, 32)
    items = (centres[rng.integers(0, 100, 8000)] + 0.1 * rng.standard_normal((8000, 32))).astype(np.float32)
    queries = (centres[rng.integers(0, 100, 600)] + 0.1 * rng.standard_normal((600, 32))).astype(np.float32)
    probes = []
    for target in (0.5, 0.9, 0.98):
        config = IndexConfig(kind="approximate", target_recall=target, k=50)
        tuned = build(str(tmp_path / str(target)), items, config=config, queries=queries[:300])["tuned"]
        found = open_index(str(tmp_path / str(target))).search(queries[300:], 50)[0]
        expected = exact_top_k(queries[300:], items, 50)[0]
        recall = np.mean([len(np.intersect1d(a, b)) / 50 for a, b in zip(found, expected, strict=True)])
        assert tuned["recall"] >= target and recall >= target - 0.03
        probes.append(tuned["probes"])
    assert probes[0] < probes[2] < tuned["lists"] / 2 and probes == sorted(probes)
    # The same under filters of which none was tuned; the k best allowed lie in other clusters.
    for share in (0.7, 0.3, 0.05, 0.004):
        allowed = rng.random(len(items)) < share
        found = open_index(str(tmp_path / "0.98")).search(queries[300:], 50, allowed=allowed)[0]
        expected = exact_top_k(queries[300:], items, 50, allowed=allowed)[0]
        hits = sum(len(np.intersect1d(a[a >= 0], b[b >= 0])) for a, b in zip(found, expected, strict=True))
        assert hits / (expected >= 0).sum() >= 0.95


def test_memory_is_what_was_promised(tmp_path):
    items = vectors(60_000, 64)
    manifest = build(str(tmp_path / "a"), items, config=IndexConfig(target_recall=0.3))
    assert manifest["kind"] == "approximate"
    assert sum(file["bytes"] for file in manifest["files"].values()) <= items.nbytes / 3
    for storage, share in (("float32", 1.0), ("bf16", 0.5), ("int8", 0.27)):
        stored = stored_as(storage, items)
        assert sum(array.nbytes for array in stored.arrays().values()) <= share * items.nbytes
        np.testing.assert_allclose(stored.take(np.arange(100)), items[:100], atol={"float32": 0, "bf16": 2**-9, "int8": 1 / 250}[storage])


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_damage_is_one_clear_error_and_is_mended(config, tmp_path):
    items, folder = vectors(), str(tmp_path / "index")
    with pytest.raises(BundleNotFound, match="found none; build it"):
        open_index(folder)
    index = open_or_build(folder, items, key="b-1:interest", config=config)
    expected = index.search(items[:5], 10)[0]
    name = next(iter(json.loads((tmp_path / "index/manifest.json").read_text())["files"]))
    damages = {
        "a flipped bit": lambda path: path.write_bytes(
            path.read_bytes()[:-9] + bytes([path.read_bytes()[-9] ^ 1]) + path.read_bytes()[-8:]
        ),
        "cut short": lambda path: path.write_bytes(path.read_bytes()[:1000]),
        "empty": lambda path: path.write_bytes(b""),
        "missing": lambda path: path.unlink(),
    }
    for damage in damages.values():
        copy = tmp_path / "index" / "damaged"  # the living index has the old file mapped: replace it, do not write into it
        copy.write_bytes((tmp_path / "index" / name).read_bytes())
        damage(copy)
        (tmp_path / "index" / name).unlink()
        if copy.exists():
            copy.rename(tmp_path / "index" / name)
        with pytest.raises(BundleCorrupt, match="remove the folder and build again"):
            open_index(folder)
        again = open_or_build(folder, items, key="b-1:interest", config=config)
        np.testing.assert_array_equal(again.search(items[:5], 10)[0], expected)
        np.testing.assert_array_equal(index.search(items[:5], 10)[0], expected)
    manifest = tmp_path / "index/manifest.json"
    manifest.write_text("{")
    with pytest.raises(BundleCorrupt, match="expected the manifest"):
        open_index(folder)
    manifest.write_text('{"format": 99}')
    with pytest.raises(BundleIncompatible, match="expected index format 1, found 99"):
        open_index(folder)


def test_kept_for_its_key_and_settings_only(tmp_path):
    folder, config = str(tmp_path / "index"), IndexConfig()
    open_or_build(folder, vectors(), key="b-1", config=config)
    written = os.stat(tmp_path / "index/manifest.json").st_mtime_ns
    open_or_build(folder, vectors(), key="b-1", config=config)
    assert os.stat(tmp_path / "index/manifest.json").st_mtime_ns == written, "opened, not built"
    other = vectors(seed=9)
    assert open_or_build(folder, other, key="b-2", config=config).search(other[7:8], 1)[0][0, 0] == 7
    int8 = open_or_build(folder, other, key="b-2", config=IndexConfig(storage="int8"))
    assert isinstance(int8.base, ExactBase) and set(int8.base.vectors.arrays()) == {"values", "scales"}


def test_what_is_no_catalogue_is_refused(tmp_path):
    with pytest.raises(SchemaError, match="finite"):
        build(str(tmp_path), np.full((3, 4), np.inf, np.float32), config=IndexConfig())
    with pytest.raises(SchemaError, match="another shape"):
        build(str(tmp_path), np.zeros(4, np.float32), config=IndexConfig())
    with pytest.raises(ValueError, match="expected kind auto, exact or approximate, got 'fast'"):
        IndexConfig(kind="fast")
