"""Who may call: API keys from the environment or a secret file, several at a time so that one can replace another."""

import hashlib
import hmac
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from raysys.errors import ConfigError

LOG = logging.getLogger("ray.serve")
KEY_VARIABLE, FILE_VARIABLE = "RAYSYS_API_KEY", "RAYSYS_API_KEY_FILE"
LOOK_EVERY_S = 5.0
"""Seconds between looks at the file: a rotated secret is in force without a restart."""


def keys_are_set() -> bool:
    """Whether the environment names any key."""
    return bool(os.environ.get(KEY_VARIABLE) or os.environ.get(FILE_VARIABLE))


class Keys:
    """The keys in force. Compared as digests, all of them each time, so that time tells nothing.

    Args:
        key: one key; default from the environment.
        path: a file with a key a line; default from the environment.
        clock: monotonic seconds.

    Raises:
        ConfigError: the file cannot be read or holds no key.
    """

    def __init__(self, key: str | None = None, path: str | None = None, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._given = [_digest(value.encode()) for value in [key or os.environ.get(KEY_VARIABLE)] if value]
        self._path = path or os.environ.get(FILE_VARIABLE)
        self._written: tuple[int, int] | None = None
        self._from_file: list[bytes] = []
        self._looked = clock()
        if self._path:
            self._read()

    @property
    def required(self) -> bool:
        """Whether a key is asked for at all."""
        return bool(self._given or self._path)

    def owner(self, key: bytes) -> bytes | None:
        """What stands for the holder of a key (its digest), None for a wrong key."""
        if self._path and self._clock() - self._looked >= LOOK_EVERY_S:
            self._looked = self._clock()
            try:
                self._read()
            except ConfigError as error:  # the keys of before stay in force
                LOG.error("%s", error)
        asked, found = _digest(key), None
        for known in (*self._given, *self._from_file):
            if hmac.compare_digest(asked, known):
                found = known
        return found

    def _read(self) -> None:
        path = Path(self._path or "")
        try:
            stat = path.stat()
            written = (stat.st_mtime_ns, stat.st_size)
            if written == self._written:
                return
            keys = [line.strip() for line in path.read_bytes().splitlines() if line.strip()]
        except OSError as error:
            raise ConfigError(f"{FILE_VARIABLE}={path}: expected a readable file with a key a line, {error.strerror}") from None
        if not keys:
            raise ConfigError(f"{FILE_VARIABLE}={path}: expected a key a line, found none")
        self._from_file, self._written = [_digest(key) for key in keys], written


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
