"""Settings of retrieval over large catalogues."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PoolConfig:
    """When a few items a source are looked at instead of all, and how many."""

    items_from: int = 50_000
    """Items from which retrieval takes pools; below, every source scores every item. 0 never takes pools."""
    size: int = 500
    """Items that each source puts into the pool of a query; more where a request asks for more."""
    sample: int = 8192
    """Items drawn once for all queries that stand for those outside the pool in a normaliser."""
    target_recall: float = 0.95
    """Share of the true `size` best that an index must find on histories of the bundle."""

    def __post_init__(self) -> None:
        if self.items_from < 0:
            raise ValueError(f"expected items_from of at least 0, got {self.items_from}")
        for name in ("size", "sample"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if not 0 < self.target_recall <= 1:
            raise ValueError(f"expected target_recall in (0, 1], got {self.target_recall}")

    def applies(self, num_items: int) -> bool:
        """Whether a catalogue of this size is large."""
        return 0 < self.items_from <= num_items

    @property
    def few(self) -> int:
        """So many allowed items or fewer are all scored: a search would cost more than it saves."""
        return 4 * self.size
