"""Online state in LMDB: one memory-mapped file that all processes of a node read and write.

LMDB lets one process write at a time and never blocks readers, so what one
replica committed is what the next request on any other replica reads. The byte
position of the log is stored in the same transaction as its effect.
"""

import os
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import lmdb
import orjson

from raysys.errors import StateBehind, StateError
from raysys.events.embedded_commit import F64, NEWEST, TABLES, U64, Commit, event_key, in_order, item_key, last_sequence, starting_with
from raysys.events.identity import KEY_BYTES, user_key
from raysys.events.log import Record, Span, Tombstones
from raysys.events.state import ItemState, StateLimits
from raysys.schema import HistoryEvent

FORMAT_KEY, FORMAT = b"\0format", b"2"
"""Beside the offsets; no segment is called that."""


class EmbeddedState:
    """See `UserState`. Safe for many processes and threads of one machine.

    Args:
        folder: created when missing.
        limits: bounds.
        readonly: only read; the store must exist.
        clock: seconds now, for the window of event ids.

    Raises:
        StateError: the store cannot be opened.
    """

    def __init__(self, folder: str, limits: StateLimits, *, readonly: bool = False, clock: Callable[[], float] = time.time):
        self.limits, self.clock = limits, clock
        try:
            os.makedirs(folder, exist_ok=True)
            self._env = lmdb.open(
                folder,
                map_size=limits.max_bytes,
                max_dbs=len(TABLES),
                max_readers=512,
                readonly=readonly,
                metasync=False,  # the last commit may be lost with the machine; the log replays it
                lock=True,
            )
        except (OSError, lmdb.Error) as error:
            raise StateError(f"state {folder}: expected a local folder on one machine that can be memory-mapped, {error}") from None
        self._env.reader_check()  # slots of killed processes
        self._tables = {name: self._env.open_db(name.encode(), create=not readonly) for name in TABLES}
        self._check_format(folder, readonly)

    def apply(self, records: Sequence[Record], span: Span) -> list[bool]:
        """See `UserState.apply`.

        Raises:
            StateError: the store is full or the disk refuses; the records stay in the log and are folded in at the next open.
        """
        try:
            with self._env.begin(write=True) as txn:
                at = txn.get(span.segment.encode(), db=self._tables["offsets"])
                applied = U64.unpack(at)[0] if at is not None else 0
                if applied >= span.stop:
                    return [True] * len(records)  # another process replayed this span from the log
                if applied < span.start:
                    raise StateBehind(f"state has {span.segment} up to {applied}, the next records begin at {span.start}")
                commit = Commit(txn, self._tables, self.limits, self.clock())
                fresh = [commit.apply(record) for record in records]
                commit.finish()
                txn.put(span.segment.encode(), U64.pack(span.stop), db=self._tables["offsets"])
                return fresh
        except lmdb.Error as error:
            raise StateError(f"state: cannot commit, {error}") from None

    def bury(self, tombstones: Tombstones) -> None:
        """See `UserState.bury`."""
        if not tombstones:
            return
        with self._env.begin(write=True) as txn:
            commit = Commit(txn, self._tables, self.limits, self.clock())
            for key, at in tombstones.items():
                commit.erase(key, at)
            commit.finish()

    def applied(self, segment: str) -> int:
        """See `UserState.applied`."""
        value = self._get("offsets", segment.encode())
        return U64.unpack(value)[0] if value else 0

    def known_event(self, event_id: str) -> bool:
        """See `UserState.known_event`."""
        return self._get("event_ids", event_key(event_id)) is not None

    def history(self, user_id: str) -> list[HistoryEvent]:
        """See `UserState.history`."""
        return self._events("histories", user_key(user_id))

    def session_history(self, session_id: str) -> list[HistoryEvent]:
        """See `UserState.session_history`."""
        return self._events("sessions", user_key(session_id))

    def user(self, user_id: str) -> dict[str, Any] | None:
        """See `UserState.user`."""
        value = self._get("users", user_key(user_id))
        return None if value is None else orjson.loads(value)

    def counters(self, user_id: str) -> dict[str, int]:
        """See `UserState.counters`."""
        value = self._get("counters", user_key(user_id))
        return {} if value is None else orjson.loads(value)

    def seen(self, user_id: str, kinds: Collection[str] | None = None) -> set[str]:
        """See `UserState.seen`."""
        with self._env.begin() as txn:
            entries = [(key, orjson.loads(value)) for key, value in starting_with(txn, self._tables["seen"], user_key(user_id))]
        return {key[KEY_BYTES:].decode() for key, times in entries if kinds is None or any(kind in times for kind in kinds)}

    def erased_at(self, user_id: str) -> float | None:
        """See `UserState.erased_at`."""
        value = self._get("erased", user_key(user_id))
        return None if value is None else F64.unpack(value)[0]

    def item(self, item_id: str) -> ItemState | None:
        """See `UserState.item`."""
        value = self._get("items", item_key(item_id))
        return None if value is None else _item(value)

    def item_sequence(self) -> int:
        """See `UserState.item_sequence`."""
        with self._env.begin() as txn:
            return last_sequence(txn, self._tables["item_feed"])

    def items_since(self, sequence: int) -> list[tuple[str, ItemState]]:
        """See `UserState.items_since`; an item changed twice comes once, where it changed last."""
        changed = []
        with self._env.begin() as txn:
            cursor = txn.cursor(self._tables["item_feed"])
            if cursor.set_range(U64.pack(sequence + 1)):
                for key, item_id in cursor:
                    item = _item(txn.get(bytes(item_id), db=self._tables["items"]) or b"")
                    if item.sequence == U64.unpack(key)[0]:
                        changed.append((bytes(item_id).decode(), item))
        return changed

    def popular(self, k: int) -> list[str]:
        """See `UserState.popular`."""
        with self._env.begin() as txn:
            counts = [(U64.unpack(value)[0], key.decode()) for key, value in txn.cursor(self._tables["popular"])]
        return [item_id for _, item_id in sorted(counts, key=lambda pair: (-pair[0], pair[1]))[:k]]

    def close(self) -> None:
        """See `UserState.close`."""
        self._env.close()

    def _events(self, table: str, key: bytes) -> list[HistoryEvent]:
        with self._env.begin() as txn:
            older, newest = (orjson.loads(txn.get(name, db=self._tables[table]) or b"[]") for name in (key, key + NEWEST))
        return [HistoryEvent(*event) for event in in_order(older, newest, self.limits.max_events)]

    def _check_format(self, folder: str, readonly: bool) -> None:
        with self._env.begin(write=not readonly) as txn:
            offsets = self._tables["offsets"]
            found = txn.get(FORMAT_KEY, db=offsets)
            if found is None and not readonly and not txn.stat(offsets)["entries"]:
                txn.put(FORMAT_KEY, FORMAT, db=offsets)
            elif found != FORMAT:
                raise StateError(
                    f"state {folder}: expected format {FORMAT.decode()}, found another; remove the folder, the log rebuilds it"
                )

    def _get(self, table: str, key: bytes) -> bytes | None:
        with self._env.begin() as txn:
            return txn.get(key, db=self._tables[table])


def _item(value: bytes) -> ItemState:
    fields = orjson.loads(value)
    return ItemState(fields["attributes"], fields["deleted"], fields["sequence"])
