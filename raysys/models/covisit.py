"""Co-visitation: which items follow which, counted; cheap, strong, explainable, updatable by the event.

Raw counts are kept and normalised into a matrix of neighbours, so that adding
events one by one gives what counting them all at once would have given.

Legend: B queries, N items, E events, P pairs.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
from scipy import sparse

from raysys.errors import SchemaError
from raysys.models.base import Arrays, Meta
from raysys.models.counting import fade, weights_of
from raysys.models.neighbours import FadedEvents, faded_events, history_of, strongest, summed_rows
from raysys.prepare.dataset import Sequences
from raysys.queries import Queries

PAIRS_AT_ONCE = 8_000_000
"""Pairs held before they are summed into the counts; about 100 MB."""


@dataclass(frozen=True)
class CovisitConfig:
    """How pairs are counted, normalised and asked.

    Defaults: chosen on the validation part of Amazon Beauty and Toys.
    """

    window: int = 50
    """Two events of a user at most this many events apart are a pair, in events."""
    distance_exponent: float = 0.5
    """A pair weighs 1 / distance to this power, dimensionless."""
    backward: float = 0.25
    """Weight of "candidate came before the history item", relative to "came after", dimensionless."""
    history_exponent: float = 0.3
    """Scores are divided by the history item's popularity to this power, dimensionless."""
    candidate_exponent: float = 0.2
    """Scores are divided by the candidate's popularity to this power, dimensionless."""
    session_decay: float = 0.7
    """Weight of a history item relative to the one after it, in (0, 1]."""
    max_history: int = 50
    """Last events of a history that are looked up, in events."""
    neighbours: int = 500
    """Neighbours kept an item for scoring, by normalised score, in items."""
    counted_neighbours: int = 2000
    """Successors kept an item with their raw counts, in items; bounds the memory of the learner."""
    half_life_days: float | None = None
    """A pair counts half after so many days before the newest event; None counts all alike. Off where time is ordinal."""

    def __post_init__(self) -> None:
        if not 0 < self.session_decay <= 1:
            raise ValueError(f"session_decay: expected a number in (0, 1], got {self.session_decay}")
        for name in ("window", "max_history", "neighbours", "counted_neighbours"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.half_life_days is not None and self.half_life_days <= 0:
            raise ValueError(f"half_life_days: expected a positive number or none, got {self.half_life_days}")


class Covisitation:
    """Directional, distance-weighted item-to-item co-occurrence (a Retriever).

    Args:
        counts: (N, N) CSR float32; [i, j] is the weight of all pairs "i, later j".
        occurrences: (N,) float32 weight of all events of an item.
        config: settings.
        event_weights: (T,) float32 weight by event code; codes beyond it and code 0 weigh 1.
        watermark: newest event counted, UTC epoch seconds; the time that decay refers to.
        decay: False where time is ordinal.
    """

    name = "covisit"

    def __init__(
        self,
        counts: sparse.csr_array,
        occurrences: np.ndarray,
        config: CovisitConfig,
        *,
        event_weights: np.ndarray,
        watermark: int,
        decay: bool,
    ):
        self.config = config
        self.event_weights = event_weights
        self._counts, self._occurrences = counts, occurrences
        self._watermark, self._decay = watermark, decay

    @property
    def num_items(self) -> int:
        """N."""
        return len(self._occurrences)

    @classmethod
    def fit(
        cls,
        sequences: Sequences,
        num_items: int,
        config: CovisitConfig | None = None,
        *,
        event_weights: Sequence[float] | np.ndarray = (),
        ordinal_time: bool = False,
    ) -> "Covisitation":
        """Count the pairs of all events given (pass the training part).

        Args:
            sequences: U histories of known items.
            num_items: N.
            config: settings; defaults when None.
            event_weights: weight by event code; missing codes weigh 1, events of weight 0 are left out.
            ordinal_time: True where timestamps carry order only; decay is then off.
        """
        empty = cls.empty(num_items, config, event_weights=event_weights, ordinal_time=ordinal_time)
        return empty.update(sequences, np.ones(len(sequences.items), bool))

    @classmethod
    def empty(
        cls,
        num_items: int,
        config: CovisitConfig | None = None,
        *,
        event_weights: Sequence[float] | np.ndarray = (),
        ordinal_time: bool = False,
    ) -> "Covisitation":
        """A model that has counted nothing; arguments as for `fit`."""
        config = config or CovisitConfig()
        return cls(
            sparse.csr_array((num_items, num_items), dtype=np.float32),
            np.zeros(num_items, np.float32),
            config,
            event_weights=np.asarray(event_weights, np.float32),
            watermark=0,
            decay=config.half_life_days is not None and not ordinal_time,
        )

    def emptied(self) -> "Covisitation":
        """A model of the same settings that has counted nothing."""
        empty = type(self).empty(self.num_items, self.config, event_weights=self.event_weights)
        empty._decay = self._decay
        return empty

    def update(self, sequences: Sequences, new: np.ndarray, *, num_items: int | None = None) -> "Covisitation":
        """The model with the pairs of new events added, as if fitted on all of them.

        Equal to a refit up to the order of float sums, provided the new events end their users' histories (or are all of them)
        and no row of counts has been cut at `counted_neighbours`: what is cut is forgotten, and counts from nothing if it comes again.

        Args:
            sequences: histories of the users concerned, old events included (at least the last `window` of each).
            new: (E,) bool, the events that are not counted yet.
            num_items: N after the update, when the catalogue has grown.

        Raises:
            SchemaError: the catalogue would shrink.
        """
        num_items = self.num_items if num_items is None else num_items
        if num_items < self.num_items:
            raise SchemaError(f"covisit: expected at least the {self.num_items} items fitted, got {num_items}; fit again instead")
        watermark = max(self._watermark, int(sequences.times[new].max())) if new.any() else self._watermark
        kept = np.float32(fade(watermark - self._watermark, self.config.half_life_days) if self._decay else 1.0)
        counts, occurrences = _count(sequences, new, num_items, self.config, self.event_weights, watermark if self._decay else None)
        old = self._counts
        if num_items > self.num_items:
            old = old.copy()
            old.resize((num_items, num_items))
        occurrences[: self.num_items] += kept * self._occurrences
        return Covisitation(
            _largest((old if kept == 1 else old * kept) + counts, self.config.counted_neighbours),
            occurrences,
            self.config,
            event_weights=self.event_weights,
            watermark=watermark,
            decay=self._decay,
        )

    def scores(self, queries: Queries) -> np.ndarray:
        """(B, N) float32 `sums`, zeros spelt out."""
        return summed_rows(self._events(queries), self.matrix)

    def sums(self, queries: Queries) -> sparse.csr_array:
        """(B, N) CSR float32 sum over the history of decayed similarity; 0 where nothing is known."""
        return self._history(queries) @ self.matrix

    def contributions(self, query: Queries, items: np.ndarray) -> np.ndarray:
        """The history item that contributed most to each item's score.

        Args:
            query: B = 1.
            items: (K,) item rows.

        Returns:
            (K,) int32 item rows of the history, -1 where no history item leads to the item.
        """
        return strongest(self._history(query), self.matrix, items)

    def similar(self, item: int) -> np.ndarray:
        """(N,) float32 similarity of every item to one item."""
        return self.matrix[[item]].toarray()[0]

    def to_arrays(self) -> tuple[Arrays, Meta]:
        """Counts, not the matrix of neighbours, which follows from them."""
        arrays = {
            "indptr": self._counts.indptr.astype(np.int64),
            "indices": self._counts.indices.astype(np.int32),
            "counts": self._counts.data,
            "occurrences": self._occurrences,
            "event_weights": self.event_weights,
        }
        return arrays, {"config": asdict(self.config), "watermark": self._watermark, "decay": self._decay}

    @classmethod
    def from_arrays(cls, arrays: Arrays, meta: Meta) -> "Covisitation":
        """The model back from what `to_arrays` gave."""
        num_items = len(arrays["occurrences"])
        counts = sparse.csr_array((arrays["counts"], arrays["indices"], arrays["indptr"]), shape=(num_items, num_items))
        return cls(
            counts,
            arrays["occurrences"],
            CovisitConfig(**meta["config"]),
            event_weights=arrays["event_weights"],
            watermark=meta["watermark"],
            decay=meta["decay"],
        )

    def _history(self, queries: Queries) -> sparse.csr_array:
        """(B, N) CSR float32 weight of each history item: event weight, faded by its place from the end."""
        return history_of(self._events(queries), self.num_items)

    def _events(self, queries: Queries) -> FadedEvents:
        weights = weights_of(queries.events, self.event_weights)
        return faded_events(queries, weights, decay=self.config.session_decay, longest=self.config.max_history)

    @cached_property
    def matrix(self) -> sparse.csr_array:
        """(N, N) CSR float32 similarity [history item, candidate], the largest `neighbours` a row; made when it is first asked for."""
        config = self.config
        both = (self._counts + np.float32(config.backward) * self._counts.T.tocsr()).tocsr()
        popularity = np.maximum(self._occurrences, 1e-6)
        rows = np.repeat(np.arange(self.num_items), np.diff(both.indptr))
        both.data = (
            both.data * (popularity**-config.history_exponent)[rows] * (popularity**-config.candidate_exponent)[both.indices]
        ).astype(np.float32)
        both.setdiag(0)
        both.eliminate_zeros()
        return _largest(both, config.neighbours)


def _count(
    sequences: Sequences, new: np.ndarray, num_items: int, config: CovisitConfig, event_weights: np.ndarray, watermark: int | None
) -> tuple[sparse.csr_array, np.ndarray]:
    """Weights of the pairs whose later event is new, and of the new events by item.

    Args:
        watermark: time that decay refers to, epoch seconds; None for no decay.

    Returns:
        (N, N) CSR float32 and (N,) float32.
    """
    weights = weights_of(sequences.events, event_weights)
    keep = weights > 0
    rows, items, weights, new, times = (array[keep] for array in (sequences.rows, sequences.items, weights, new, sequences.times))
    fades = np.ones(len(items), np.float32) if watermark is None else fade(watermark - times, config.half_life_days).astype(np.float32)
    counts = sparse.csr_array((num_items, num_items), dtype=np.float32)
    pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    held = 0
    longest = int(np.bincount(rows).max()) if len(rows) else 0
    for distance in range(1, min(config.window, longest - 1) + 1):
        later = np.flatnonzero((rows[distance:] == rows[:-distance]) & new[distance:]) + distance
        earlier = later - distance
        closeness = np.float32(distance**-config.distance_exponent)
        pending.append((items[earlier], items[later], weights[earlier] * weights[later] * fades[later] * closeness))
        held += len(later)
        if held > PAIRS_AT_ONCE:
            counts = counts + _summed(pending, num_items)
            pending, held = [], 0
    counts = counts + _summed(pending, num_items)
    occurrences = np.bincount(items[new], weights=(weights * fades)[new], minlength=num_items).astype(np.float32)
    return counts, occurrences


def _summed(pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]], num_items: int) -> sparse.csr_array:
    if not pairs:
        return sparse.csr_array((num_items, num_items), dtype=np.float32)
    first, second, weights = (np.concatenate(part) for part in zip(*pairs))
    return sparse.coo_array((weights, (first, second)), shape=(num_items, num_items)).tocsr()


def _largest(matrix: sparse.csr_array, k: int) -> sparse.csr_array:
    """The k largest entries of each row, columns ascending; ties by lower column."""
    lengths = np.diff(matrix.indptr)
    if lengths.max(initial=0) > k:
        keep = np.ones(matrix.nnz, bool)
        # Only rows that are too long are sorted: that takes several times the memory of what is sorted.
        entries = np.flatnonzero(np.repeat(lengths > k, lengths))
        rows = np.repeat(np.arange(matrix.shape[0]), lengths)[entries]
        order = np.lexsort((matrix.indices[entries], -matrix.data[entries], rows))
        long = lengths[lengths > k]
        rank = np.arange(len(entries)) - np.repeat(np.cumsum(long) - long, long)
        keep[entries[order[rank >= k]]] = False
        indptr = np.concatenate([[0], np.cumsum(np.minimum(lengths, k))])
        matrix = sparse.csr_array((matrix.data[keep], matrix.indices[keep], indptr), shape=matrix.shape)
    matrix.sort_indices()
    return matrix
