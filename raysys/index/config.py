"""Settings of an item index."""

from dataclasses import dataclass

from raysys.index.vectors import STORAGES


@dataclass(frozen=True)
class IndexConfig:
    """How item vectors are searched."""

    kind: str = "auto"
    """`exact`, `approximate`, or `auto`: exact below `approximate_from` items."""
    approximate_from: int = 50_000
    """Items from which `auto` is approximate: there an exact search of one query takes about a millisecond of a core."""
    storage: str = "float32"
    """How exact search keeps vectors: `float32`, `bf16` (half the memory) or `int8` (a quarter). Approximate search always keeps 8 bits."""
    target_recall: float = 0.97
    """Share of the true k best that approximate search must find on sample queries; the fewest lists that do are probed."""
    k: int = 100
    """Results a query for which the recall is measured."""
    max_fresh: int = 10_000
    """Most items inserted since the index was built; they are searched exactly, so each costs time until the next build."""

    def __post_init__(self) -> None:
        if self.kind not in ("auto", "exact", "approximate"):
            raise ValueError(f"expected kind auto, exact or approximate, got {self.kind!r}")
        if self.storage not in STORAGES:
            raise ValueError(f"expected storage of {', '.join(STORAGES)}, got {self.storage!r}")
        if not 0 < self.target_recall <= 1:
            raise ValueError(f"expected target_recall in (0, 1], got {self.target_recall}")
        for name in ("approximate_from", "k", "max_fresh"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")

    def chosen(self, num_items: int) -> str:
        """`exact` or `approximate` for a catalogue of this size."""
        if self.kind != "auto":
            return self.kind
        return "exact" if num_items < self.approximate_from else "approximate"
