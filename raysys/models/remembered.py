"""Vectors of histories that were encoded before: a user who asks again without a new event costs the encoder nothing.

They stand in one table that all processes of a node map: whichever replica is asked, what another has encoded is there. A history has
WAYS places to stand, by its hash, and takes one of them from whoever had it where none is free. Nobody waits for anybody: a record that
is read while another process writes it does not match its checksum and counts as not there.

Nothing in the table says whose a history is, nor what was in it.
"""

import hashlib
import logging
import math
import os
import threading
from collections.abc import Callable

import numpy as np

from raysys.queries import Queries

LOG = logging.getLogger(__name__)
KEY_BYTES, CHECK_BYTES = 16, 8
WAYS = 4
"""Places of a history; with one alone, two that share it would push each other out for ever."""


class Remembered:
    """Safe for threads and processes; only one thread of a process at a time encodes.

    Args:
        encode: queries -> (B, D) float32.
        max_length: last events of a history that `encode` looks at.
        codes: queries -> (L,) columns of their events that `encode` looks at beside the items; None for one that it does not.
        dim: D.
        size: histories at most, rounded up to whole groups of WAYS; each takes 4 D + 24 bytes.
        model: what tells apart encoders that give one history different vectors.
        path: file of the table, one for each `dim` and `size`, made if it is not there; None for one that is this process's own.
    """

    def __init__(
        self,
        encode: Callable[[Queries], np.ndarray],
        max_length: int,
        codes: Callable[[Queries], tuple[np.ndarray | None, ...]],
        *,
        dim: int,
        size: int,
        model: bytes,
        path: str | None = None,
    ):
        self._encode, self._max_length, self._codes, self._model = encode, max_length, codes, model
        self._records = _table(path, (-(-size // WAYS), WAYS, KEY_BYTES + 4 * dim + CHECK_BYTES))
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    def __call__(self, queries: Queries) -> np.ndarray:
        """(B, D) float32, as `encode` gives it."""
        with self._lock:
            return self._answer(queries)

    def _answer(self, queries: Queries) -> np.ndarray:
        # Codes, since times themselves would tell apart what the encoder does not.
        columns = (queries.items, *(codes for codes in self._codes(queries) if codes is not None))
        keys = [self._key(queries, columns, row) for row in range(len(queries))]
        found = {key: vector for key in keys if (vector := self._read(key)) is not None}
        missing = [row for row, key in enumerate(keys) if key not in found]
        self.hits, self.misses = self.hits + len(keys) - len(missing), self.misses + len(missing)
        if missing:
            vectors = self._encode(queries if len(missing) == len(keys) else Queries.stack([queries[row : row + 1] for row in missing]))
            for row, vector in zip(missing, vectors, strict=True):
                found[keys[row]] = vector
                self._write(keys[row], vector)
        return np.stack([found[key] for key in keys])

    def _key(self, queries: Queries, columns: tuple[np.ndarray, ...], row: int) -> bytes:
        first, stop = queries.indptr[row], queries.indptr[row + 1]
        window = slice(max(first, stop - self._max_length), stop)
        content = b"".join(column[window].tobytes() for column in columns)
        return hashlib.blake2b(content, digest_size=KEY_BYTES, key=self._model).digest()

    def _group(self, key: bytes) -> np.ndarray:
        """(WAYS, bytes of a record) uint8, a view."""
        return self._records[int.from_bytes(key[:8], "little") % len(self._records)]

    def _read(self, key: bytes) -> np.ndarray | None:
        for record in map(np.ndarray.tobytes, self._group(key)):
            if record.startswith(key) and _check(record[:-CHECK_BYTES]) == record[-CHECK_BYTES:]:
                return np.frombuffer(record[:-CHECK_BYTES], np.float32, offset=KEY_BYTES)
        return None

    def _write(self, key: bytes, vector: np.ndarray) -> None:
        group, content = self._group(key), key + vector.astype(np.float32, copy=False).tobytes()
        free = np.flatnonzero(~group[:, :KEY_BYTES].any(axis=1))
        group[free[0] if len(free) else key[-1] % WAYS] = np.frombuffer(content + _check(content), np.uint8)


def _check(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=CHECK_BYTES).digest()


def _table(path: str | None, shape: tuple[int, int, int]) -> np.ndarray:
    """(groups, WAYS, bytes of a record) uint8: the file's content mapped, or memory of this process where there can be no file."""
    if path is not None:
        folder = os.path.dirname(path)
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            if os.stat(folder).st_uid != os.getuid():
                raise OSError("expected a folder of this user, it is another's")
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                # All of it now: a page that the disk has no room for later would end the process.
                os.posix_fallocate(file, 0, math.prod(shape))
            finally:
                os.close(file)
            return np.memmap(path, np.uint8, "r+", shape=shape)
        except (OSError, AttributeError) as error:  # not every system can set room aside
            LOG.warning("each replica remembers histories by itself: %s: %s", path, error)
    return np.zeros(shape, np.uint8)
