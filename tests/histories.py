"""Sequences written by hand."""

import numpy as np

from raysys.prepare.dataset import Sequences
from raysys.queries import Queries


def sequences(histories, events=None, times=None) -> Sequences:
    """One user a list of item rows; all events positive, without value, of the training part."""
    queries = Queries.from_lists(histories, events, times)
    total = len(queries.items)
    return Sequences(
        np.arange(len(histories), dtype=np.int32),
        queries.indptr,
        queries.items,
        queries.events,
        queries.times,
        np.full(total, np.nan, np.float32),
        np.ones(total, bool),
        np.zeros(total, np.int8),
    )
