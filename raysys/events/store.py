"""Log and state together: log fsync, then state commit, then the answer.

Writes of concurrent requests are gathered into one fsync and one transaction
(group commit): a disk flush costs the same for one record as for a thousand.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from raysys.errors import ServeOverloaded, StateError
from raysys.events.identity import sign, user_key
from raysys.events.log import EventLog, Record, Span
from raysys.events.state import UserState

MAX_WAITING = 10_000
"""Record batches waiting for the disk at most; more are refused rather than piled up."""
MAX_GROUP = 5_000
"""Records of one group commit at most."""


class EventStore:
    """The one door for writes of this process.

    At opening, everything the log holds and the state does not is folded in.

    Args:
        log: writable.
        state: writable.
        clock: seconds now.
    """

    def __init__(self, log: EventLog, state: UserState, *, clock: Callable[[], float] = time.time):
        self.log, self.state, self.clock = log, state, clock
        self.replayed = self._replay()
        self._queue: queue.Queue[tuple[Sequence[Record], Future] | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="group-commit", daemon=True)
        self._thread.start()

    def submit(self, records: Sequence[Record]) -> "Future[list[bool]]":
        """Queue records; the future ends once they are durable and visible, with `UserState.apply`'s answer.

        Raises:
            ServeOverloaded: the disk is that far behind.
        """
        future: Future[list[bool]] = Future()
        try:
            self._queue.put_nowait((records, future))
        except queue.Full:
            raise ServeOverloaded("the event log is behind; retry in a second") from None
        return future

    def erase_record(self, user_id: str) -> Record:
        """The record that makes state and later readers forget a user."""
        return {"kind": "erase", "user_key": user_key(user_id).hex(), "at": self.clock()}

    def receipt(self, record: Record) -> dict:
        """A signed statement that an erasure is durable."""
        body = {"erased": True, "user_key": record["user_key"], "at": record["at"], "places": ["state", "histories of published bundles"]}
        return {**body, "signature": sign(repr(sorted(body.items())).encode())}

    def close(self) -> None:
        """Finish what is queued, then release log and state."""
        self._queue.put(None)
        self._thread.join()
        self.log.close()
        self.state.close()

    def _replay(self) -> int:
        count = 0
        for segment in self.log.segments():
            start = self.state.applied(segment)
            records, stop = self.log.read_segment(segment, start)
            if records:
                self.state.apply(records, Span(segment, start, stop))
                count += len(records)
        return count

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
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
            self._commit(group)

    def _commit(self, group: list[tuple[Sequence[Record], Future]]) -> None:
        records = [record for batch, _ in group for record in batch]
        try:
            fresh = self.state.apply(records, self.log.append(records))
        except StateError as error:
            for _, future in group:
                future.set_exception(error)
            return
        at = 0
        for batch, future in group:
            future.set_result(fresh[at : at + len(batch)])
            at += len(batch)
