import hashlib
import json
import signal
import subprocess
import sys
import textwrap

import pytest

from raysys import storage
from raysys.bundle import FORMAT
from raysys.errors import BundleCorrupt, BundleError, BundleIncompatible, BundleNotFound
from raysys.registry import Registry


def make_bundle(folder, version, content=b"weights"):
    folder.mkdir(parents=True)
    (folder / "interest.safetensors").write_bytes(content)
    manifest = {
        "format": FORMAT,
        "version": version,
        "created": "2026-01-01T00:00:00+00:00",
        "metrics": {"ndcg@10": 0.05},
        "files": {"interest.safetensors": hashlib.sha256(content).hexdigest()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


@pytest.fixture
def bundles(tmp_path):
    return {version: make_bundle(tmp_path / "bundles" / version, version) for version in "ABCD"}


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "registry")


def run_python(code, *arguments):
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, text=True, check=False)


def test_an_empty_registry_has_no_current_version(registry):
    assert registry.current() is None
    assert registry.versions() == [] and registry.history() == []


def test_publish_moves_the_pointer_and_counts(registry, bundles):
    first = registry.publish(bundles["A"])
    second = registry.publish(bundles["B"])
    assert (first.version, first.sequence, first.previous) == ("A", 1, None)
    assert (second.version, second.sequence, second.previous, second.pinned) == ("B", 2, "A", False)
    assert registry.current() == second
    assert [move.version for move in registry.history()] == ["A", "B"]
    rows = registry.versions()
    assert [(row["version"], row["current"], row["pinned"]) for row in rows] == [("A", False, False), ("B", True, False)]
    assert rows[0]["metrics"] == {"ndcg@10": 0.05} and rows[0]["published"] == first.published


def test_a_published_bundle_does_not_depend_on_its_source(registry, bundles, tmp_path):
    registry.publish(bundles["A"])
    storage.remove(bundles["A"])
    assert storage.read_bytes(storage.join(registry.bundle_uri("A"), "interest.safetensors")) == b"weights"


def test_publishing_the_current_version_again_changes_nothing(registry, bundles):
    first = registry.publish(bundles["A"])
    assert registry.publish(bundles["A"]) == first
    assert registry.publish(registry.bundle_uri("A")) == first


def test_an_old_version_can_be_published_again_from_the_registry_itself(registry, bundles):
    registry.publish(bundles["A"])
    registry.publish(bundles["B"])
    pointer = registry.publish(registry.bundle_uri("A"))
    assert (pointer.version, pointer.sequence, pointer.previous) == ("A", 3, "B")


def test_a_stale_writer_is_refused(registry, bundles):
    registry.publish(bundles["A"], expected_sequence=0)
    registry.publish(bundles["B"], expected_sequence=1)
    with pytest.raises(BundleError, match="expected the pointer at sequence 1, found 2"):
        registry.publish(bundles["C"], expected_sequence=1)
    assert registry.current().version == "B"


def test_rollback_pins_until_unpin(registry, bundles):
    for version in "ABC":
        registry.publish(bundles[version])
    back = registry.rollback()
    assert (back.version, back.pinned, back.sequence, back.action) == ("B", True, 4, "rollback")
    with pytest.raises(BundleError, match="pinned to B.*--unpin"):
        registry.publish(bundles["D"])
    assert registry.current() == back
    assert [row["version"] for row in registry.versions() if row["pinned"]] == ["B"]
    assert registry.rollback().version == "A", "a second rollback goes further back, not to the version that was left"
    assert registry.rollback("B").version == "B"
    forward = registry.publish(bundles["D"], unpin=True)
    assert (forward.version, forward.pinned, forward.previous) == ("D", False, "B")
    assert registry.rollback().version == "B", "C was rolled back from and never published again"


def test_unpin_by_publishing_the_pinned_version(registry, bundles):
    registry.publish(bundles["A"])
    registry.publish(bundles["B"])
    registry.rollback()
    pointer = registry.publish(bundles["A"], unpin=True)
    assert (pointer.version, pointer.pinned, pointer.sequence) == ("A", False, 4)


def test_rollback_needs_somewhere_to_go(registry, bundles):
    with pytest.raises(BundleNotFound, match="nothing published yet"):
        registry.rollback()
    registry.publish(bundles["A"])
    with pytest.raises(BundleNotFound, match="A is the first version"):
        registry.rollback()
    with pytest.raises(BundleNotFound, match="one of the kept versions \\(A\\), got 'Z'"):
        registry.rollback("Z")
    assert registry.current().version == "A"


@pytest.mark.parametrize("version", ["../bundles/A", "", ".", "..", ".tmp-A-1", "A/B"])
def test_a_version_id_cannot_leave_the_folder(registry, bundles, version):
    registry.publish(bundles["A"])
    with pytest.raises(BundleNotFound, match="expected a version id"):
        registry.rollback(version)
    with pytest.raises(BundleNotFound, match="expected a version id"):
        registry.bundle_uri(version)


def test_unfit_bundles_do_not_move_the_pointer(registry, bundles, tmp_path):
    registry.publish(bundles["A"])
    (tmp_path / "bundles/B/interest.safetensors").write_bytes(b"flipped")
    with pytest.raises(BundleCorrupt, match="interest.safetensors has sha256"):
        registry.publish(bundles["B"])
    (tmp_path / "bundles/C/interest.safetensors").unlink()
    with pytest.raises(BundleCorrupt, match="is missing"):
        registry.publish(bundles["C"])
    (tmp_path / "bundles/D/manifest.json").write_text('{"format": "raysys-bundle/0"}')
    with pytest.raises(BundleIncompatible):
        registry.publish(bundles["D"])
    with pytest.raises(BundleNotFound):
        registry.publish(str(tmp_path / "nothing"))
    assert registry.current().version == "A"
    assert [row["version"] for row in registry.versions()] == ["A"]


def test_rollback_to_a_damaged_version_is_refused(registry, bundles):
    registry.publish(bundles["A"])
    registry.publish(bundles["B"])
    storage.write_bytes(storage.join(registry.bundle_uri("A"), "interest.safetensors"), b"rot")
    with pytest.raises(BundleCorrupt):
        registry.rollback()
    assert registry.current().version == "B" and not registry.current().pinned


def test_publishing_repairs_a_damaged_copy(registry, bundles):
    registry.publish(bundles["A"])
    storage.write_bytes(storage.join(registry.bundle_uri("A"), "interest.safetensors"), b"rot")
    registry.publish(bundles["A"])
    assert storage.read_bytes(storage.join(registry.bundle_uri("A"), "interest.safetensors")) == b"weights"


def test_keep_removes_the_oldest_but_never_the_current(tmp_path, bundles):
    registry = Registry(tmp_path / "registry", keep=2)
    for version in "ABCD":
        registry.publish(bundles[version])
    assert [row["version"] for row in registry.versions()] == ["B", "C", "D"]
    registry.rollback("B")
    assert registry.publish(bundles["A"], unpin=True).version == "A"
    assert [row["version"] for row in registry.versions()] == ["C", "D", "A"]
    with pytest.raises(BundleNotFound, match="one of the kept versions"):
        registry.rollback()


def test_file_uri(tmp_path, bundles):
    registry = Registry(f"file://{tmp_path}/registry")
    registry.publish(f"file://{bundles['A']}")
    assert Registry(tmp_path / "registry").current().version == "A"


def test_without_renames_the_manifest_goes_last(registry, bundles, monkeypatch):
    monkeypatch.setattr(storage, "is_local", lambda uri: False)
    registry.publish(bundles["A"])
    assert registry.current().version == "A"
    written = []
    write_bytes = storage.write_bytes

    def failing(uri, content):
        if uri.endswith("manifest.json"):
            raise OSError("connection lost")
        written.append(uri)
        write_bytes(uri, content)

    monkeypatch.setattr(storage, "write_bytes", failing)
    with pytest.raises(OSError, match="connection lost"):
        registry.publish(bundles["B"])
    assert any("versions/B/" in uri for uri in written)
    assert registry.current().version == "A"
    assert [row["version"] for row in registry.versions()] == ["A"]


def test_a_pointer_that_moved_during_the_copy_is_not_overwritten(registry, bundles, monkeypatch):
    registry.publish(bundles["A"])
    monkeypatch.setattr(storage, "is_local", lambda uri: False)  # no lock
    copy_in = Registry._copy_in

    def overtaken(self, source, version):
        copy_in(self, source, version)
        if version == "B":
            Registry(self.uri).publish(bundles["C"])

    monkeypatch.setattr(Registry, "_copy_in", overtaken)
    with pytest.raises(BundleError, match="the pointer moved to C"):
        registry.publish(bundles["B"])
    assert registry.current().version == "C"


@pytest.mark.parametrize(
    "death",
    [
        "storage.copy_tree = lambda source, target: (storage.write_bytes(target + '/interest.safetensors', b'half'), die())",
        "os.rename = lambda *paths: die()",
        "Registry._move = lambda *a, **k: die()",
        "storage.write_json = lambda *a: die()",
    ],
    ids=["during the copy", "before the rename", "before the pointer", "while writing the pointer"],
)
def test_killed_writers_leave_the_old_version_and_nothing_in_the_way(registry, bundles, death):
    registry.publish(bundles["A"])
    code = f"""
        import os, signal, sys
        from raysys import storage
        from raysys.registry import Registry
        die = lambda: os.kill(os.getpid(), signal.SIGKILL)
        {death}
        Registry(sys.argv[1]).publish(sys.argv[2])
    """
    killed = run_python(code, registry.uri, bundles["B"])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert registry.current().version == "A"
    pointer = registry.publish(bundles["B"])
    assert (pointer.version, pointer.sequence, pointer.previous) == ("B", 2, "A")
    assert storage.list_dir(storage.join(registry.uri, "versions")) == ["A", "B"]


def test_concurrent_publishers_take_turns(tmp_path):
    code = """
        import sys
        from raysys.registry import Registry
        for bundle in sys.argv[2:]:
            Registry(sys.argv[1]).publish(bundle)
    """
    uri = str(tmp_path / "registry")
    groups = [[make_bundle(tmp_path / f"{writer}{i}", f"{writer}{i}", bytes(200_000)) for i in range(8)] for writer in "xy"]
    command = [sys.executable, "-c", textwrap.dedent(code), uri]
    writers = [subprocess.Popen([*command, *group], stderr=subprocess.PIPE, text=True) for group in groups]
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors
    history = Registry(uri).history()
    assert [move.sequence for move in history] == list(range(1, 17))
    assert [move.previous for move in history] == [None, *(move.version for move in history[:-1])]
    assert sorted(move.version for move in history) == sorted(f"{writer}{i}" for writer in "xy" for i in range(8))


def test_a_broken_pointer_file_is_named(registry, bundles):
    registry.publish(bundles["A"])
    storage.write_bytes(storage.join(registry.uri, "current.json"), b"{")
    with pytest.raises(BundleCorrupt, match="current.json: expected a pointer file"):
        registry.current()
