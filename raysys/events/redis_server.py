"""One Redis server: how a location names it, and whether it keeps what it acknowledges.

    redis://[:password@]host:port/db[?prefix=raysys&durability=always]

`prefix` begins every key, so that several services may share a server. With
`durability=everysec` a server that flushes once a second is accepted: a crash of
its machine may then lose a second of acknowledged events.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

from raysys.errors import ConfigError, StateError

LOG = logging.getLogger("raysys.events")
CONNECT_S, ANSWER_S = 2.0, 10.0
"""Patience with a connection, and with one answer, seconds."""
RETRIES, RETRIES_AT_START = 8, 3
"""A server that restarts is waited for about five seconds, one that was never there for half a second.
Every command here may be repeated without doing its work twice."""
HASTE_S, REST_S = 1.0, 1.0
"""Patience of those who cannot wait with one answer, and pause after a failure, seconds."""
KEEPS = {"always": ("always",), "everysec": ("always", "everysec")}
"""What `durability` asks for -> values of the server's appendfsync that give it."""


class RedisServer:
    """A client of one server and the key prefix of one service.

    Args:
        uri: see the module.
        what: "events" or "state", for messages.
        patient: wait for a server that restarts; else a command fails at once, and further ones for REST_S without trying.
        must_keep: check that the server keeps what it acknowledges also in a crash; that it evicts nothing is checked always.

    Raises:
        ConfigError: the location is malformed.
        StateError: nobody answers there, or the server would lose what it acknowledges.
    """

    def __init__(self, uri: str, what: str, *, must_keep: bool, patient: bool = True):
        parts = urlsplit(uri)
        options = dict(parse_qsl(parts.query))
        self.prefix = f"{options.pop('prefix', 'raysys')}:{what}:"
        durability = options.pop("durability", "always")
        if durability not in KEEPS:
            raise ConfigError(f"{what}: durability: expected one of {', '.join(KEEPS)}, got {durability!r}")
        self.name = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))  # without the password
        self.what, self._patient, self._resting_until = what, patient, 0.0
        try:
            self.client: redis.Redis = redis.Redis.from_url(
                urlunsplit(parts._replace(query=urlencode(options))),
                retry=_retry(RETRIES_AT_START if patient else 0),
                socket_connect_timeout=CONNECT_S,
                socket_timeout=ANSWER_S if patient else HASTE_S,
                health_check_interval=0,
            )
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{what}: expected redis://host:port/db, got {self.name!r} ({error})") from None
        with self.translated():
            self.client.ping()
            self._check(durability, must_keep)
        self.client.set_retry(_retry(RETRIES if patient else 0))

    def key(self, name: str) -> str:
        """The key of this service."""
        return self.prefix + name

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Turn what the client raises into our own error, without the password in it."""
        if time.monotonic() < self._resting_until:
            raise StateError(f"{self.what} at {self.name}: did not answer a moment ago")
        try:
            yield
        except RedisError as error:
            if not self._patient:
                self._resting_until = time.monotonic() + REST_S
            raise StateError(f"{self.what} at {self.name}: {type(error).__name__}: {str(error)[:200]}") from None

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def _check(self, durability: str, must_keep: bool) -> None:
        place = f"{self.what} at {self.name}"
        try:
            appendonly, fsync, memory, policy = map(self._setting, ("appendonly", "appendfsync", "maxmemory", "maxmemory-policy"))
        except ResponseError:
            LOG.warning("%s: the server does not tell its settings; make sure of appendonly yes and appendfsync always", place)
            return
        if int(memory or 0) and policy.startswith("allkeys"):
            raise StateError(f"{place}: expected maxmemory-policy noeviction, found {policy}: it would evict acknowledged events")
        if not must_keep:
            return
        if appendonly != "yes":
            raise StateError(f"{place}: expected appendonly yes, found {appendonly}: a crash would lose acknowledged events")
        if fsync not in KEEPS[durability]:
            raise StateError(
                f"{place}: expected appendfsync {durability}, found {fsync}: a crash of its machine would lose acknowledged events; "
                "`redis-cli config set appendfsync always`, or accept up to a second of loss with ?durability=everysec"
            )
        if fsync != "always":
            LOG.warning("%s: appendfsync %s: a crash of its machine may lose a second of acknowledged events", place, fsync)

    def _setting(self, name: str) -> str:
        return str(self.client.config_get(name).get(name, ""))


def _retry(times: int) -> Retry:
    return Retry(ExponentialBackoff(cap=1.0, base=0.05), times)
