"""Which bundle is in use: versions side by side, and one pointer that moves atomically.

    REGISTRY/
      current.json           the pointer (below), and the last moves of it
      versions/VERSION/      bundles, immutable once there
      .lock                  held by local writers

A crash at any moment leaves the old pointer or the new one, never a pointer to
half a bundle: a bundle is copied under a temporary name, checked, flushed and
renamed before the pointer moves. Leftovers of a killed writer are swept by the
next one. Local writers exclude each other with a file lock. Object stores have
none: there, let one process publish, and give it `expected_sequence`.
"""

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from raysys import storage
from raysys.bundle import MANIFEST, read_manifest, verify
from raysys.errors import BundleCorrupt, BundleError, BundleNotFound, SchemaError

POINTER, VERSIONS, LOCK = "current.json", "versions", ".lock"
TEMPORARY = ".tmp-"
KEEP = 20
"""Versions kept by default, besides the current one."""
HISTORY_LIMIT = 100
"""Pointer moves kept in the pointer file, about 150 bytes each."""

VERSION_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Pointer:
    """Which version answers now, and how it came to be.

    Attributes:
        version: the bundle's version id.
        sequence: number of moves of this pointer; grows by one with each.
        pinned: True after a rollback; publishing is then refused without `unpin`.
        published: time of the move, ISO 8601, UTC.
        action: "publish" or "rollback".
        previous: the version to return to on rollback; None for the first.
    """

    version: str
    sequence: int
    pinned: bool
    published: str
    action: str
    previous: str | None


class Registry:
    """Publishes bundles, rolls back, and says which version is current.

    Args:
        uri: folder or `pyarrow.fs` URI; created at the first publish.
        keep: versions kept besides the current one; older ones are removed after a publish.
    """

    def __init__(self, uri: str | os.PathLike, *, keep: int = KEEP):
        self.uri = os.fspath(uri).rstrip("/")
        self.keep = keep

    def current(self) -> Pointer | None:
        """The pointer, by reading one small file; None before the first publish.

        Raises:
            BundleCorrupt: the pointer file cannot be parsed.
        """
        moves = self.history()
        return moves[-1] if moves else None

    def history(self) -> list[Pointer]:
        """The last moves of the pointer, oldest first; the last one is current.

        Raises:
            BundleCorrupt: the pointer file cannot be parsed.
        """
        path = storage.join(self.uri, POINTER)
        try:
            return [Pointer(**move) for move in storage.read_json(path)["history"]]
        except FileNotFoundError:
            return []
        except (SchemaError, KeyError, TypeError) as error:
            raise BundleCorrupt(f"{path}: expected a pointer file ({error}); restore it, or remove it and publish again") from None

    def bundle_uri(self, version: str) -> str:
        """Where a version's bundle lies (whether it is there or not).

        Raises:
            BundleNotFound: the text cannot be a version id.
        """
        if not VERSION_PATTERN.fullmatch(version):
            raise BundleNotFound(f"{self.uri}: expected a version id such as 20260901T120000000Z-1a2b3c4d, got {version!r}")
        return storage.join(self.uri, VERSIONS, version)

    def versions(self) -> list[dict]:
        """Every version that is kept, oldest publication first.

        Returns:
            One dict a version: version, created, published (None when its writer died before moving the pointer),
            metrics, current, pinned.
        """
        history = self.history()
        published = {move.version: move.published for move in history if move.action == "publish"}
        rows = []
        for version in self._kept(history):
            manifest = read_manifest(self.bundle_uri(version))
            is_current = bool(history) and version == history[-1].version
            rows.append(
                {
                    "version": version,
                    "created": manifest.get("created"),
                    "published": published.get(version),
                    "metrics": manifest.get("metrics"),
                    "current": is_current,
                    "pinned": is_current and history[-1].pinned,
                }
            )
        return rows

    def publish(self, bundle_uri: str, *, unpin: bool = False, expected_sequence: int | None = None) -> Pointer:
        """Copy a bundle in, check it, and make it the current version.

        Publishing the version that is already current changes nothing, so a retry after a crash is safe.

        Args:
            bundle_uri: a folder or URI with a bundle.
            unpin: end the pin that a rollback left.
            expected_sequence: refuse unless the pointer still has this number (0 = nothing published yet).

        Returns:
            The pointer after the move.

        Raises:
            BundleNotFound, BundleIncompatible, BundleCorrupt: the bundle is unfit; the pointer has not moved.
            BundleError: the registry is pinned, or somebody else has published since `expected_sequence`.
        """
        version = verify(bundle_uri)["version"]
        self.bundle_uri(version)
        with self._locked():
            before = self.current()
            self._check_writer(before, unpin=unpin, expected_sequence=expected_sequence)
            self._copy_in(bundle_uri, version)
            if before is not None and before.version == version and not before.pinned:
                return before
            previous = None if before is None else before.previous if before.version == version else before.version
            pointer = self._move(before, version, pinned=False, action="publish", previous=previous)
            self._sweep()
        return pointer

    def rollback(self, to: str | None = None) -> Pointer:
        """Return to an earlier version and pin it.

        Args:
            to: version id; None for the one that was current before the current one was published.

        Returns:
            The pointer after the move.

        Raises:
            BundleNotFound: nothing to return to, or the version is not kept.
            BundleCorrupt: its files are damaged; the pointer has not moved.
        """
        with self._locked():
            before = self.current()
            if before is None:
                raise BundleNotFound(f"{self.uri}: nothing published yet, so nothing to roll back; run `raysys publish BUNDLE` first")
            version = to if to is not None else before.previous
            if version is None:
                raise BundleNotFound(f"{self.uri}: {before.version} is the first version, there is none before it to roll back to")
            kept = self._kept(self.history())
            self.bundle_uri(version)
            if version not in kept:
                raise BundleNotFound(f"{self.uri}: expected one of the kept versions ({', '.join(kept)}), got {version!r}")
            verify(self.bundle_uri(version))
            return self._move(before, version, pinned=True, action="rollback", previous=self._predecessor(version))

    def _check_writer(self, before: Pointer | None, *, unpin: bool, expected_sequence: int | None) -> None:
        sequence = 0 if before is None else before.sequence
        if expected_sequence is not None and expected_sequence != sequence:
            raise BundleError(
                f"{self.uri}: expected the pointer at sequence {expected_sequence}, found {sequence}: somebody else has published; "
                "start again from the current version"
            )
        if before is not None and before.pinned and not unpin:
            raise BundleError(
                f"{self.uri}: pinned to {before.version} by a rollback at {before.published}; "
                "end the pin with `raysys publish BUNDLE --unpin`"
            )

    def _copy_in(self, source: str, version: str) -> None:
        target = self.bundle_uri(version)
        if storage.exists(storage.join(target, MANIFEST)):
            try:
                verify(target)
                return
            except BundleError:
                storage.remove(target)  # damaged, and the source has just been verified
        if not storage.is_local(self.uri):
            # An object is complete or absent, and a bundle without a manifest is none: the manifest goes last.
            names = [name for name in storage.list_files(source) if name != MANIFEST]
            for name in [*names, MANIFEST]:
                storage.write_bytes(storage.join(target, name), storage.read_bytes(storage.join(source, name)))
            verify(target)
            return
        temporary = storage.join(self.uri, VERSIONS, f"{TEMPORARY}{version}-{secrets.token_hex(4)}")
        try:
            storage.copy_tree(source, temporary)
            verify(temporary)
            root = storage.resolve(temporary)[1]
            for name in storage.list_files(temporary):
                _flush(os.path.join(root, name))
            storage.sync_dir(root)
            os.rename(root, storage.resolve(target)[1])
            storage.sync_dir(os.path.dirname(root))
        finally:
            storage.remove(temporary)

    def _move(self, before: Pointer | None, version: str, *, pinned: bool, action: str, previous: str | None) -> Pointer:
        history = self.history()
        found = history[-1] if history else None
        if found != before:
            raise BundleError(f"{self.uri}: the pointer moved to {found and found.version} during this publish; start again from there")
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        pointer = Pointer(version, (before.sequence if before else 0) + 1, pinned, now, action, previous)
        moves = [asdict(move) for move in [*history, pointer][-HISTORY_LIMIT:]]
        storage.write_json(storage.join(self.uri, POINTER), {**asdict(pointer), "history": moves})
        return pointer

    def _predecessor(self, version: str) -> str | None:
        """What was current when `version` was last published: a second rollback goes further back, not forward again."""
        return next((move.previous for move in reversed(self.history()) if move.version == version), None)

    def _kept(self, history: list[Pointer]) -> list[str]:
        """Complete versions on disk, oldest publication first; those never pointed to come before all others."""
        sequence = {move.version: move.sequence for move in history if move.action == "publish"}
        folder = storage.join(self.uri, VERSIONS)
        names = [name for name in storage.list_dir(folder) if VERSION_PATTERN.fullmatch(name)]
        complete = [name for name in names if storage.exists(storage.join(folder, name, MANIFEST))]
        return sorted(complete, key=lambda name: (sequence.get(name, 0), name))

    def _sweep(self) -> None:
        """Remove versions beyond `keep`, and what killed local writers left; runs under the lock."""
        history = self.history()
        current = history[-1].version
        others = [version for version in self._kept(history) if version != current]
        for version in others[: max(0, len(others) - self.keep)]:
            storage.remove(self.bundle_uri(version))
        for name in storage.list_dir(storage.join(self.uri, VERSIONS)):
            if name.startswith(TEMPORARY):
                storage.remove(storage.join(self.uri, VERSIONS, name))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One local writer at a time, across processes; released by the kernel when its holder dies."""
        if not storage.is_local(self.uri):
            yield
            return
        root = storage.resolve(self.uri)[1]
        os.makedirs(root, exist_ok=True)
        with open(os.path.join(root, LOCK), "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _flush(path: str) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
