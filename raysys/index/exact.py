"""Exact top-k over item vectors by dot product: blocked, in float32, ties by lower row.

A block of scores is one matrix product into a buffer that stays in cache; a
compiled scan then keeps what beats the row's running threshold. Few scores do
(about k log(N / k) of N), so the product is nearly all of the work. A kept
score is one integer, order-preserving bits above the row, so that plain integer
selection gives the same list for any block size and any number of threads.

Knows vectors and rows; not users, not models. Dot products of two block shapes
may differ in the last bit, as those of any two BLAS calls. Vectors that are kept
smaller (`vectors.py`) are decoded block by block, in cache.

Legend: B queries, N items, D dimension, k results.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import threadpoolctl
import torch

from raysys.errors import SchemaError
from raysys.index.vectors import Float32Vectors, Vectors

QUERY_BLOCK, ITEM_BLOCK = 512, 1024
"""Scores of a block: 2 MiB of float32, in reach of a server core's caches."""
CHUNK = 16
"""Scores that the scan rejects at once; divides ITEM_BLOCK."""
FEW = 8
"""Queries that are searched in the caller's thread: starting a pool would cost more than the search."""
DEVICE_ITEM_BLOCK = 16_384
"""Items of a block where torch computes: a GPU wants large products."""
EMPTY = np.iinfo(np.int64).max
"""Key of no result; larger than that of any score."""


def exact_top_k(
    queries: np.ndarray,
    items: np.ndarray | Vectors,
    k: int,
    *,
    seen: tuple[np.ndarray, np.ndarray] | None = None,
    allowed: np.ndarray | None = None,
    threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k items of largest dot product for each query.

    Args:
        queries: (B, D) float32.
        items: (N, D) float32, or vectors of `vectors.py` in any storage.
        k: cut-off.
        seen: (indptr (B+1,) int64, rows (L,) int32): items left out of each query's list, in any order.
        allowed: (N,) bool; items that may appear at all.
        threads: blocks computed side by side; all cores when None.

    Returns:
        (B, k) int32 rows, best first, -1 where fewer than k may appear, and (B, k) float32 dot products, -inf there.
        A dot product that is NaN or -inf never appears.

    Raises:
        SchemaError: shapes do not fit, k < 1, or 2**31 items and more.
    """
    queries, vectors = _checked(queries, items, k)
    rows = None if allowed is None else np.flatnonzero(allowed).astype(np.int32)
    if rows is not None:
        vectors = Float32Vectors(vectors.take(rows))
    starts, left_out = _sorted_seen(len(queries), seen, rows)
    keys = np.full((len(queries), k), EMPTY, np.int64)

    def block(first: int) -> None:
        part = slice(first, first + QUERY_BLOCK)
        keys[part] = _block_keys(queries[part], vectors, k, starts[first : first + QUERY_BLOCK + 1], left_out)

    if len(queries) <= FEW:
        if len(queries):
            block(0)
        return _decoded(keys, rows)
    # Every thread has a block of its own: no barrier inside a product, and numpy and numba release the interpreter lock.
    with threadpoolctl.threadpool_limits(1, "blas"), ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        _finish(pool.map(block, range(0, len(queries), QUERY_BLOCK)))
    return _decoded(keys, rows)


def top_k_on_device(
    queries: np.ndarray,
    items: torch.Tensor,
    k: int,
    *,
    seen: tuple[np.ndarray, np.ndarray] | None = None,
    allowed: torch.Tensor | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The same lists from wherever `items` lives, by torch; for GPUs.

    Args:
        queries: (B, D) float32, on the host.
        items: (N, D) float32 on the device.
        k: cut-off.
        seen: as in `exact_top_k`.
        allowed: (N,) bool on the device.

    Returns:
        As `exact_top_k`.
    """
    device = items.device
    queries_BD = torch.from_numpy(np.ascontiguousarray(queries, np.float32)).to(device)
    best = torch.full((len(queries), k), EMPTY, dtype=torch.int64, device=device)
    if seen is not None:
        owner = torch.from_numpy(np.repeat(np.arange(len(queries)), np.diff(seen[0]))).to(device)
        row = torch.from_numpy(seen[1].astype(np.int64)).to(device)
    for first in range(0, len(items), DEVICE_ITEM_BLOCK):
        block = items[first : first + DEVICE_ITEM_BLOCK]
        scores = queries_BD @ block.T
        if allowed is not None:
            scores[:, ~allowed[first : first + DEVICE_ITEM_BLOCK]] = -torch.inf
        if seen is not None:
            inside = (row >= first) & (row < first + len(block))
            scores[owner[inside], row[inside] - first] = -torch.inf
        bits = scores.view(torch.int32).long()
        bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        keys = ((-1 - bits) << 32) | torch.arange(first, first + len(block), device=device)
        keys = torch.where(scores > -torch.inf, keys, EMPTY)
        best = torch.cat([best, keys], 1).topk(k, largest=False, sorted=True).values
    return _decoded(best.cpu().numpy(), None)


def _checked(queries: np.ndarray, items: np.ndarray | Vectors, k: int) -> tuple[np.ndarray, Vectors]:
    vectors = Float32Vectors(np.ascontiguousarray(items, np.float32)) if isinstance(items, np.ndarray) else items
    if queries.ndim != 2 or len(vectors.shape) != 2 or queries.shape[1] != vectors.shape[1]:
        raise SchemaError(f"top-k: expected queries (B, D) and items (N, D) of one D, got {queries.shape} and {vectors.shape}")
    if k < 1 or vectors.shape[0] >= 2**31:
        raise SchemaError(f"top-k: expected k >= 1 and fewer than 2**31 items, got k={k} and {vectors.shape[0]:,} items")
    return np.ascontiguousarray(queries, np.float32), vectors


def _sorted_seen(count: int, seen: tuple[np.ndarray, np.ndarray] | None, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Seen items as rising positions among the rows that are searched."""
    if seen is None:
        return np.zeros(count + 1, np.int64), np.zeros(0, np.int32)
    indptr, left_out = np.asarray(seen[0], np.int64), np.asarray(seen[1])
    owner = np.repeat(np.arange(count), np.diff(indptr))
    if rows is not None:
        at = np.searchsorted(rows, left_out)
        known = at < len(rows)
        known[known] = rows[at[known]] == left_out[known]
        owner, left_out = owner[known], at[known]
        indptr = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=count))]).astype(np.int64)
    return indptr, left_out[np.lexsort((left_out, owner))].astype(np.int32)


def _block_keys(queries: np.ndarray, vectors: Vectors, k: int, starts: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """(B, k) int64 sorted keys of one block of queries."""
    B, N = len(queries), vectors.shape[0]
    kept = np.empty((B, k + 4 * ITEM_BLOCK), np.int64)
    counts, cursors = np.zeros(B, np.int64), starts[:-1].copy()
    thresholds = np.full(B, -np.inf, np.float32)
    buffer, tighten_at = np.empty((B, ITEM_BLOCK), np.float32), ITEM_BLOCK
    for first in range(0, N, ITEM_BLOCK):
        width = min(ITEM_BLOCK, N - first)
        np.matmul(queries, vectors.block(first, first + width).T, out=buffer[:, :width])
        buffer[:, width:] = -np.inf
        _scan(buffer, first, width, thresholds, left_out, cursors, starts, kept, counts)
        # Each doubling lets in about k more; the second clause keeps the room bounded where scores rise with the row.
        if first + width >= tighten_at or counts.max() + ITEM_BLOCK > kept.shape[1]:
            tighten_at = 2 * (first + width)
            _tighten(kept, counts, thresholds, k)
    _tighten(kept, counts, thresholds, k)
    best = np.where(np.arange(k) < counts[:, None], kept[:, :k], EMPTY)
    best.sort(axis=1)
    return best


def _tighten(kept: np.ndarray, counts: np.ndarray, thresholds: np.ndarray, k: int) -> None:
    """Keep the k best keys of each row; from then on a score must beat the k-th, since ties go to lower rows."""
    width = int(counts.max())
    if width <= k:
        full = counts == k
    else:
        keys = np.where(np.arange(width) < counts[:, None], kept[:, :width], EMPTY)
        keys.partition(k - 1, axis=1)
        kept[:, :k] = keys[:, :k]
        full = counts >= k
        np.minimum(counts, k, out=counts)
    if full.any():
        thresholds[full] = _scores_of(kept[full, :k].max(axis=1))


@numba.njit(nogil=True, cache=True)
def _scan(buffer, first, width, thresholds, left_out, cursors, starts, kept, counts):  # pragma: no cover - compiled
    """Append the key of every score above its row's threshold; scores of seen items do not count."""
    for row in range(buffer.shape[0]):
        scores, threshold, count = buffer[row], thresholds[row], counts[row]
        cursor = cursors[row]
        while cursor < starts[row + 1] and left_out[cursor] < first + width:
            scores[left_out[cursor] - first] = -np.inf
            cursor += 1
        cursors[row] = cursor
        bits = scores.view(np.int32)
        for start in range(0, width, CHUNK):
            above = False
            for column in range(start, start + CHUNK):
                above |= scores[column] > threshold
            if not above:
                continue
            for column in range(start, start + CHUNK):
                if scores[column] > threshold:
                    order = np.int64(bits[column])
                    if order < 0:
                        order = order ^ 0x7FFFFFFF
                    kept[row, count] = ((-1 - order) << 32) | (first + column)
                    count += 1
        counts[row] = count


def _scores_of(keys: np.ndarray) -> np.ndarray:
    """float32 scores of keys."""
    bits = (-1 - (keys >> 32)).astype(np.int32)
    return np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits).view(np.float32)


def _decoded(keys: np.ndarray, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    found = keys != EMPTY
    picked = np.where(found, keys & 0xFFFFFFFF, 0).astype(np.int32)
    if rows is not None and len(rows):
        picked = rows[picked]
    return np.where(found, picked, -1).astype(np.int32), np.where(found, _scores_of(keys), -np.inf).astype(np.float32)


def _finish(results: Iterable[None]) -> None:
    """Wait for all blocks; the first error is raised."""
    for _ in results:
        pass
