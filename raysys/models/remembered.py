"""Vectors of histories that were encoded before: a user who asks again without a new event costs the encoder nothing."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from raysys.queries import Queries


class Remembered:
    """The least recently used (D,) float32 vectors, by what the encoder would look at.

    Safe for threads; only one at a time encodes.

    Args:
        encode: queries -> (B, D) float32.
        max_length: last events of a history that `encode` looks at.
        size: vectors kept; each takes 4 D bytes and about 200 for its key and place.
        codes: queries -> (L,) columns of their events that `encode` looks at beside the items; None for one that it does not.
    """

    def __init__(
        self,
        encode: Callable[[Queries], np.ndarray],
        max_length: int,
        size: int,
        codes: Callable[[Queries], tuple[np.ndarray | None, ...]],
    ):
        self._encode, self._max_length, self._size, self._codes = encode, max_length, size, codes
        self._vectors: OrderedDict[bytes, np.ndarray] = OrderedDict()
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
        # Those of this batch apart: a batch larger than the memory must not lose what it has just found.
        found: dict[bytes, np.ndarray] = {key: vector for key in keys if (vector := self._vectors.get(key)) is not None}
        missing = [row for row, key in enumerate(keys) if key not in found]
        self.hits, self.misses = self.hits + len(keys) - len(missing), self.misses + len(missing)
        if missing:
            vectors = self._encode(queries if len(missing) == len(keys) else Queries.stack([queries[row : row + 1] for row in missing]))
            found |= {keys[row]: vectors[at].copy() for at, row in enumerate(missing)}
        for key in keys:
            self._vectors[key] = found[key]
            self._vectors.move_to_end(key)
        while len(self._vectors) > self._size:
            self._vectors.popitem(last=False)
        return np.stack([found[key] for key in keys])

    def _key(self, queries: Queries, columns: tuple[np.ndarray, ...], row: int) -> bytes:
        first, stop = queries.indptr[row], queries.indptr[row + 1]
        window = slice(max(first, stop - self._max_length), stop)
        return hashlib.blake2b(b"".join(column[window].tobytes() for column in columns), digest_size=16).digest()
