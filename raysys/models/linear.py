"""Linear item-to-item model: the ridge regression of what comes next on a faded history, solved in closed form.

Where co-visitation counts pairs one by one, the regression explains them
jointly: an item gets no credit for what another item of the same history
already explains. Needs an N x N matrix while it is fitted, so it is for
catalogues where that fits (`LinearConfig.max_items`).

Legend: B queries, N items, E events, K neighbours.
Source: Choi et al., "Session-aware Linear Item-Item Models" (SLIT), WWW 2021; the penalty that grows with an item's
own weight is that of Steck, "Autoencoders that don't overfit towards the Identity" (EDLAE), NeurIPS 2020.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import linalg, sparse

from raysys.models.base import Arrays, Meta
from raysys.models.neighbours import FadedEvents, faded_events, history_of, strongest, summed_rows
from raysys.prepare.dataset import Sequences
from raysys.queries import Queries


@dataclass(frozen=True)
class LinearConfig:
    """How the regression is fitted and asked."""

    decay: float = 0.8
    """Weight of a history item relative to the one after it, in (0, 1)."""
    window: int = 50
    """Two events of a user at most this many events apart are regressed on each other, in events."""
    ridge: float = 1.0
    """Penalty of every item alike, in events."""
    own_ridge: float = 1.0
    """Penalty of an item in units of its own weight in the data, dimensionless: dropping history items at random has this effect."""
    neighbours: int = 500
    """Largest coefficients kept of each history item, of either sign."""
    max_items: int = 15_000
    """Larger catalogues get no such model: while it is fitted it takes 8 bytes times the square of the items (1.8 GB at 15,000), and
    time that grows with the cube (about a minute of one core at 12,000)."""

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1:
            raise ValueError(f"decay: expected a number in (0, 1), got {self.decay}")
        for name in ("window", "neighbours", "max_items"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.ridge <= 0 or self.own_ridge < 0:
            raise ValueError(f"expected ridge > 0 and own_ridge >= 0, got {self.ridge} and {self.own_ridge}")


class Linear:
    """Ridge regression of the next item on the faded history (a Retriever).

    Args:
        matrix: (N, N) CSR float32 coefficients [history item, candidate].
        config: settings.
        event_weights: (T,) float32 weight by event code; events of weight 0 are not looked at, all others count alike.
    """

    name = "linear"

    def __init__(self, matrix: sparse.csr_array, config: LinearConfig, event_weights: np.ndarray):
        self.matrix, self.config, self.event_weights = matrix, config, event_weights

    @classmethod
    def fit(
        cls,
        pieces: Iterable[Sequences],
        num_items: int,
        config: LinearConfig | None = None,
        *,
        event_weights: Sequence[float] | np.ndarray = (),
    ) -> "Linear":
        """Solve the regression on all events given (pass the training part).

        Args:
            pieces: histories of known items, each user's in one of them.
            num_items: N, at most `max_items`.
            config: settings; defaults when None.
            event_weights: weight by event code; missing codes weigh 1.

        Raises:
            ValueError: the catalogue is larger than the settings allow.
        """
        config = config or LinearConfig()
        if num_items > config.max_items:
            raise ValueError(f"linear: expected at most max_items ({config.max_items:,}) items, got {num_items:,}")
        weights = np.asarray(event_weights, np.float32)
        # Fortran order, which LAPACK overwrites without a copy.
        gram, cross = (np.zeros((num_items, num_items), np.float32, order="F") for _ in range(2))
        for sequences in pieces:
            keep = _counts(sequences.events, weights)
            _add_moments(gram, cross, sequences.rows[keep], sequences.items[keep], config)
        diagonal = gram.diagonal().copy()
        gram[np.diag_indices(num_items)] = diagonal * (1 + config.own_ridge) + config.ridge
        factor = linalg.cho_factor(gram, lower=True, overwrite_a=True, check_finite=False)
        coefficients = linalg.cho_solve(factor, cross, overwrite_b=True, check_finite=False)
        np.fill_diagonal(coefficients, 0.0)
        return cls(_largest(coefficients, config.neighbours), config, weights)

    def grown(self, num_items: int) -> "Linear":
        """The model with rows and columns for more items, of which it says nothing."""
        matrix = self.matrix.copy()
        matrix.resize((num_items, num_items))
        return Linear(matrix, self.config, self.event_weights)

    def scores(self, queries: Queries) -> np.ndarray:
        """(B, N) float32 `sums`, zeros spelt out."""
        return summed_rows(self._events(queries), self.matrix)

    def sums(self, queries: Queries) -> sparse.csr_array:
        """(B, N) CSR float32 sum over the history of faded coefficients; 0 where nothing is known."""
        return self._history(queries) @ self.matrix

    def contributions(self, query: Queries, items: np.ndarray) -> np.ndarray:
        """The history item that contributed most to each item's score.

        Args:
            query: B = 1.
            items: (K,) item rows.

        Returns:
            (K,) int32 item rows of the history, -1 where no history item speaks for the item.
        """
        return strongest(self._history(query), self.matrix, items)

    def to_arrays(self) -> tuple[Arrays, Meta]:
        """The coefficients that were kept."""
        arrays = {
            "indptr": self.matrix.indptr.astype(np.int64),
            "indices": self.matrix.indices.astype(np.int32),
            "coefficients": self.matrix.data,
            "event_weights": self.event_weights,
        }
        return arrays, {"config": asdict(self.config)}

    @classmethod
    def from_arrays(cls, arrays: Arrays, meta: Meta) -> "Linear":
        """The model back from what `to_arrays` gave."""
        num_items = len(arrays["indptr"]) - 1
        matrix = sparse.csr_array((arrays["coefficients"], arrays["indices"], arrays["indptr"]), shape=(num_items, num_items))
        return cls(matrix, LinearConfig(**meta["config"]), arrays["event_weights"])

    def _history(self, queries: Queries) -> sparse.csr_array:
        """(B, N) CSR float32 weight of each history item, faded by its place from the end."""
        return history_of(self._events(queries), self.matrix.shape[0])

    def _events(self, queries: Queries) -> FadedEvents:
        weights = _counts(queries.events, self.event_weights).astype(np.float32)
        return faded_events(queries, weights, decay=self.config.decay, longest=self.config.window)


def _add_moments(gram: np.ndarray, cross: np.ndarray, rows: np.ndarray, items: np.ndarray, config: LinearConfig) -> None:
    """Add what the regression needs to know of some users, from pairs of events instead of positions.

    At position t the history is x_t = sum over a <= t of decay^(t-a) e(i_a), the target y_t = e(i_(t+1)). Summed over the positions
    that have a next event,

        x x' [i_a, i_b] = decay^(b-a) s_b,  s_b = 1 + decay^2 s_(b+1), 0 at the last event;
        x y' [i_a, i_b] = decay^(b-a-1).

    Args:
        gram, cross: (N, N) float32 in Fortran order, sums of x x' and of x y' [history item, target], added to.
        rows: (E,) user of each event, ascending. items: (E,) int32.
        config: decays and window.
    """
    num_items = len(gram)
    lengths = np.bincount(rows) if len(rows) else np.zeros(1, np.int64)
    from_end = np.cumsum(lengths)[rows] - 1 - np.arange(len(rows))
    decay = config.decay
    left = ((1 - decay ** (2.0 * from_end)) / (1 - decay**2)).astype(np.float32)  # s_b in closed form
    flat_gram, flat_cross = gram.reshape(-1, order="F"), cross.reshape(-1, order="F")
    np.add.at(flat_gram, items.astype(np.int64) * (num_items + 1), left)
    for distance in range(1, min(config.window, int(lengths.max()) - 1) + 1):
        later = np.flatnonzero(rows[distance:] == rows[:-distance]) + distance
        first, second = items[later - distance].astype(np.int64), items[later].astype(np.int64)
        weight = np.float32(decay**distance) * left[later]
        np.add.at(flat_gram, first * num_items + second, weight)
        np.add.at(flat_gram, second * num_items + first, weight)
        np.add.at(flat_cross, second * num_items + first, np.float32(decay ** (distance - 1)))


def _counts(events: np.ndarray, event_weights: np.ndarray) -> np.ndarray:
    """(E,) bool, events that are looked at."""
    table = np.ones(128, bool)
    table[: len(event_weights)] = np.asarray(event_weights) > 0
    return table[events]


def _largest(dense: np.ndarray, k: int) -> sparse.csr_array:
    """The k entries of each row that are largest by absolute value, columns ascending, as CSR."""
    parts = []
    for row in dense:
        columns = np.flatnonzero(row)
        if len(columns) > k:
            columns = np.sort(columns[np.argpartition(-np.abs(row[columns]), k - 1)[:k]])
        parts.append(columns.astype(np.int32))
    indptr = np.concatenate([[0], np.cumsum([len(columns) for columns in parts])]).astype(np.int64)
    indices = np.concatenate([*parts, np.zeros(0, np.int32)])
    rows = np.repeat(np.arange(len(dense)), np.diff(indptr))
    return sparse.csr_array((dense[rows, indices], indices, indptr), shape=dense.shape)
