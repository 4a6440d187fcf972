"""Log and state together: log fsync, then state commit, then the answer.

Writes of concurrent requests are gathered into one fsync and one transaction
(group commit): a disk flush costs the same for one record as for a thousand.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

from raysys.errors import ServeOverloaded, StateBehind, StateError
from raysys.events.identity import pseudonym, user_key
from raysys.events.log import READ_AT_ONCE, EventLog, Record, Span, encode_offset
from raysys.events.state import UserState

MAX_WAITING = 100_000
"""Records waiting for the disk at most; more are refused rather than piled up."""
MAX_GROUP = 5_000
"""Records of one group commit at most."""
CONSUMER = "state"
"""Name under which the state's place in the log is committed, so that retention drops nothing that it lacks,"""
COMMIT_EVERY_S = 30.0
"""so often at most."""


class EventStore:
    """The one door for writes of this process.

    At opening, everything the log holds and the state does not is folded in.

    Args:
        log: writable.
        state: writable.
        pseudonyms: write keyed hashes instead of user and session ids to the log.
    """

    def __init__(self, log: EventLog, state: UserState, *, pseudonyms: bool = False):
        self.log, self.state, self.pseudonyms = log, state, pseudonyms
        self.replayed = self._replay()
        self._noted, self._unnoted = time.monotonic(), False
        self._queue: queue.SimpleQueue[tuple[Sequence[Record], Future] | None] = queue.SimpleQueue()
        self._waiting, self._lock = 0, threading.Lock()
        self._thread = threading.Thread(target=self._run, name="group-commit", daemon=True)
        self._thread.start()

    def submit(self, records: Sequence[Record]) -> "Future[list[bool]]":
        """Queue records; the future ends once they are durable and visible, with `UserState.apply`'s answer.

        Raises:
            ServeOverloaded: the disk is that far behind.
        """
        with self._lock:
            if self._waiting and self._waiting + len(records) > MAX_WAITING:
                raise ServeOverloaded("the event log is behind; retry in a second")
            self._waiting += len(records)
        future: Future[list[bool]] = Future()
        self._queue.put(([_hidden(record) for record in records] if self.pseudonyms else records, future))
        return future

    def records_of(self, user_id: str) -> list[Record]:
        """Everything the log holds about a user; reads all of it."""
        key, found = user_key(user_id), []
        for segment in self.log.segments():
            start, stop = -1, 0
            while stop != start:
                start = stop
                records, stop = self.log.read_segment(segment, start, READ_AT_ONCE)
                found += [record for record in records if record.get("user_id") is not None and user_key(record["user_id"]) == key]
        return found

    def close(self) -> None:
        """Finish what is queued, then release log and state."""
        self._queue.put(None)
        self._thread.join()
        self._note_place()
        self.log.close()
        self.state.close()

    def _replay(self) -> int:
        self.state.bury(self.log.tombstones())
        count = 0
        for segment in self.log.segments():
            start, stop = -1, self.state.applied(segment)
            while stop != start:
                start = stop
                records, stop = self.log.read_segment(segment, start, READ_AT_ONCE)
                if stop != start:
                    self.state.apply(records, Span(segment, start, stop))
                    count += len(records)
        self._note_place()
        return count

    def _note_place(self) -> None:
        self.log.commit(CONSUMER, encode_offset({segment: self.state.applied(segment) for segment in self.log.segments()}))

    def _next(self) -> tuple[Sequence[Record], Future] | None:
        """What is queued next, None at the end; between, and while nothing comes, the state's place in the log is noted."""
        while True:
            if self._unnoted and time.monotonic() - self._noted > COMMIT_EVERY_S:
                self._noted, self._unnoted = time.monotonic(), False
                with contextlib.suppress(StateError):  # retention waits a little longer
                    self._note_place()
            try:
                return self._queue.get(timeout=COMMIT_EVERY_S)
            except queue.Empty:
                continue

    def _run(self) -> None:
        while (first := self._next()) is not None:
            group, count = [first], len(first[0])
            while count < MAX_GROUP:
                try:
                    following = self._queue.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    self._queue.put(None)
                    break
                group.append(following)
                count += len(following[0])
            with self._lock:
                self._waiting -= count
            self._commit(group)

    def _commit(self, group: list[tuple[Sequence[Record], Future]]) -> None:
        group = [(batch, future) for batch, future in group if future.set_running_or_notify_cancel()]  # without clients that went away
        records = [record for batch, _ in group for record in batch]
        try:
            span = self.log.append(records)
            try:
                fresh = self.state.apply(records, span)
            except StateBehind:  # the state was lost or restored under our feet
                self._replay()
                fresh = [True] * len(records)
        except Exception as error:  # this thread must live, and every client must hear
            told = error if isinstance(error, StateError) else StateError(f"events: cannot write, {type(error).__name__}: {error}")
            for _, future in group:
                future.set_exception(told)
            return
        self._unnoted = True
        at = 0
        for batch, future in group:
            future.set_result(fresh[at : at + len(batch)])
            at += len(batch)


def _hidden(record: Record) -> Record:
    names = {name: pseudonym(record[name]) for name in ("user_id", "session_id") if record.get(name)}
    return {**record, **names}
