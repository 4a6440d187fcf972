"""Approximate top-k by dot product on Faiss: inverted lists of 8-bit codes, memory-mapped.

Items are clustered into about 4 sqrt(N) lists; a query reads the codes of the
few lists whose centres fit it best. At D = 64 an item takes 72 bytes, code and
row, against 256 in float32; graphs (HNSW) keep links on top of the vectors and
do not fit a third. How many lists are read is not guessed: `build` measures it
on sample queries against exact search.

Knows vectors and rows. Scores are dot products with decoded codes, so their
last digits differ from exact ones; items that tie at the cut appear in any choice.

Source: Jegou, Douze, Schmid, "Product quantization for nearest neighbor search", PAMI 2011 (the inverted file); https://faiss.ai.

Legend: B queries, N items, D dimension, k results.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import numpy as np

from raysys.index.exact import exact_top_k

TRAIN_PER_LIST, TRAIN_ROUNDS = 50, 10
"""Vectors a centre is learned from, and k-means rounds. Faiss warns below 39 and uses at most 256; few keep building fast."""
FILTER_SHARES = (0.5, 0.1, 0.01)
"""Random filters that keep this share are tuned for too: the k best allowed items lie further out than the k best of all, and how much
further depends on the vectors (the same share of clustered ones took 1 list without a filter and hundreds with one)."""
WIDE = 0.9
"""A filter that keeps this share or more, such as a few deleted items, counts as none."""
SAMPLE_QUERIES = 256
"""Queries that recall is measured on: its standard error is below .005 where k is 100."""


@dataclass(frozen=True)
class Tuned:
    """What `build` found."""

    lists: int
    probes: int
    """Lists that a query reads."""
    recall: float
    """Share of the true k best found on the sample queries."""
    filtered: list[tuple[float, int]]
    """For each of FILTER_SHARES, the lists that a query reads when a filter keeps that share."""


def build(vectors: np.ndarray, queries: np.ndarray, *, k: int, target_recall: float, seed: int = 0) -> tuple[np.ndarray, Tuned]:
    """Cluster, encode and tune.

    Args:
        vectors: (N, D) float32, N >= 1.
        queries: (B, D) float32 like those that will come; at most SAMPLE_QUERIES of them, spread evenly, are used.
        k: results a query at which recall counts.
        target_recall: in (0, 1].

    Returns:
        The index as Faiss writes it, uint8, and what was found. Where even all lists do not reach the target, all are probed
        and the recall says so.
    """
    lists = min(1 << round(math.log2(4 * math.sqrt(len(vectors)))), max(1, len(vectors) // TRAIN_PER_LIST))
    index = faiss.index_factory(vectors.shape[1], f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid, index.cp.niter, index.cp.seed = TRAIN_PER_LIST, TRAIN_ROUNDS, seed
    index.cp.min_points_per_centroid = 1
    index.train(vectors)
    index.add(vectors)
    sample = np.ascontiguousarray(queries[:: max(1, len(queries) // SAMPLE_QUERIES)][:SAMPLE_QUERIES], np.float32)
    probes, recall = _fewest_probes(index, sample, exact_top_k(sample, vectors, k)[0], target_recall)
    filtered, rng = [], np.random.default_rng(seed)
    for share in FILTER_SHARES:
        allowed = rng.random(len(vectors)) < share
        expected = exact_top_k(sample, vectors, k, allowed=allowed)[0]
        filtered.append((share, _fewest_probes(index, sample, expected, target_recall, _selector(allowed))[0]))
    return faiss.serialize_index(index), Tuned(lists, probes, recall, filtered)


def _selector(allowed: np.ndarray) -> faiss.IDSelector:
    return faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))


def _fewest_probes(
    index: faiss.IndexIVF, queries: np.ndarray, expected: np.ndarray, target: float, selector: faiss.IDSelector | None = None
) -> tuple[int, float]:
    """The smallest number of lists whose recall reaches the target, by doubling and then halving the gap."""

    def recall(probes: int) -> float:
        found = index.search(queries, expected.shape[1], params=faiss.SearchParametersIVF(nprobe=probes, sel=selector))[1]
        hits = sum(len(np.intersect1d(a[a >= 0], b[b >= 0])) for a, b in zip(found, expected, strict=True))
        return hits / max(1, int((expected >= 0).sum()))

    enough, reached = 1, recall(1)
    while reached < target and enough < index.nlist:
        enough = min(2 * enough, index.nlist)
        reached = recall(enough)
    short = enough // 2
    while enough - short > max(1, enough // 16):
        middle = (enough + short) // 2
        found = recall(middle)
        if found >= target:
            enough, reached = middle, found
        else:
            short = middle
    return enough, reached


class InvertedLists:
    """A mapped index; processes that map one file share its pages.

    Raises:
        RuntimeError: from Faiss, where the file is not one of its indexes.
    """

    def __init__(self, path: str, probes: int, filtered: Sequence[tuple[float, int]]):
        self._index = faiss.read_index(path, faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        # By default 32 threads are started for every search, to read ahead on disk; here the pages are in memory.
        faiss.downcast_InvertedLists(self._index.invlists).prefetch_nthread = 0
        self.probes = self._index.nprobe = probes
        self.filtered = filtered
        # Touches every page once, so that the first users do not wait for that: about 10 ms at a million items.
        self._search(np.zeros((1, self._index.d), np.float32), 1, self._index.nlist, None)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return self._index.ntotal, self._index.d

    def top_k(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k best allowed items; fewer only where fewer are allowed.

        Below the smallest tuned share all lists are read: scanning the bitmap is fast, and the answer exact but for the rounding of
        codes. Filters that go along with the vectors, such as a category, may find more or less than the random ones of tuning.

        Args:
            queries: (B, D) float32.
            k: cut-off.
            allowed: (N,) bool; all when None.

        Returns:
            (B, k) int64 rows, -1 padded, and (B, k) float32 scores, -inf there; best first.
        """
        if allowed is None and k <= self.shape[0]:  # nearly every call, and short enough that a few array operations would show
            scores, rows = self._index.search(queries, k)
            if len(rows) and rows[:, -1].min() >= 0:
                return rows, scores
        count = self.shape[0] if allowed is None else int(np.count_nonzero(allowed))
        rows, scores = np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -np.inf, np.float32)
        reachable = min(k, count)
        if reachable == 0 or len(queries) == 0:
            return rows, scores
        selector = None if allowed is None else _selector(allowed)
        probes = self._probes(count / self.shape[0])
        scores[:, :reachable], rows[:, :reachable] = self._search(queries, reachable, probes, selector)
        short = rows[:, reachable - 1] < 0
        if short.any():  # the lists nearest to these queries hold too few
            scores[short, :reachable], rows[short, :reachable] = self._search(queries[short], reachable, self._index.nlist, selector)
        scores[rows < 0] = -np.inf
        return rows, scores

    def _probes(self, share: float) -> int:
        """Lists to read when this share is allowed."""
        if share >= WIDE:
            return self.probes
        return next((max(self.probes, probes) for tuned, probes in self.filtered if share >= tuned), self._index.nlist)

    def _search(self, queries: np.ndarray, k: int, probes: int, selector: faiss.IDSelector | None) -> tuple[np.ndarray, np.ndarray]:
        return self._index.search(queries, k, params=faiss.SearchParametersIVF(nprobe=probes, sel=selector))
