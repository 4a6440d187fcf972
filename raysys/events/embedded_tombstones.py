"""The tombstones of a log in files: one JSON line an erasure, `{"user_key", "at"}`, added by any process of the machine."""

import contextlib
import fcntl
import os
from collections.abc import Sequence

import orjson

from raysys import storage
from raysys.errors import StateError
from raysys.events.log import Record, Tombstones


class TombstoneFile:
    """See the module.

    Args:
        path: created with the first erasure.
    """

    def __init__(self, path: str):
        self.path = path
        self._read: tuple[int, dict[bytes, float]] = (-1, {})

    def read(self) -> Tombstones:
        """User key -> last erasure; the file is parsed again only when it has grown."""
        size = os.path.getsize(self.path) if os.path.exists(self.path) else 0
        if size != self._read[0]:
            found: dict[bytes, float] = {}
            content = storage.read_bytes(self.path) if size else b""
            for line in content[: content.rfind(b"\n") + 1].splitlines():  # a last line without its end was never answered
                with contextlib.suppress(orjson.JSONDecodeError):
                    entry = orjson.loads(line)
                    key = bytes.fromhex(entry["user_key"])
                    found[key] = max(entry["at"], found.get(key, entry["at"]))
            self._read = (size, found)
        return self._read[1]

    def add(self, erasures: Sequence[Record]) -> None:
        """Append the tombstones of some `erase` records; durable when this returns.

        Raises:
            StateError: they could not be written.
        """
        if not erasures:
            return
        lines = b"".join(orjson.dumps({"user_key": record["user_key"], "at": record["at"]}) + b"\n" for record in erasures)
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                size = os.fstat(descriptor).st_size
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    lines = b"\n" + lines  # a crash left half a line
                write_all(descriptor, lines)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            storage.sync_dir(os.path.dirname(self.path))
        except OSError as error:
            raise StateError(f"{self.path}: cannot write a tombstone, {error}; nothing was erased") from None


def write_all(descriptor: int, content: bytes) -> None:
    """`os.write` until everything is written."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
