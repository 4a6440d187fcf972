"""Online state in LMDB: one memory-mapped file that all processes of a node read and write.

LMDB lets one process write at a time and never blocks readers, so what one
replica committed is what the next request on any other replica reads. The byte
position of the log is stored in the same transaction as its effect.
"""

import os
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

import lmdb
import orjson

from raysys.errors import StateError
from raysys.events.identity import user_key
from raysys.events.log import Record, Span
from raysys.events.state import ItemState, StateLimits
from raysys.schema import NON_HISTORY_EVENTS, HistoryEvent

U64 = struct.Struct(">Q")
TABLES = (
    "offsets",  # log segment -> u64 position
    "histories",  # user key -> JSON list of events, newest last
    "sessions",  # session key -> the same
    "users",  # user key -> JSON attributes
    "erased",  # user key -> u64 ms
    "items",  # item id -> JSON item
    "item_feed",  # u64 sequence -> item id
    "event_ids",  # event id -> u64 ms
    "event_id_times",  # u64 ms + event id -> nothing
    "popular",  # item id -> u64 events
)
PRUNE_PER_COMMIT = 200
"""Event ids forgotten a commit at most, so that no commit pays for a quiet week."""


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

    def apply(self, records: Sequence[Record], span: Span) -> list[bool]:
        """See `UserState.apply`.

        Raises:
            StateError: the store is full or the disk refuses; the records stay in the log and are folded in at the next open.
        """
        try:
            with self._env.begin(write=True) as txn:
                at = txn.get(span.segment.encode(), db=self._tables["offsets"])
                if at is not None and U64.unpack(at)[0] >= span.stop:
                    return [True] * len(records)  # another process replayed this span from the log
                fresh = [self._apply_one(txn, record) for record in records]
                txn.put(span.segment.encode(), U64.pack(span.stop), db=self._tables["offsets"])
                self._prune(txn)
                return fresh
        except lmdb.Error as error:
            raise StateError(f"state: cannot commit, {error}") from None

    def applied(self, segment: str) -> int:
        """See `UserState.applied`."""
        value = self._get("offsets", segment.encode())
        return U64.unpack(value)[0] if value else 0

    def known_event(self, event_id: str) -> bool:
        """See `UserState.known_event`."""
        return self._get("event_ids", _event_key(event_id)) is not None

    def history(self, user_id: str) -> list[HistoryEvent]:
        """See `UserState.history`."""
        return _events(self._get("histories", user_key(user_id)))

    def session_history(self, session_id: str) -> list[HistoryEvent]:
        """See `UserState.session_history`."""
        return _events(self._get("sessions", user_key(session_id)))

    def user(self, user_id: str) -> dict[str, Any] | None:
        """See `UserState.user`."""
        value = self._get("users", user_key(user_id))
        return None if value is None else orjson.loads(value)

    def erased(self, user_id: str) -> bool:
        """See `UserState.erased`."""
        return self._get("erased", user_key(user_id)) is not None

    def item(self, item_id: str) -> ItemState | None:
        """See `UserState.item`."""
        value = self._get("items", _item_key(item_id))
        return None if value is None else _item(value)

    def item_sequence(self) -> int:
        """See `UserState.item_sequence`."""
        with self._env.begin() as txn:
            return self._last_sequence(txn)

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

    def _get(self, table: str, key: bytes) -> bytes | None:
        with self._env.begin() as txn:
            return txn.get(key, db=self._tables[table])

    def _apply_one(self, txn: lmdb.Transaction, record: Record) -> bool:
        kind = record["kind"]
        if kind == "event":
            return self._apply_event(txn, record)
        if kind == "item":
            self._change_item(txn, record["item_id"], record["attributes"], replace=record.get("replace", False), deleted=False)
        elif kind == "item_delete":
            self._change_item(txn, record["item_id"], {}, replace=False, deleted=True)
        elif kind == "user":
            key = user_key(record["user_id"])
            old = None if record.get("replace") else txn.get(key, db=self._tables["users"])
            merged = {**(orjson.loads(old) if old else {}), **record["attributes"]}
            kept = {name: value for name, value in merged.items() if value is not None}
            txn.put(key, orjson.dumps(kept), db=self._tables["users"])
        elif kind == "erase":
            key = bytes.fromhex(record["user_key"])
            for entry in orjson.loads(txn.get(key, db=self._tables["histories"]) or b"[]"):
                if entry[4]:
                    txn.delete(user_key(entry[4]), db=self._tables["sessions"])
            for table in ("histories", "users"):
                txn.delete(key, db=self._tables[table])
            txn.put(key, U64.pack(int(record["at"] * 1000)), db=self._tables["erased"])
        return True

    def _apply_event(self, txn: lmdb.Transaction, record: Record) -> bool:
        event_id = record.get("event_id")
        if event_id:
            now = U64.pack(int(self.clock() * 1000))
            if not txn.put(_event_key(event_id), now, overwrite=False, db=self._tables["event_ids"]):
                return False
            txn.put(now + _event_key(event_id), b"", db=self._tables["event_id_times"])
        if record["event"] in NON_HISTORY_EVENTS:
            return True
        entry = [record["item_id"], record["event"], record["timestamp"], record.get("value"), record.get("session_id")]
        self._extend(txn, "histories", user_key(record["user_id"]), entry)
        if record.get("session_id"):
            self._extend(txn, "sessions", user_key(record["session_id"]), entry)
        item_key = _item_key(record["item_id"])
        count = txn.get(item_key, db=self._tables["popular"])
        txn.put(item_key, U64.pack((U64.unpack(count)[0] if count else 0) + 1), db=self._tables["popular"])
        return True

    def _extend(self, txn: lmdb.Transaction, table: str, key: bytes, entry: list) -> None:
        value = txn.get(key, db=self._tables[table])
        history = orjson.loads(value) if value else []
        history.append(entry)
        if len(history) > 1 and history[-2][2] > entry[2]:  # a late event
            history.sort(key=lambda event: event[2])
        txn.put(key, orjson.dumps(history[-self.limits.max_events :]), db=self._tables[table])

    def _change_item(self, txn: lmdb.Transaction, item_id: str, attributes: dict, *, replace: bool, deleted: bool) -> None:
        key = _item_key(item_id)
        old = txn.get(key, db=self._tables["items"])
        kept = {} if replace or old is None else orjson.loads(old)["attributes"]
        sequence = self._last_sequence(txn) + 1
        item = {"attributes": {**kept, **attributes}, "deleted": deleted, "sequence": sequence}
        if old is not None:
            txn.delete(U64.pack(orjson.loads(old)["sequence"]), db=self._tables["item_feed"])
        txn.put(key, orjson.dumps(item), db=self._tables["items"])
        txn.put(U64.pack(sequence), item_id.encode(), db=self._tables["item_feed"])

    def _last_sequence(self, txn: lmdb.Transaction) -> int:
        cursor = txn.cursor(self._tables["item_feed"])
        return U64.unpack(cursor.key())[0] if cursor.last() else 0

    def _prune(self, txn: Any) -> None:
        oldest = U64.pack(max(0, int((self.clock() - self.limits.event_id_window_s) * 1000)))
        cursor = txn.cursor(self._tables["event_id_times"])
        for _ in range(PRUNE_PER_COMMIT):
            if not cursor.first() or cursor.key() >= oldest:
                return
            txn.delete(cursor.key()[U64.size :], db=self._tables["event_ids"])
            cursor.delete()


def _event_key(event_id: str) -> bytes:
    """The id itself, or its hash where it is too long for a key (LMDB takes 511 bytes)."""
    key = event_id.encode()
    return key if len(key) <= 64 else b"#" + user_key(event_id)


def _item_key(item_id: str) -> bytes:
    key = item_id.encode()
    if not 0 < len(key) <= 500:
        raise StateError(f"expected an item_id of 1 to 500 bytes, got {len(key)}")
    return key


def _item(value: bytes) -> ItemState:
    fields = orjson.loads(value)
    return ItemState(fields["attributes"], fields["deleted"], fields["sequence"])


def _events(value: bytes | None) -> list[HistoryEvent]:
    if value is None:
        return []
    return [HistoryEvent(item, event, timestamp, number) for item, event, timestamp, number, _ in orjson.loads(value)]
