"""Item vectors in memory or in a mapped file, at full size, half of it (bf16) or a quarter (int8).

int8 has one scale a row: the largest component becomes 127. It keeps the order
of an item's components whatever its norm, and costs N floats. Both smaller forms
round once, when they are made; dot products are then computed in float32.

Legend: N items, D dimension.
"""

from typing import Protocol

import numpy as np

from raysys.errors import SchemaError

STORAGES = ("float32", "bf16", "int8")


class Vectors(Protocol):
    """(N, D) vectors that a search reads in blocks."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D)."""

    def block(self, first: int, stop: int) -> np.ndarray:
        """(stop - first, D) float32."""

    def take(self, rows: np.ndarray) -> np.ndarray:
        """(len(rows), D) float32."""

    def arrays(self) -> dict[str, np.ndarray]:
        """What a file keeps, by name."""


class Float32Vectors:
    """(N, D) float32 as they are."""

    def __init__(self, values: np.ndarray):
        self.values = values

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D)."""
        return self.values.shape

    def block(self, first: int, stop: int) -> np.ndarray:
        """A view."""
        return self.values[first:stop]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """A copy."""
        return self.values[rows]

    def arrays(self) -> dict[str, np.ndarray]:
        """`values`."""
        return {"values": self.values}


class Bf16Vectors:
    """The upper half of each float32, as (N, D) uint16: 8 bits of mantissa."""

    def __init__(self, values: np.ndarray):
        self.values = values

    @classmethod
    def of(cls, vectors: np.ndarray) -> "Bf16Vectors":
        """Round (N, D) float32 to the nearest, ties to even."""
        bits = np.ascontiguousarray(vectors, np.float32).view(np.uint32)
        return cls(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16))

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D)."""
        return self.values.shape

    def block(self, first: int, stop: int) -> np.ndarray:
        """Decoded."""
        return (self.values[first:stop].astype(np.uint32) << 16).view(np.float32)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Decoded."""
        return (self.values[rows].astype(np.uint32) << 16).view(np.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        """`values`."""
        return {"values": self.values}


class Int8Vectors:
    """(N, D) int8 and one float32 scale a row."""

    def __init__(self, values: np.ndarray, scales: np.ndarray):
        self.values, self.scales = values, scales

    @classmethod
    def of(cls, vectors: np.ndarray) -> "Int8Vectors":
        """Round (N, D) float32 to the nearest of 255 steps a row."""
        scales = (np.abs(vectors).max(axis=1, initial=0.0) / 127).astype(np.float32)
        steps = vectors / np.where(scales > 0, scales, 1.0)[:, None]
        return cls(np.rint(steps).clip(-127, 127).astype(np.int8), scales)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D)."""
        return self.values.shape

    def block(self, first: int, stop: int) -> np.ndarray:
        """Decoded."""
        return self.values[first:stop] * self.scales[first:stop, None]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Decoded."""
        return self.values[rows] * self.scales[rows, None]

    def arrays(self) -> dict[str, np.ndarray]:
        """`values`, `scales`."""
        return {"values": self.values, "scales": self.scales}


def stored_as(storage: str, vectors: np.ndarray) -> Vectors:
    """(N, D) float32 vectors in the given storage.

    Raises:
        SchemaError: they are no finite matrix.
    """
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise SchemaError(f"item vectors: expected (N, D) finite numbers, got NaN, infinity or another shape: {vectors.shape}")
    vectors = np.ascontiguousarray(vectors, np.float32)
    return Bf16Vectors.of(vectors) if storage == "bf16" else Int8Vectors.of(vectors) if storage == "int8" else Float32Vectors(vectors)


def from_arrays(storage: str, arrays: dict[str, np.ndarray]) -> Vectors:
    """Vectors over arrays that `arrays()` gave, mapped or not."""
    return {"float32": Float32Vectors, "bf16": Bf16Vectors, "int8": Int8Vectors}[storage](**arrays)
