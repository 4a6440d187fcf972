"""The event log in a folder of one machine: checksummed records in segment files, fsync before the answer.

    EVENTS/seg-<created ms>-<pid>-<random>.log    frames (frames.py); a position is a byte
    EVENTS/tombstones.jsonl                       {"user_key", "at"} a line
    EVENTS/consumers/NAME.json                    offsets of named consumers
    EVENTS/checked.json                           sizes of dead segments that were found whole
    EVENTS/overwriting.json                       only while erased records are being overwritten: which

Every writer appends to a segment of its own, so processes never wait for each
other and a torn tail (a crash in the middle of a write) is always the last
thing in a file nobody writes to again. A reader stops before it; the next
writer that opens the folder cuts it off.
"""

import contextlib
import fcntl
import itertools
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence

import orjson

from raysys import storage
from raysys.errors import StateError
from raysys.events import frames
from raysys.events.embedded_tombstones import TombstoneFile, write_all
from raysys.events.log import EventLog, Record, SegmentInfo, Span, Tombstones, checked_consumer, is_erased

SEGMENT_BYTES = 64 << 20
"""A writer starts a new segment beyond this size,"""
SEGMENT_AGE_S = 3600.0
"""or beyond this age, so that retention finds something to drop."""
BLOCK_BYTES = 4 << 20
"""Read at once."""
TOMBSTONES, CONSUMERS, CHECKED, OVERWRITING = "tombstones.jsonl", "consumers", "checked.json", "overwriting.json"


class EmbeddedLog(EventLog):
    """See the module. Thread-safe; appends of one process are serialised.

    Args:
        folder: created when missing.
        writable: repair torn tails and allow `append`.

    Raises:
        StateError: the folder cannot be used.
    """

    def __init__(self, folder: str, *, writable: bool = False, segment_bytes: int = SEGMENT_BYTES, segment_age_s: float = SEGMENT_AGE_S):
        self.folder, self.writable, self.segment_bytes, self.segment_age_s = folder, writable, segment_bytes, segment_age_s
        self.damaged = 0
        self._lock = threading.Lock()
        self._file: int | None = None
        self._segment, self._position = "", 0
        self._started_ms = 0
        self._tombstones = TombstoneFile(self._path(TOMBSTONES))
        try:
            os.makedirs(os.path.join(folder, CONSUMERS), exist_ok=True)
        except OSError as error:
            raise StateError(f"event log {folder}: expected a writable folder, {error}") from None
        if writable:
            self._repair()

    def append(self, records: Sequence[Record]) -> Span:
        """Write and fsync; see `EventLog.append`. When the disk refuses (full, read-only), nothing of the batch was accepted."""
        if not self.writable:
            raise StateError(f"event log {self.folder} was opened for reading")
        # Tombstones come before the records that say the same: from here on no reader returns the users' past.
        self._tombstones.add([record for record in records if record.get("kind") == "erase"])
        payload = b"".join(frames.pack(record) for record in records)
        with self._lock:
            if (
                self._file is None
                or self._position >= self.segment_bytes
                or time.time() * 1000 - self._started_ms > self.segment_age_s * 1000
            ):
                self._start_segment()
            assert self._file is not None
            start = self._position
            try:
                write_all(self._file, payload)
                os.fsync(self._file)
            except OSError as error:
                # Half a batch may be on disk. It was not acknowledged, so it must not come back after a restart.
                self._abandon(start)
                raise StateError(f"event log {self.folder}: cannot write, {error}; nothing of this batch was accepted") from None
            self._position = start + len(payload)
            return Span(self._segment, start, self._position)

    def segments(self) -> list[str]:
        """See `EventLog.segments`."""
        return sorted(name for name in os.listdir(self.folder) if name.startswith("seg-") and name.endswith(".log"))

    def read_raw(self, segment: str, start: int, limit: int | None = None) -> tuple[list[Record], int]:
        """See `EventLog.read_raw`; damage in the middle is skipped and counted in `damaged`."""
        records: list[Record] = []
        try:
            file = open(self._path(segment), "rb", buffering=0)
        except FileNotFoundError:
            return records, start
        with file:
            if os.fstat(file.fileno()).st_size <= start:
                return records, start
            file.seek(start)
            content, at, position = b"", 0, start
            while limit is None or len(records) < limit:
                size = frames.frame_at(content, at)
                if size:
                    records.append(frames.payload(content, at, size))
                    at += size
                    continue
                if more := file.read(BLOCK_BYTES):
                    content, position, at = content[at:] + more, position + at, 0
                    continue
                behind = frames.next_frame(content, at)
                if behind is None:
                    break
                self.damaged += 1
                at = behind
            return records, position + at

    def describe(self) -> list[SegmentInfo]:
        """See `EventLog.describe`."""
        found = []
        for segment in self.segments():
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(self._path(segment))
                found.append(SegmentInfo(segment, status.st_size, status.st_size, status.st_mtime, self._is_living(segment)))
        return found

    def drop(self, segment: str) -> None:
        """See `EventLog.drop`."""
        with self._dead(segment) as descriptor:
            if descriptor is None:
                raise StateError(f"event log {self.folder}: expected a segment that nobody writes to, got {segment}")
            os.unlink(self._path(segment))
        storage.sync_dir(self.folder)

    def tombstones(self) -> Tombstones:
        """See `EventLog.tombstones`."""
        return self._tombstones.read()

    def overwrite_erased(self) -> int:
        """See `EventLog.overwrite_erased`.

        A crash in between would leave half-overwritten frames in the middle of a segment, so the places are noted first, and the next
        writer that opens the folder finishes them before it looks for torn tails.
        """
        tombstones = self.tombstones()
        places = [place for segment in self.segments() for place in self._places_of(segment, tombstones)] if tombstones else []
        if places:
            with self._locked():
                self._finish_overwriting()
                storage.write_json(self._path(OVERWRITING), places)
                self._finish_overwriting()
        return len(places)

    def commit(self, consumer: str, offset: str) -> None:
        """See `EventLog.commit`."""
        path = os.path.join(self.folder, CONSUMERS, f"{checked_consumer(consumer)}.json")
        storage.write_json(path, {"offset": offset, "committed": time.time()})

    def consumers(self) -> dict[str, str]:
        """See `EventLog.consumers`."""
        folder = os.path.join(self.folder, CONSUMERS)
        names = [name for name in sorted(os.listdir(folder)) if name.endswith(".json")]
        return {name.removesuffix(".json"): storage.read_json(os.path.join(folder, name))["offset"] for name in names}

    def remove_consumer(self, consumer: str) -> None:
        """See `EventLog.remove_consumer`."""
        storage.remove(os.path.join(self.folder, CONSUMERS, f"{checked_consumer(consumer)}.json"))

    @contextlib.contextmanager
    def exclusive(self, task: str) -> Iterator[None]:
        """See `EventLog.exclusive`."""
        with open(self._path(f"{checked_consumer(task)}.lock"), "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StateError(
                    f"event log {self.folder}: expected to be alone at {task}, but another process is at it; wait for it"
                ) from None
            yield

    def close(self) -> None:
        """Close the segment; the next append starts another."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _start_segment(self) -> None:
        if self._file is not None:
            os.close(self._file)
        # Readers go by name: a writer's next segment must come after its last one, also within a millisecond or a clock set back.
        self._started_ms = max(int(time.time() * 1000), self._started_ms + 1)
        self._segment = f"seg-{self._started_ms:013d}-{os.getpid()}-{secrets.token_hex(4)}.log"
        self._file = os.open(self._path(self._segment), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
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

    @contextlib.contextmanager
    def _dead(self, segment: str) -> Iterator[int | None]:
        """The open file of a segment without a writer, locked; None where its writer lives."""
        descriptor = os.open(self._path(segment), os.O_RDWR)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
            else:
                yield descriptor
        finally:
            os.close(descriptor)

    def _is_living(self, segment: str) -> bool:
        with self._dead(segment) as descriptor:
            return descriptor is None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Changes of segments in place, one process at a time."""
        with open(self._path("changing.lock"), "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _repair(self) -> None:
        with self._locked():
            self._finish_overwriting()
            checked = storage.read_json(self._path(CHECKED)) if os.path.exists(self._path(CHECKED)) else {}
            sizes: dict[str, int] = {}
            for segment in self.segments():
                with contextlib.suppress(FileNotFoundError), self._dead(segment) as descriptor:
                    if descriptor is None:
                        continue
                    size = os.fstat(descriptor).st_size
                    if checked.get(segment) != size:
                        whole = frames.intact_end(os.pread(descriptor, size, 0))
                        if whole < size:
                            os.ftruncate(descriptor, whole)
                            os.fsync(descriptor)
                        size = whole
                    sizes[segment] = size
            if sizes != checked:
                storage.write_json(self._path(CHECKED), sizes)

    def _places_of(self, segment: str, tombstones: Tombstones) -> list[list]:
        """[segment, position, size] of every record of an erased user."""
        try:
            content = storage.read_bytes(self._path(segment))
        except FileNotFoundError:
            return []  # dropped meanwhile
        records = ((at, size, frames.payload(content, at, size)) for at, size in frames.intact(content))
        return [[segment, at, size] for at, size, record in records if record.get("kind") != "erased" and is_erased(record, tombstones)]

    def _finish_overwriting(self) -> None:
        path = self._path(OVERWRITING)
        if not os.path.exists(path):
            return
        for segment, places in itertools.groupby(orjson.loads(storage.read_bytes(path)), key=lambda place: place[0]):
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(self._path(segment), os.O_WRONLY)
                try:
                    for _, at, size in places:
                        os.pwrite(descriptor, frames.filler(size), at)
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        storage.remove(path)
