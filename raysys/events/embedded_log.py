"""The event log in a folder of one machine: checksummed records in segment files, fsync before the answer.

    EVENTS/seg-<created ms>-<pid>-<random>.log     frames: length u32, crc32 u32, payload (JSON)

Every writer appends to a segment of its own, so processes never wait for each
other and a torn tail (a crash in the middle of a write) is always the last
thing in a file nobody writes to again. A reader stops before it; the next
writer that opens the folder cuts it off.
"""

import base64
import fcntl
import os
import secrets
import struct
import threading
import time
import zlib
from collections.abc import Sequence

import orjson

from raysys import storage
from raysys.errors import StateError
from raysys.events.log import Record, Span

FRAME = struct.Struct("<II")
SEGMENT_BYTES = 64 << 20
"""A writer starts a new segment beyond this size."""


class EmbeddedLog:
    """See the module. Thread-safe; appends of one process are serialised.

    Args:
        folder: created when missing.
        writable: repair torn tails and allow `append`.

    Raises:
        StateError: the folder cannot be used.
    """

    def __init__(self, folder: str, *, writable: bool = False, segment_bytes: int = SEGMENT_BYTES):
        self.folder, self.writable, self.segment_bytes = folder, writable, segment_bytes
        self._lock = threading.Lock()
        self._file: int | None = None
        self._segment, self._position = "", 0
        self._started_ms = 0
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise StateError(f"event log {folder}: expected a writable folder, {error}") from None
        if writable:
            self._repair()

    def append(self, records: Sequence[Record]) -> Span:
        """Write and fsync; see `EventLog.append`.

        Raises:
            StateError: the disk refuses (full, read-only); nothing was accepted.
        """
        if not self.writable:
            raise StateError(f"event log {self.folder} was opened for reading")
        payload = b"".join(_frame(record) for record in records)
        with self._lock:
            if self._file is None or self._position >= self.segment_bytes:
                self._start_segment()
            assert self._file is not None
            start = self._position
            try:
                view = memoryview(payload)
                while view:
                    view = view[os.write(self._file, view) :]
                os.fsync(self._file)
            except OSError as error:
                # Half a batch may be on disk. It was not acknowledged, so it must not come back after a restart.
                self._abandon(start)
                raise StateError(f"event log {self.folder}: cannot write, {error}; nothing of this batch was accepted") from None
            self._position = start + len(payload)
            return Span(self._segment, start, self._position)

    def read(self, after: str | None = None, limit: int = 10_000) -> tuple[list[Record], str]:
        """See `EventLog.read`; records of one writer come in order, writers one after the other."""
        positions = _decode(after)
        records: list[Record] = []
        for segment in self.segments():
            if len(records) >= limit:
                break
            found, stop = self.read_segment(segment, positions.get(segment, 0), limit - len(records))
            records += found
            positions[segment] = stop
        return records, _encode(positions)

    def segments(self) -> list[str]:
        """Segment names, oldest first."""
        return sorted(name for name in os.listdir(self.folder) if name.startswith("seg-") and name.endswith(".log"))

    def read_segment(self, segment: str, start: int, limit: int | None = None) -> tuple[list[Record], int]:
        """Whole, intact records from a byte position, and the position after the last one."""
        with open(os.path.join(self.folder, segment), "rb") as file:
            file.seek(start)
            content = file.read()
        records: list[Record] = []
        at = 0
        while limit is None or len(records) < limit:
            record, size = _parse(content, at)
            if size == 0:
                break
            records.append(record)
            at += size
        return records, start + at

    def close(self) -> None:
        """Close the segment; the next append starts another."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _start_segment(self) -> None:
        if self._file is not None:
            os.close(self._file)
        # Readers go by name: a writer's next segment must come after its last one, also within a millisecond or a clock set back.
        self._started_ms = max(int(time.time() * 1000), self._started_ms + 1)
        self._segment = f"seg-{self._started_ms:013d}-{os.getpid()}-{secrets.token_hex(4)}.log"
        self._file = os.open(os.path.join(self.folder, self._segment), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX)  # held until the writer dies: tells others that this segment is alive
        storage.sync_dir(self.folder)
        self._position = 0

    def _abandon(self, start: int) -> None:
        assert self._file is not None
        try:
            os.ftruncate(self._file, start)
        finally:
            os.close(self._file)
            self._file = None

    def _repair(self) -> None:
        for segment in self.segments():
            descriptor = os.open(os.path.join(self.folder, segment), os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _, intact = self.read_segment(segment, 0)
                if intact < os.fstat(descriptor).st_size:
                    os.ftruncate(descriptor, intact)
                    os.fsync(descriptor)
            except BlockingIOError:
                pass  # its writer lives
            finally:
                os.close(descriptor)


def _frame(record: Record) -> bytes:
    payload = orjson.dumps(record)
    return FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def _parse(content: bytes, at: int) -> tuple[Record, int]:
    """The record at a position and its size in bytes; size 0 where there is no intact one."""
    if at + FRAME.size > len(content):
        return {}, 0
    length, checksum = FRAME.unpack_from(content, at)
    payload = content[at + FRAME.size : at + FRAME.size + length]
    if length == 0 or len(payload) < length or zlib.crc32(payload) != checksum:
        return {}, 0
    return orjson.loads(payload), FRAME.size + length


def _encode(positions: dict[str, int]) -> str:
    return base64.urlsafe_b64encode(zlib.compress(orjson.dumps(positions))).decode()


def _decode(offset: str | None) -> dict[str, int]:
    if offset is None:
        return {}
    try:
        return orjson.loads(zlib.decompress(base64.urlsafe_b64decode(offset)))
    except (ValueError, zlib.error):
        raise StateError(f"event log offset {offset[:40]!r} is not one that this log gave out") from None
