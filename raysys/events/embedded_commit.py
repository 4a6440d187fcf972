"""One write transaction of the embedded state: what each kind of record changes.

A history lies in two parts, the newest events apart from the rest, so that an
event does not cost the rewriting of hundreds; and a part is parsed and written
once a transaction. Whatever a user did up to an erasure has no effect, in
whatever order the records come.
"""

import struct
from collections.abc import Callable
from typing import Any

import lmdb
import orjson

from raysys.errors import StateError
from raysys.events.identity import KEY_BYTES, user_key
from raysys.events.log import Record, moment
from raysys.events.state import StateLimits
from raysys.schema import NON_HISTORY_EVENTS

U64, F64 = struct.Struct(">Q"), struct.Struct(">d")
TABLES = (
    "offsets",  # log segment -> u64 position
    "histories",  # user key -> JSON list of events by time; user key + NEWEST -> those that came since, as they came
    "sessions",  # session key -> the same
    "sessions_of",  # user key + session key -> nothing
    "session_owners",  # session key -> u64 ms of the last event (within TOUCH_S), user key
    "session_times",  # u64 ms + session key -> nothing
    "counters",  # user key -> JSON event type -> number
    "seen",  # user key + item id -> JSON event type -> last time
    "seen_counts",  # user key -> u64 entries in `seen`
    "users",  # user key -> JSON attributes
    "erased",  # user key -> f64 when
    "items",  # item id -> JSON item
    "item_feed",  # u64 sequence -> item id
    "event_ids",  # event id -> u64 ms
    "event_id_times",  # u64 ms + event id -> nothing
    "popular",  # item id -> u64 events
)
NEWEST, NUM_NEWEST = b"+", 64
OF_A_USER = ("histories", "counters", "seen_counts", "users")
PRUNE_PER_COMMIT = 2000
"""Event ids and sessions forgotten a commit at most, so that no commit pays for a quiet week."""
TOUCH_S = 3600.0
"""How exactly it is known when a session had its last event."""
SEEN_SLACK = 0.1
"""Share of the bound that is forgotten at once, so that not every event beyond it pays for a scan."""


class Commit:
    """See the module.

    Args:
        txn: a write transaction.
        tables: name -> handle.
        limits: bounds.
        now: UTC epoch seconds, for the window of event ids.
    """

    def __init__(self, txn: lmdb.Transaction, tables: dict[str, Any], limits: StateLimits, now: float):
        self._txn, self._tables, self._limits, self._now = txn, tables, limits, now
        self._parsed: dict[tuple[str, bytes], Any] = {}

    def apply(self, record: Record) -> bool:
        """Fold one record in; False for an event that was seen before."""
        kind = record["kind"]
        if kind == "event":
            return self._event(record)
        if kind == "item":
            self._item(record["item_id"], record["attributes"], replace=record.get("replace", False), deleted=False)
        elif kind == "item_delete":
            self._item(record["item_id"], {}, replace=False, deleted=True)
        elif kind == "user":
            self._user(record)
        elif kind == "erase":
            self.erase(bytes.fromhex(record["user_key"]), record["at"])
        return True

    def erase(self, key: bytes, at: float) -> None:
        """Forget a user; nothing where this is known already, so that a replay does not take what came after."""
        if self._erased(key) >= at:
            return
        for name, _ in starting_with(self._txn, self._tables["sessions_of"], key):
            self._end_session(name[KEY_BYTES:])
        for table in OF_A_USER:
            self._remove(table, key)
        for name, _ in starting_with(self._txn, self._tables["seen"], key):
            self._txn.delete(name, db=self._tables["seen"])
        self._txn.put(key, F64.pack(at), db=self._tables["erased"])

    def finish(self) -> None:
        """Write what was gathered, and forget event ids and sessions that are too old."""
        for (table, key), value in self._parsed.items():
            self._txn.put(key, orjson.dumps(value), db=self._tables[table])
        self._prune("event_id_times", self._limits.event_id_window_s, lambda key: self._txn.delete(key, db=self._tables["event_ids"]))
        self._prune("session_times", self._limits.session_window_s + TOUCH_S, self._end_session)

    def _event(self, record: Record) -> bool:
        event_id = record.get("event_id")
        if event_id:
            now = U64.pack(int(self._now * 1000))
            if not self._txn.put(event_key(event_id), now, overwrite=False, db=self._tables["event_ids"]):
                return False
            self._txn.put(now + event_key(event_id), b"", db=self._tables["event_id_times"])
        key, kind = user_key(record["user_id"]), record["event"]
        if moment(record) <= self._erased(key):
            return True
        counters = self._load("counters", key, {})
        counters[kind] = counters.get(kind, 0) + 1
        if kind in NON_HISTORY_EVENTS:
            return True
        entry = [record["item_id"], kind, record["timestamp"], record.get("value")]
        self._extend("histories", key, entry)
        if record.get("session_id"):
            session = user_key(record["session_id"])
            self._extend("sessions", session, entry)
            self._touch_session(session, key)
        self._see(key, record["item_id"], kind, record["timestamp"])
        name = item_key(record["item_id"])
        count = self._txn.get(name, db=self._tables["popular"])
        self._txn.put(name, U64.pack((U64.unpack(count)[0] if count else 0) + 1), db=self._tables["popular"])
        return True

    def _extend(self, table: str, key: bytes, entry: list) -> None:
        newest = self._load(table, key + NEWEST, [])
        newest.append(entry)
        if len(newest) >= NUM_NEWEST:
            self._parsed[table, key] = in_order(self._load(table, key, []), newest, self._limits.max_events)
            newest.clear()

    def _touch_session(self, session: bytes, user: bytes) -> None:
        now, owners = int(self._now * 1000), self._tables["session_owners"]
        old = bytes(self._txn.get(session, db=owners) or b"")
        if old and old[U64.size :] == user and now - U64.unpack_from(old)[0] < TOUCH_S * 1000:
            return
        if old:
            self._txn.delete(old[: U64.size] + session, db=self._tables["session_times"])
        self._txn.put(session, U64.pack(now) + user, db=owners)
        self._txn.put(U64.pack(now) + session, b"", db=self._tables["session_times"])
        self._txn.put(user + session, b"", db=self._tables["sessions_of"])

    def _end_session(self, session: bytes) -> None:
        self._remove("sessions", session)
        owner = bytes(self._txn.get(session, db=self._tables["session_owners"]) or b"")
        if owner:
            self._txn.delete(owner[: U64.size] + session, db=self._tables["session_times"])
            self._txn.delete(owner[U64.size :] + session, db=self._tables["sessions_of"])
            self._txn.delete(session, db=self._tables["session_owners"])

    def _see(self, key: bytes, item_id: str, kind: str, at: float) -> None:
        table, name = self._tables["seen"], key + item_key(item_id)
        value = self._txn.get(name, db=table)
        times = orjson.loads(value) if value else {}
        self._txn.put(name, orjson.dumps({**times, kind: max(at, times.get(kind, at))}), db=table)
        if value:
            return
        stored = self._txn.get(key, db=self._tables["seen_counts"])
        count = 1 + (U64.unpack(stored)[0] if stored else 0)
        if count > self._limits.max_seen:
            oldest = sorted(starting_with(self._txn, table, key), key=lambda pair: max(orjson.loads(pair[1]).values()))
            gone = oldest[: count - self._limits.max_seen + int(SEEN_SLACK * self._limits.max_seen)]
            for old, _ in gone:
                self._txn.delete(old, db=table)
            count -= len(gone)
        self._txn.put(key, U64.pack(count), db=self._tables["seen_counts"])

    def _user(self, record: Record) -> None:
        key = user_key(record["user_id"])
        if moment(record) <= self._erased(key):
            return
        old = {} if record.get("replace") else self._load("users", key, {})
        merged = {**old, **record["attributes"]}
        self._parsed["users", key] = {name: value for name, value in merged.items() if value is not None}

    def _item(self, item_id: str, attributes: dict, *, replace: bool, deleted: bool) -> None:
        key = item_key(item_id)
        old = self._txn.get(key, db=self._tables["items"])
        kept = {} if replace or old is None else orjson.loads(old)["attributes"]
        sequence = last_sequence(self._txn, self._tables["item_feed"]) + 1
        item = {"attributes": {**kept, **attributes}, "deleted": deleted, "sequence": sequence}
        if old is not None:
            self._txn.delete(U64.pack(orjson.loads(old)["sequence"]), db=self._tables["item_feed"])
        self._txn.put(key, orjson.dumps(item), db=self._tables["items"])
        self._txn.put(U64.pack(sequence), item_id.encode(), db=self._tables["item_feed"])

    def _erased(self, key: bytes) -> float:
        value = self._txn.get(key, db=self._tables["erased"])
        return F64.unpack(value)[0] if value else float("-inf")

    def _load(self, table: str, key: bytes, empty: Any) -> Any:
        found = self._parsed.get((table, key))
        if found is None:
            value = self._txn.get(key, db=self._tables[table])
            found = self._parsed[table, key] = orjson.loads(value) if value else empty
        return found

    def _remove(self, table: str, key: bytes) -> None:
        for name in (key, key + NEWEST):
            self._parsed.pop((table, name), None)
            self._txn.delete(name, db=self._tables[table])

    def _prune(self, table: str, window_s: float, forget: Callable[[bytes], object]) -> None:
        """Forget the keys of a table of times that are older than a window, oldest first."""
        oldest, times = U64.pack(max(0, int((self._now - window_s) * 1000))), self._tables[table]
        for _ in range(PRUNE_PER_COMMIT):
            cursor = self._txn.cursor(times)
            if not cursor.first() or (name := bytes(cursor.key())) >= oldest:
                return
            forget(name[U64.size :])
            self._txn.delete(name, db=times)


def in_order(older: list[list], newest: list[list], limit: int) -> list[list]:
    """The last events of a history by time; those of one moment as they came."""
    return sorted([*older, *newest], key=lambda event: event[2])[-limit:]


def starting_with(txn: lmdb.Transaction, table: Any, prefix: bytes) -> list[tuple[bytes, bytes]]:
    """(key, value) of all keys that begin with a prefix, such as a user key; a list, so that they may be deleted meanwhile."""
    found = []
    cursor = txn.cursor(table)
    if cursor.set_range(prefix):
        for name, value in cursor:
            if not bytes(name).startswith(prefix):
                break
            found.append((bytes(name), bytes(value)))
    return found


def last_sequence(txn: lmdb.Transaction, feed: Any) -> int:
    """Number of the last item change."""
    cursor = txn.cursor(feed)
    return U64.unpack(cursor.key())[0] if cursor.last() else 0


def event_key(event_id: str) -> bytes:
    """The id itself, or its hash where it is too long for a key (LMDB takes 511 bytes)."""
    key = event_id.encode()
    return key if len(key) <= 64 else b"#" + user_key(event_id)


def item_key(item_id: str) -> bytes:
    """The id; behind a user key it must still fit into a key.

    Raises:
        StateError: it does not.
    """
    key = item_id.encode()
    if not 0 < len(key) <= 490:
        raise StateError(f"expected an item_id of 1 to 490 bytes, got {len(key)}")
    return key
