"""Refused records with their reason, one JSON line each, so that they can be mended and sent again.

    {"index", "field", "reason", "received", "record"}

Several processes write beside each other, each to a file of its own; a file may
be rewritten (records sent again, users erased) while its process adds to it.
"""

import contextlib
import fcntl
import os
import secrets
import threading
from collections.abc import Callable, Iterator

import orjson

from raysys import storage
from raysys.events.identity import user_key
from raysys.events.log import Tombstones, moment

MAX_BYTES = 64 << 20
"""Size of one process's file; whoever sends more rubbish than that does not fill the disk with it."""
PATTERN = "dead-letter-"


class DeadLetters:
    """The file of this process.

    Args:
        folder: created when the first record is refused.
        max_bytes: what is refused beyond this size is counted in `dropped` and not kept.
    """

    def __init__(self, folder: str, max_bytes: int = MAX_BYTES):
        self._path = os.path.join(folder, f"{PATTERN}{os.getpid()}-{secrets.token_hex(3)}.jsonl")
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self.dropped = 0

    def write(self, entries: list[dict]) -> None:
        """Append entries; on disk when this returns."""
        if not entries:
            return
        os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
        with self._lock, _locked(self._path) as descriptor:
            if os.fstat(descriptor).st_size >= self._max_bytes:
                self.dropped += len(entries)
                return
            os.write(descriptor, b"".join(orjson.dumps(entry) + b"\n" for entry in entries))
            os.fsync(descriptor)


def dead_letter_files(folder: str) -> list[str]:
    """Paths of all dead-letter files, sorted."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in sorted(names) if name.startswith(PATTERN) and name.endswith(".jsonl")]


def read_letters(path: str) -> list[dict | None]:
    """Every line of a file; None for one that is not JSON."""
    letters: list[dict | None] = []
    for line in storage.read_bytes(path).splitlines():
        try:
            letter = orjson.loads(line)
        except orjson.JSONDecodeError:
            letter = None
        letters.append(letter if isinstance(letter, dict) else None)
    return letters


def rewrite(path: str, kept: Callable[[int, bytes], bytes | None]) -> int:
    """Replace a file by what is left of it; it is removed when nothing is. Nobody's entry is lost meanwhile.

    Args:
        path: of the file.
        kept: (line number from 0, line) -> the line to keep, or None.

    Returns:
        Lines that are gone.
    """
    with _locked(path):
        lines = storage.read_bytes(path).splitlines()
        left = [line for at, old in enumerate(lines) if (line := kept(at, old)) is not None]
        if left == lines:
            return 0
        if left:
            storage.write_bytes(path, b"".join(line + b"\n" for line in left))
        else:
            os.unlink(path)
        return len(lines) - len(left)


def erase_letters(folder: str, tombstones: Tombstones) -> int:
    """Remove the refused records of erased users; how many."""

    def kept(at: int, line: bytes) -> bytes | None:
        with contextlib.suppress(orjson.JSONDecodeError, AttributeError, TypeError):
            letter = orjson.loads(line)
            user_id = letter["record"].get("user_id") if isinstance(letter.get("record"), dict) else None
            if user_id is not None and moment(letter) <= tombstones.get(user_key(str(user_id)), float("-inf")):
                return None
        return line

    return sum(rewrite(path, kept) for path in dead_letter_files(folder)) if tombstones else 0


def dead_letter_folder(events: str, given: str | None = None) -> str:
    """Where the refused records of a service lie: the folder given, else beside a local log, else under the home of raysys."""
    if given is None and not storage.is_local(events):
        return str(storage.home() / "dead-letters")
    return storage.resolve(given or events)[1]


def _stands_there(path: str, descriptor: int) -> bool:
    try:
        return os.stat(path).st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _locked(path: str) -> Iterator[int]:
    """The file under its lock, open for appending; the one that stands under that name, not one that was replaced while we waited."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _stands_there(path, descriptor):
                yield descriptor
                return
        finally:
            os.close(descriptor)
