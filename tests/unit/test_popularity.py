import numpy as np
import pytest

from raysys.models.popularity import Popularity, PopularityConfig
from raysys.queries import Queries
from tests.unit.test_covisit import DAY_S, sequences

ANY = Queries.from_lists([[0], []])


def counts(model) -> np.ndarray:
    """(N,) the counts behind the scores, smoothing taken out."""
    return np.exp(model.scores(ANY)[0]) - model.config.smoothing


def test_scores_are_logs_of_smoothed_counts():
    model = Popularity.fit(sequences([[0, 0, 1], [0]]), 3, PopularityConfig(smoothing=0.5))
    np.testing.assert_allclose(model.scores(ANY), np.log([[3.5, 1.5, 0.5]] * 2), rtol=1e-6)


def test_half_life_by_hand():
    """Item 0: 40 days before the newest event at a half-life of 20 is two halvings."""
    data = sequences([[0, 1]], times=[[0, 40 * DAY_S]])
    config = PopularityConfig(half_life_days=20)
    np.testing.assert_allclose(counts(Popularity.fit(data, 2, config)), [0.25, 1], atol=1e-6)
    np.testing.assert_allclose(counts(Popularity.fit(data, 2, config, ordinal_time=True)), [1, 1], atol=1e-6)


def test_event_weights():
    data = sequences([[0, 1, 1]], events=[[0, 1, 2]])
    np.testing.assert_allclose(counts(Popularity.fit(data, 2, event_weights=[1.0, 3.0, 0.0])), [1, 3], atol=1e-6)


def test_update_equals_refit_also_when_old_events_arrive_late():
    whole = sequences([[0, 1, 2, 0]], times=[[0, 5 * DAY_S, 9 * DAY_S, 11 * DAY_S]])
    config = PopularityConfig(half_life_days=3)
    expected = counts(Popularity.fit(whole, 3, config))
    for first in ([0, 1], [2, 3], [3], []):
        rest = np.setdiff1d(np.arange(4), first)
        model = Popularity.fit(whole.where(np.isin(np.arange(4), first)), 3, config)
        updated = model.update(whole.items[rest], whole.events[rest], whole.times[rest])
        np.testing.assert_allclose(counts(updated), expected, rtol=1e-5)


def test_update_may_add_items_and_leaves_out_unknown_ones():
    model = Popularity.fit(sequences([[0]]), 1)
    grown = model.update(np.array([2, -1]), np.zeros(2, np.int8), np.zeros(2, np.int64), num_items=3)
    np.testing.assert_allclose(counts(grown), [1, 0, 1], atol=1e-6)
    np.testing.assert_allclose(counts(model), [1], atol=1e-6)


def test_senseless_half_life_is_refused():
    with pytest.raises(ValueError, match="half_life_days"):
        PopularityConfig(half_life_days=0)
