"""The event log in Redis Streams, for services on several nodes.

    P:segments               set of segment names
    P:segment:NAME           stream; entry `<position>-0` with one field, the record
    P:about:NAME             hash: stop, bytes, written
    P:tombstones             hash: user key (hex) -> when erased; P:tombstones:version counts changes
    P:consumers              hash: name -> offset
    P:lock:TASK              who is at it

A stream has one writer, which numbers its entries itself. So an append that was
cut off can be repeated: entries that are there already are left as they are.
The server flushes its append-only file before it answers (redis_server.py).
"""

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from typing import cast

import orjson

from raysys.errors import StateError
from raysys.events.log import EventLog, Record, SegmentInfo, Span, Tombstones, checked_consumer, is_erased
from raysys.events.redis_server import RedisServer

Entries = list[tuple[bytes, dict[bytes, bytes]]]
CHUNK = 10_000
"""Entries of one call."""
SEGMENT_RECORDS = 500_000
"""A writer starts a new segment beyond so many records,"""
SEGMENT_AGE_S = 3600.0
"""or beyond this age, so that retention finds something to drop."""
ENTRY_BYTES = 40
"""What a stream entry costs beside its record, about."""
LOCK_S = 30.0
"""A lock whose holder died is free after so long."""
APPEND = """
local stream, about, segments, tombstones, version = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local name, first, bytes, now, erasures = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], tonumber(ARGV[5])
local at = 6
local stop = first + (#ARGV - 5 - 2 * erasures)
if tonumber(redis.call('HGET', about, 'stop') or '0') >= stop then return 0 end
for _ = 1, erasures do
  local known = redis.call('HGET', tombstones, ARGV[at])
  if not known or tonumber(known) < tonumber(ARGV[at + 1]) then redis.call('HSET', tombstones, ARGV[at], ARGV[at + 1]) end
  redis.call('INCR', version)
  at = at + 2
end
for position = first, stop - 1 do
  redis.call('XADD', stream, string.format('%.0f-0', position + 1), 'r', ARGV[at])
  at = at + 1
end
redis.call('SADD', segments, name)
redis.call('HSET', about, 'stop', string.format('%.0f', stop), 'written', now)
redis.call('HINCRBY', about, 'bytes', bytes)
return 1
"""
SHARED = ("segments", "tombstones", "tombstones:version")
COPY = """
local gone = {}
for i = 4, #ARGV do gone[ARGV[i]] = true end
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[2])) do
  if not gone[entry[1]] then redis.call('XADD', KEYS[2], entry[1], unpack(entry[2])) end
end
if ARGV[3] == '1' then
  if redis.call('EXISTS', KEYS[2]) == 1 then redis.call('RENAME', KEYS[2], KEYS[1]) else redis.call('DEL', KEYS[1]) end
end
"""
RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
PROLONG = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end return 0"


class RedisLog(EventLog):
    """See the module. Thread-safe; appends of one process are serialised.

    Args:
        uri: of the server; see redis_server.py.
        writable: allow `append`; the server must then keep what it acknowledges.

    Raises:
        StateError: nobody answers, or the server would lose acknowledged events.
    """

    def __init__(self, uri: str, *, writable: bool = False, segment_records: int = SEGMENT_RECORDS, segment_age_s: float = SEGMENT_AGE_S):
        self.writable, self.segment_records, self.segment_age_s = writable, segment_records, segment_age_s
        self._server = RedisServer(uri, "events", must_keep=writable)
        self._redis, self._key = self._server.client, self._server.key
        self._append = self._redis.register_script(APPEND)
        self._lock = threading.Lock()
        self._segment, self._position, self._started_ms = "", 0, 0
        self._erased: tuple[int, dict[bytes, float]] = (-1, {})

    def append(self, records: Sequence[Record]) -> Span:
        """See `EventLog.append`."""
        if not self.writable:
            raise StateError(f"event log {self._server.name} was opened for reading")
        payloads = [orjson.dumps(record) for record in records]
        erasures = [part for record in records if record.get("kind") == "erase" for part in (record["user_key"], repr(record["at"]))]
        num_bytes = sum(map(len, payloads)) + ENTRY_BYTES * len(payloads)
        with self._lock:
            if (
                not self._segment
                or self._position >= self.segment_records
                or time.time() * 1000 - self._started_ms > self.segment_age_s * 1000
            ):
                self._start_segment()
            start = self._position
            keys = [self._key(name) for name in (f"segment:{self._segment}", f"about:{self._segment}", *SHARED)]
            values = [self._segment, start, num_bytes, repr(time.time()), len(erasures) // 2, *erasures, *payloads]
            try:
                with self._server.translated():
                    self._append(keys=keys, args=values)
            except StateError:
                self._segment = ""  # it may have arrived all the same; what follows goes to another segment
                raise
            self._position = start + len(payloads)
            return Span(self._segment, start, self._position)

    def segments(self) -> list[str]:
        """See `EventLog.segments`."""
        with self._server.translated():
            names = cast(set[bytes], self._redis.smembers(self._key("segments")))
        return sorted(name.decode() for name in names)

    def read_raw(self, segment: str, start: int, limit: int | None = None) -> tuple[list[Record], int]:
        """See `EventLog.read_raw`."""
        key = self._key(f"segment:{segment}")
        records: list[Record] = []
        while limit is None or len(records) < limit:
            count = CHUNK if limit is None else min(CHUNK, limit - len(records))
            with self._server.translated(), self._redis.pipeline() as pipe:
                pipe.hget(self._key(f"about:{segment}"), "stop")
                pipe.xrange(key, min=f"{start + 1}-0", count=count)
                stop, entries = cast(tuple[bytes | None, Entries], pipe.execute())
            if not entries:
                start = max(start, int(stop or 0))  # what was overwritten at the end is read too
                break
            records += [orjson.loads(fields[b"r"]) for _, fields in entries]
            start = int(entries[-1][0].partition(b"-")[0])
        return records, start

    def describe(self) -> list[SegmentInfo]:
        """See `EventLog.describe`. No segment counts as living: a writer whose stream was dropped goes on in a new one of that name."""
        found = []
        for segment in self.segments():
            with self._server.translated():
                found_about = cast(dict[bytes, bytes], self._redis.hgetall(self._key(f"about:{segment}")))
            about = {name.decode(): float(value) for name, value in found_about.items()}
            if about:
                found.append(SegmentInfo(segment, int(about["stop"]), int(about["bytes"]), about["written"], False))
        return found

    def drop(self, segment: str) -> None:
        """See `EventLog.drop`."""
        with self._server.translated(), self._redis.pipeline() as pipe:
            pipe.delete(self._key(f"segment:{segment}"), self._key(f"about:{segment}"))
            pipe.srem(self._key("segments"), segment)
            pipe.execute()

    def tombstones(self) -> Tombstones:
        """See `EventLog.tombstones`."""
        with self._server.translated():
            version = int(cast(bytes | None, self._redis.get(self._key("tombstones:version"))) or 0)
            if version != self._erased[0]:
                found = cast(dict[bytes, bytes], self._redis.hgetall(self._key("tombstones")))
                self._erased = (version, {bytes.fromhex(key.decode()): float(at) for key, at in found.items()})
        return self._erased[1]

    def overwrite_erased(self) -> int:
        """See `EventLog.overwrite_erased`; the append-only file is written anew too, in the background."""
        tombstones = self.tombstones()
        count = 0
        for segment in self.segments() if tombstones else ():
            found = sum(len(_erased_in(entries, tombstones)) for entries in self._chunks(segment))
            if found:
                self._copy_without_erased(segment, tombstones)
            count += found
        if count:
            with contextlib.suppress(StateError), self._server.translated():  # one may be under way already
                self._redis.bgrewriteaof()
        return count

    def _chunks(self, segment: str) -> Iterator[Entries]:
        start = b"-"
        while True:
            with self._server.translated():
                entries = cast(Entries, self._redis.xrange(self._key(f"segment:{segment}"), min=start, count=CHUNK))
            if not entries:
                return
            yield entries
            start = b"(" + entries[-1][0]

    def _copy_without_erased(self, segment: str, tombstones: Tombstones) -> None:
        """Put a copy of a stream in its place. XDEL only marks entries: they would stay in memory and in the file.

        Copied in chunks, so that the server answers others meanwhile; the last step takes what was appended since and renames.
        """
        keys = [self._key(f"segment:{segment}"), self._key(f"copy:{segment}")]
        copy, last = self._redis.register_script(COPY), b"0"
        with self._server.translated():
            self._redis.delete(keys[1])
        for entries in self._chunks(segment):
            last = entries[-1][0]
            with self._server.translated():
                copy(keys=keys, args=[entries[0][0], last, 0, *_erased_in(entries, tombstones)])
        with self._server.translated():
            copy(keys=keys, args=[b"(" + last, b"+", 1])

    def commit(self, consumer: str, offset: str) -> None:
        """See `EventLog.commit`."""
        with self._server.translated():
            self._redis.hset(self._key("consumers"), checked_consumer(consumer), offset)

    def consumers(self) -> dict[str, str]:
        """See `EventLog.consumers`."""
        with self._server.translated():
            found = cast(dict[bytes, bytes], self._redis.hgetall(self._key("consumers")))
        return {name.decode(): offset.decode() for name, offset in sorted(found.items())}

    def remove_consumer(self, consumer: str) -> None:
        """See `EventLog.remove_consumer`."""
        with self._server.translated():
            self._redis.hdel(self._key("consumers"), checked_consumer(consumer))

    @contextlib.contextmanager
    def exclusive(self, task: str) -> Iterator[None]:
        """See `EventLog.exclusive`; free again LOCK_S after its holder died."""
        key, token, ended = self._key(f"lock:{checked_consumer(task)}"), secrets.token_hex(8), threading.Event()
        milliseconds = int(LOCK_S * 1000)
        with self._server.translated():
            taken = self._redis.set(key, token, nx=True, px=milliseconds)
        if not taken:
            raise StateError(f"event log {self._server.name}: expected to be alone at {task}, but another process is at it; wait for it")
        prolong, release = self._redis.register_script(PROLONG), self._redis.register_script(RELEASE)

        def keep() -> None:
            while not ended.wait(LOCK_S / 3):
                with contextlib.suppress(StateError), self._server.translated():
                    prolong(keys=[key], args=[token, milliseconds])

        keeper = threading.Thread(target=keep, name=f"lock-{task}", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            ended.set()
            keeper.join()
            with contextlib.suppress(StateError), self._server.translated():
                release(keys=[key], args=[token])

    def close(self) -> None:
        """Close the connections."""
        self._server.close()

    def _start_segment(self) -> None:
        self._started_ms = max(int(time.time() * 1000), self._started_ms + 1)
        self._segment, self._position = f"seg-{self._started_ms:013d}-{secrets.token_hex(6)}", 0


def _erased_in(entries: Entries, tombstones: Tombstones) -> list[bytes]:
    """Names of the entries of erased users."""
    return [name for name, fields in entries if is_erased(orjson.loads(fields[b"r"]), tombstones)]
