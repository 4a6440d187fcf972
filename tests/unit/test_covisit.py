import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.errors import SchemaError
from raysys.models.covisit import Covisitation, CovisitConfig
from raysys.queries import Queries
from tests.histories import sequences

PLAIN = CovisitConfig(distance_exponent=1.0, backward=0.5, history_exponent=0.0, candidate_exponent=0.0, session_decay=0.5)
DAY_S = 86_400


def ask(model, *history):
    return model.scores(Queries.from_lists([list(history)]))[0]


def test_direction_and_distance_by_hand():
    """One user, 0 1 2. Forward pairs: 0-1 and 1-2 at distance 1, 0-2 at distance 2; backward ones weigh half."""
    model = Covisitation.fit(sequences([[0, 1, 2]]), 4, PLAIN)
    np.testing.assert_allclose(ask(model, 0), [0, 1, 1 / 2, 0])
    np.testing.assert_allclose(ask(model, 1), [1 / 2, 0, 1, 0])
    np.testing.assert_allclose(ask(model, 2), [1 / 4, 1 / 2, 0, 0])


def test_distance_exponent_flattens():
    """2 ** -0.5 instead of 1 / 2 at distance 2."""
    config = CovisitConfig(distance_exponent=0.5, backward=0.0, history_exponent=0, candidate_exponent=0)
    assert ask(Covisitation.fit(sequences([[0, 1, 2]]), 3, config), 0)[2] == pytest.approx(2**-0.5)


def test_older_history_items_count_less():
    """History 0 then 1: the last item fully, the one before half. Item 2: 1 from item 1, 1/2 * 1/2 from item 0."""
    model = Covisitation.fit(sequences([[0, 1, 2]]), 3, PLAIN)
    assert ask(model, 0, 1)[2] == pytest.approx(1 + 0.5 * 0.5)


def test_popularity_is_divided_out_by_hand():
    """Item 0 occurs twice, items 1 and 2 once. [0, 1] = 1 / (2 ** 0.5 * 1 ** 0.25)."""
    config = CovisitConfig(history_exponent=0.5, candidate_exponent=0.25, backward=0.0)
    model = Covisitation.fit(sequences([[0, 1], [2, 0]]), 3, config)
    assert ask(model, 0)[1] == pytest.approx(2**-0.5)
    assert ask(model, 2)[0] == pytest.approx(2**-0.25)


def test_window_ends_pairs():
    model = Covisitation.fit(sequences([[0, 1, 2, 3]]), 4, CovisitConfig(window=2))
    assert ask(model, 0)[2] > 0
    assert ask(model, 0)[3] == 0


def test_only_the_last_events_are_asked():
    model = Covisitation.fit(sequences([[0, 3], [1, 2]]), 4, CovisitConfig(max_history=1))
    assert ask(model, 0, 1)[3] == 0
    assert ask(model, 0, 1)[2] > 0


def test_event_weights_scale_pairs_and_history():
    """Weights 1 and 3: the pair weighs 3, and asked with an event of weight 3 it counts three times again."""
    model = Covisitation.fit(sequences([[0, 1]], events=[[1, 2]]), 2, PLAIN, event_weights=[1.0, 1.0, 3.0])
    assert ask(model, 0)[1] == pytest.approx(3)
    assert model.scores(Queries.from_lists([[0]], [[2]]))[0, 1] == pytest.approx(9)


def test_events_without_weight_are_as_if_not_there():
    """An impression between two events neither pairs nor pushes them apart, in counting and in asking."""
    weights = [1.0, 1.0, 0.0]
    with_impression = Covisitation.fit(sequences([[0, 2, 1]], events=[[1, 2, 1]]), 3, PLAIN, event_weights=weights)
    without = Covisitation.fit(sequences([[0, 1]], events=[[1, 1]]), 3, PLAIN, event_weights=weights)
    np.testing.assert_array_equal(ask(with_impression, 0), ask(without, 0))
    asked = with_impression.scores(Queries.from_lists([[0, 2]], [[1, 2]]))
    np.testing.assert_array_equal(asked[0], ask(without, 0))


def test_an_item_is_not_its_own_neighbour():
    assert ask(Covisitation.fit(sequences([[0, 0, 0]]), 2, PLAIN), 0)[0] == 0


def test_neighbours_are_the_strongest():
    histories = [[0, 1]] * 3 + [[0, 2]] * 2 + [[0, 3]]
    model = Covisitation.fit(sequences(histories), 4, CovisitConfig(neighbours=2, candidate_exponent=0))
    assert np.flatnonzero(ask(model, 0)).tolist() == [1, 2]


def test_half_life_by_hand():
    """The pair of item 1 is two half-lives older than the newest event: a quarter."""
    config = CovisitConfig(half_life_days=10, history_exponent=0, candidate_exponent=0)
    data = sequences([[0, 1], [0, 2]], times=[[0, 0], [20 * DAY_S, 20 * DAY_S]])
    np.testing.assert_allclose(ask(Covisitation.fit(data, 3, config), 0), [0, 1 / 4, 1])
    np.testing.assert_allclose(ask(Covisitation.fit(data, 3, config, ordinal_time=True), 0), [0, 1, 1])


def test_contributions_name_the_history_item_behind_each_candidate():
    model = Covisitation.fit(sequences([[0, 2], [1, 3]]), 5, PLAIN)
    assert model.contributions(Queries.from_lists([[0, 1]]), np.array([2, 3, 4])).tolist() == [0, 1, -1]
    assert model.contributions(Queries.from_lists([[]]), np.array([2, 3])).tolist() == [-1, -1]


def test_contributions_weigh_recency():
    """Both history items lead to item 2 equally; the later one is named."""
    model = Covisitation.fit(sequences([[0, 2], [1, 2]]), 3, PLAIN)
    assert model.contributions(Queries.from_lists([[0, 1]]), np.array([2])).tolist() == [1]
    assert model.contributions(Queries.from_lists([[1, 0]]), np.array([2])).tolist() == [0]


HISTORIES = st.lists(st.lists(st.integers(0, 6), max_size=8), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(HISTORIES, st.data())
def test_update_equals_refit(histories, data):
    """Whatever part of each history is counted first, with fading time, and with items that come later."""
    times = [[3 * DAY_S * place + 7 * user for place in range(len(row))] for user, row in enumerate(histories)]
    whole = sequences(histories, times=times)
    cuts = [data.draw(st.integers(0, len(row))) for row in histories]
    old = np.concatenate([np.arange(len(row)) < cut for row, cut in zip(histories, cuts)] or [[]]).astype(bool)
    config = CovisitConfig(half_life_days=5, window=4)
    first = Covisitation.fit(whole.where(old), 7, config)
    updated, refitted = first.update(whole, ~old), Covisitation.fit(whole, 7, config)
    every = Queries.from_lists([[item] for item in range(7)])
    np.testing.assert_allclose(updated.scores(every), refitted.scores(every), rtol=1e-4, atol=1e-6)


def test_update_leaves_the_model_it_came_from_alone():
    whole = sequences([[0, 1, 2]])
    first = Covisitation.fit(whole.where(np.array([True, True, False])), 3, PLAIN)
    before = ask(first, 1).copy()
    updated = first.update(whole, np.array([False, False, True]))
    np.testing.assert_array_equal(ask(first, 1), before)
    assert ask(updated, 1)[2] == pytest.approx(1)


def test_update_after_a_round_trip_to_arrays():
    whole = sequences([[0, 1, 2]])
    first = Covisitation.fit(whole.where(np.array([True, True, False])), 3, PLAIN)
    loaded = Covisitation.from_arrays(*first.to_arrays())
    new = np.array([False, False, True])
    np.testing.assert_array_equal(ask(loaded.update(whole, new), 1), ask(first.update(whole, new), 1))


def test_catalogue_may_grow_and_not_shrink():
    first = Covisitation.fit(sequences([[0, 1]]), 2, PLAIN)
    grown = first.update(sequences([[0, 1, 2]]), np.array([False, False, True]), num_items=4)
    assert ask(grown, 1).tolist() == pytest.approx([0.5, 0, 1, 0])
    with pytest.raises(SchemaError, match="at least the 2 items"):
        first.update(sequences([[0]]), np.array([True]), num_items=1)


def test_many_pairs_are_summed_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    data = sequences([rng.integers(0, 9, 30).tolist() for _ in range(20)])
    at_once = Covisitation.fit(data, 9, CovisitConfig())
    monkeypatch.setattr("raysys.models.covisit.PAIRS_AT_ONCE", 100)
    np.testing.assert_allclose(ask(Covisitation.fit(data, 9, CovisitConfig()), 4), ask(at_once, 4), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"), [("session_decay", 0), ("session_decay", 1.5), ("window", 0), ("neighbours", 0), ("half_life_days", -1)]
)
def test_senseless_settings_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        CovisitConfig(**{name: value})
