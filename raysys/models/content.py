"""Content neighbours: items whose text is close to what the user had last.

Legend: B queries, N items, L events, D content dimension.
"""

from dataclasses import asdict, dataclass

import numpy as np
from scipy import sparse

from raysys.models.base import Arrays, Meta
from raysys.queries import Queries


@dataclass(frozen=True)
class ContentConfig:
    """How a profile is made."""

    decay: float = 0.6
    """Weight of a history item relative to the one after it, in (0, 1]."""
    max_history: int = 20
    """Last events that make the profile, in events."""

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay: expected a number in (0, 1], got {self.decay}")


class ContentNeighbours:
    """Cosine of item vectors with the decayed mean of the history's vectors (a Retriever).

    The mean over the catalogue is taken out of the vectors first: static text
    vectors share a large common direction that says nothing about an item.

    Args:
        vectors: (N, D) float32 centred unit vectors; zero where an item has no text.
        mean: (R,) float32 what was taken out of the encoder's output; `transform` does it for new items.
        config: settings.
        axes: (R, D) float32 orthonormal directions that are left of the encoder's R; None where all are.
    """

    name = "content"
    evidence = None
    excludes_history = False

    def __init__(self, vectors: np.ndarray, mean: np.ndarray, config: ContentConfig | None = None, axes: np.ndarray | None = None):
        self.item_vectors, self.mean, self.config = vectors.astype(np.float32), mean.astype(np.float32), config or ContentConfig()
        self.axes = axes

    @classmethod
    def fit(cls, raw: np.ndarray, config: ContentConfig | None = None) -> "ContentNeighbours":
        """Centre encoder output.

        Args:
            raw: (N, D) float32 unit vectors of the encoder, zero for items without text.
            config: settings.
        """
        filled = np.any(raw != 0, axis=1)
        mean = raw[filled].mean(axis=0) if filled.any() else np.zeros(raw.shape[1], np.float32)
        return cls(_centred(raw, mean), mean, config)

    def transform(self, raw: np.ndarray) -> np.ndarray:
        """(M, D) float32 unit vectors of (M, R) encoder output of new items, in the space of `item_vectors`."""
        centred = _centred(raw, self.mean)
        return centred if self.axes is None else projected(centred, self.axes)

    def with_vectors(self, vectors: np.ndarray) -> "ContentNeighbours":
        """The same space with other items, (M, D) float32."""
        return ContentNeighbours(vectors, self.mean, self.config, self.axes)

    def narrowed(self, axes: np.ndarray) -> "ContentNeighbours":
        """In fewer dimensions; (D, D') orthonormal axes of the present ones."""
        whole = axes if self.axes is None else self.axes @ axes
        return ContentNeighbours(projected(self.item_vectors, axes), self.mean, self.config, whole)

    def user_vectors(self, queries: Queries) -> np.ndarray:
        """(B, D) float32 unit profile of each history; zero without content."""
        from_end = queries.lengths[queries.rows] - 1 - (np.arange(len(queries.items)) - queries.indptr[queries.rows])
        weights = np.where(from_end < self.config.max_history, self.config.decay**from_end, 0.0).astype(np.float32)
        history = sparse.csr_array((weights, queries.items, queries.indptr), shape=(len(queries), len(self.item_vectors)))
        return _unit(np.asarray(history @ self.item_vectors, np.float32))

    def scores(self, queries: Queries) -> np.ndarray:
        """(B, N) float32 cosine in [-1, 1]; zero for an empty history."""
        return self.user_vectors(queries) @ self.item_vectors.T

    def to_arrays(self) -> tuple[Arrays, Meta]:
        """Vectors in half precision: a cosine needs three digits, the file halves."""
        arrays: Arrays = {"vectors": self.item_vectors.astype(np.float16), "mean": self.mean}
        if self.axes is not None:
            arrays["axes"] = self.axes
        return arrays, {"config": asdict(self.config)}

    @classmethod
    def from_arrays(cls, arrays: Arrays, meta: Meta) -> "ContentNeighbours":
        """The model back from `to_arrays`."""
        return cls(arrays["vectors"].astype(np.float32), arrays["mean"], ContentConfig(**meta["config"]), arrays.get("axes"))


def projected(vectors: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """(M, D') float32 unit vectors of (M, D) in the directions of (D, D') orthonormal axes; zero stays zero."""
    return _unit(vectors @ axes).astype(np.float32)


def _centred(raw: np.ndarray, mean: np.ndarray) -> np.ndarray:
    filled = np.any(raw != 0, axis=1, keepdims=True)
    return _unit(np.where(filled, raw - mean, 0.0).astype(np.float32))


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 1e-6, lengths, 1.0)
