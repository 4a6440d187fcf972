"""Online state in Redis, for services on several nodes: every replica reads what any replica committed.

    P:offsets           hash: log segment -> position
    P:history:USER      sorted set by timestamp: "<sequence>|<event as JSON>"; P:session:KEY the same
    P:sessions_of:USER  set of session keys
    P:counters:USER     hash: event type -> number
    P:seen:USER         sorted set by timestamp: [event type, item id] as JSON
    P:user:USER         hash: attribute -> JSON
    P:erased            hash: user key -> when
    P:item:ID           hash: "a:<attribute>" -> JSON, deleted, sequence; P:item_feed sorted set of ids by sequence
    P:event_ids         sorted set of event ids by time, milliseconds
    P:popular           sorted set of item ids by events

A batch is folded in by one script, so all of it and its log position become
visible together, and a batch that is sent again changes nothing.
"""

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import orjson

from raysys.errors import StateBehind
from raysys.events.identity import user_key
from raysys.events.log import Record, Span, Tombstones, moment
from raysys.events.redis_server import RedisServer
from raysys.events.state import ItemState, StateLimits
from raysys.schema import NON_HISTORY_EVENTS, HistoryEvent

COMMIT = """
local P, segment, start, stop, now, oldest = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5], ARGV[6]
local max_events, max_seen, session_ms, i = tonumber(ARGV[7]), tonumber(ARGV[8]), ARGV[9], 10
if segment ~= '' then
  local applied = tonumber(redis.call('HGET', P .. 'offsets', segment) or '0')
  if applied >= stop then return 'known' end
  if applied < start then return tostring(applied) end
end

local function erased_before(user, at)
  local erased = redis.call('HGET', P .. 'erased', user)
  return erased and tonumber(at) <= tonumber(erased)
end

local function extend(key, at, member)
  redis.call('ZADD', key, at, member)
  redis.call('ZREMRANGEBYRANK', key, 0, -max_events - 1)
end

local function event(id, user, session, at, received, item, kind, entry, is_history, seen)
  if id ~= '' and redis.call('ZADD', P .. 'event_ids', 'NX', now, id) == 0 then return 0 end
  if erased_before(user, received) then return 1 end
  redis.call('HINCRBY', P .. 'counters:' .. user, kind, 1)
  if is_history == '0' then return 1 end
  local member = string.format('%016.0f', redis.call('INCR', P .. 'sequence'))  .. '|' .. entry
  extend(P .. 'history:' .. user, at, member)
  if session ~= '' then
    extend(P .. 'session:' .. session, at, member)
    redis.call('SADD', P .. 'sessions_of:' .. user, session)
    redis.call('PEXPIRE', P .. 'session:' .. session, session_ms)
    redis.call('PEXPIRE', P .. 'sessions_of:' .. user, session_ms)
  end
  redis.call('ZADD', P .. 'seen:' .. user, 'GT', at, seen)
  redis.call('ZREMRANGEBYRANK', P .. 'seen:' .. user, 0, -max_seen - 1)
  redis.call('ZINCRBY', P .. 'popular', 1, item)
  return 1
end

local function erase(user, at)
  if erased_before(user, at) then return end
  for _, session in ipairs(redis.call('SMEMBERS', P .. 'sessions_of:' .. user)) do redis.call('DEL', P .. 'session:' .. session) end
  for _, kind in ipairs({'history:', 'counters:', 'seen:', 'user:', 'sessions_of:'}) do redis.call('DEL', P .. kind .. user) end
  redis.call('HSET', P .. 'erased', user, at)
end

local function change_item(item, deleted, replace)
  local key = P .. 'item:' .. item
  if replace == '1' then redis.call('DEL', key) end
  local sequence = redis.call('INCR', P .. 'item_sequence')
  redis.call('HSET', key, 'deleted', deleted, 'sequence', sequence)
  redis.call('ZADD', P .. 'item_feed', sequence, item)
  return key
end

local fresh = {}
while i <= #ARGV do
  local op, size, result = ARGV[i], tonumber(ARGV[i + 1]), 1
  local a = i + 2
  if op == 'event' then
    result = event(unpack(ARGV, a, a + 9))
  elseif op == 'erase' then
    erase(ARGV[a], ARGV[a + 1])
  elseif op == 'item' then
    local key = change_item(ARGV[a], ARGV[a + 1], ARGV[a + 2])
    for at = a + 3, a + size - 1, 2 do redis.call('HSET', key, ARGV[at], ARGV[at + 1]) end
  elseif op == 'user' and not erased_before(ARGV[a], ARGV[a + 1]) then
    local key = P .. 'user:' .. ARGV[a]
    if ARGV[a + 2] == '1' then redis.call('DEL', key) end
    for at = a + 3, a + size - 1, 2 do
      if ARGV[at + 1] == 'null' then redis.call('HDEL', key, ARGV[at]) else redis.call('HSET', key, ARGV[at], ARGV[at + 1]) end
    end
  end
  fresh[#fresh + 1] = result
  i = a + size
end
if segment ~= '' then redis.call('HSET', P .. 'offsets', segment, ARGV[4]) end
local old = redis.call('ZRANGEBYSCORE', P .. 'event_ids', '-inf', '(' .. oldest, 'LIMIT', 0, 2000)
if #old > 0 then redis.call('ZREM', P .. 'event_ids', unpack(old)) end
return fresh
"""


class RedisState:
    """See `UserState` and the module.

    Args:
        uri: of the server; see redis_server.py. What it loses in a crash comes back from the log.
        limits: bounds; `max_bytes` is the server's own `maxmemory`.
        patient: wait for a server that restarts.
        clock: seconds now, for the window of event ids.

    Raises:
        StateError: nobody answers there.
    """

    def __init__(self, uri: str, limits: StateLimits, *, patient: bool = True, clock: Callable[[], float] = time.time):
        self.limits, self.clock = limits, clock
        self._server = RedisServer(uri, "state", must_keep=False, patient=patient)
        self._redis, self._key = self._server.client, self._server.key
        self._commit = self._redis.register_script(COMMIT)

    def apply(self, records: Sequence[Record], span: Span) -> list[bool]:
        """See `UserState.apply`."""
        fresh = self._run([_operation(record) for record in records], span)
        if fresh == b"known":
            return [True] * len(records)
        if isinstance(fresh, bytes):
            raise StateBehind(f"state has {span.segment} up to {fresh.decode()}, the next records begin at {span.start}")
        return [bool(one) for one in fresh]

    def bury(self, tombstones: Tombstones) -> None:
        """See `UserState.bury`."""
        if tombstones:
            self._run([["erase", 2, key.hex(), repr(at)] for key, at in tombstones.items()], Span("", 0, 0))

    def applied(self, segment: str) -> int:
        """See `UserState.applied`."""
        return int(self._call("hget", "offsets", segment) or 0)

    def known_event(self, event_id: str) -> bool:
        """See `UserState.known_event`."""
        return self._call("zscore", "event_ids", event_id) is not None

    def history(self, user_id: str) -> list[HistoryEvent]:
        """See `UserState.history`."""
        return _events(self._call("zrange", f"history:{user_key(user_id).hex()}", 0, -1))

    def session_history(self, session_id: str) -> list[HistoryEvent]:
        """See `UserState.session_history`."""
        return _events(self._call("zrange", f"session:{user_key(session_id).hex()}", 0, -1))

    def user(self, user_id: str) -> dict[str, Any] | None:
        """See `UserState.user`."""
        found = self._call("hgetall", f"user:{user_key(user_id).hex()}")
        return {name.decode(): orjson.loads(value) for name, value in found.items()} or None

    def counters(self, user_id: str) -> dict[str, int]:
        """See `UserState.counters`."""
        return {kind.decode(): int(count) for kind, count in self._call("hgetall", f"counters:{user_key(user_id).hex()}").items()}

    def seen(self, user_id: str, kinds: Collection[str] | None = None) -> set[str]:
        """See `UserState.seen`."""
        pairs = [orjson.loads(member) for member in self._call("zrange", f"seen:{user_key(user_id).hex()}", 0, -1)]
        return {item for kind, item in pairs if kinds is None or kind in kinds}

    def erased_at(self, user_id: str) -> float | None:
        """See `UserState.erased_at`."""
        value = self._call("hget", "erased", user_key(user_id).hex())
        return None if value is None else float(value)

    def item(self, item_id: str) -> ItemState | None:
        """See `UserState.item`."""
        found = self._call("hgetall", f"item:{item_id}")
        return _item(found) if found else None

    def item_sequence(self) -> int:
        """See `UserState.item_sequence`."""
        return int(self._call("get", "item_sequence") or 0)

    def items_since(self, sequence: int) -> list[tuple[str, ItemState]]:
        """See `UserState.items_since`; an item changed twice comes once, where it changed last."""
        names = [name.decode() for name in self._call("zrangebyscore", "item_feed", f"({sequence}", "+inf")]
        with self._server.translated(), self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hgetall(self._key(f"item:{name}"))
            return [(name, _item(found)) for name, found in zip(names, pipe.execute(), strict=True)]

    def popular(self, k: int) -> list[str]:
        """See `UserState.popular`."""
        best = self._call("zrevrange", "popular", 0, k - 1, withscores=True)
        if not best or k <= 0:
            return []
        least = best[-1][1]
        above = sorted((pair for pair in best if pair[1] > least), key=lambda pair: (-pair[1], pair[0]))
        ties = self._call("zrangebyscore", "popular", least, least, start=0, num=k - len(above))  # in order of their names
        return [name.decode() for name in [*(name for name, _ in above), *ties]]

    def close(self) -> None:
        """See `UserState.close`."""
        self._server.close()

    def _call(self, command: str, key: str, *arguments: Any, **options: Any) -> Any:
        with self._server.translated():
            return getattr(self._redis, command)(self._key(key), *arguments, **options)

    def _run(self, operations: list[list], span: Span) -> Any:
        now = self.clock()
        window = [int(now * 1000), int((now - self.limits.event_id_window_s) * 1000)]
        bounds = [self.limits.max_events, self.limits.max_seen, int(self.limits.session_window_s * 1000)]
        arguments: list[Any] = [self._key(""), span.segment, span.start, span.stop, *window, *bounds]
        arguments += [part for operation in operations for part in operation]
        with self._server.translated():
            return self._commit(args=arguments)


def _operation(record: Record) -> list:
    """A record as the script takes it: name, number of values, values."""
    kind = record["kind"]
    values: list[Any]
    if kind == "event":
        entry = orjson.dumps([record["item_id"], record["event"], record["timestamp"], record.get("value")])
        session = user_key(record["session_id"]).hex() if record.get("session_id") else ""
        item, event = record["item_id"], record["event"]
        who = [record.get("event_id") or "", user_key(record["user_id"]).hex(), session]
        when = [repr(float(record["timestamp"])), repr(float(moment(record)))]
        values = [*who, *when, item, event, entry, "0" if event in NON_HISTORY_EVENTS else "1", orjson.dumps([event, item])]
    elif kind in ("item", "item_delete"):
        attributes = record.get("attributes", {})
        flags = ["1" if kind == "item_delete" else "0", "1" if record.get("replace") else "0"]
        kind, values = "item", [record["item_id"], *flags, *_pairs(attributes, "a:")]
    elif kind == "user":
        who = [user_key(record["user_id"]).hex(), repr(float(moment(record))), "1" if record.get("replace") else "0"]
        values = [*who, *_pairs(record["attributes"], "")]
    elif kind == "erase":
        values = [record["user_key"], repr(float(record["at"]))]
    else:
        kind, values = "nothing", []
    return [kind, len(values), *values]


def _pairs(attributes: dict[str, Any], prefix: str) -> list:
    return [part for name, value in attributes.items() for part in (prefix + name, orjson.dumps(value))]


def _item(found: dict[bytes, bytes]) -> ItemState:
    attributes = {name[2:].decode(): orjson.loads(value) for name, value in found.items() if name.startswith(b"a:")}
    return ItemState(attributes, found[b"deleted"] == b"1", int(found[b"sequence"]))


def _events(members: list[bytes]) -> list[HistoryEvent]:
    return [HistoryEvent(*orjson.loads(member.split(b"|", 1)[1])) for member in members]
