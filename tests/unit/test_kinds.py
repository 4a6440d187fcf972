import dataclasses

import numpy as np
import pytest

from raysys.models.base import VectorSource
from raysys.models.kinds import Kinds, KindsConfig
from raysys.online.feed import flat_sequences
from raysys.queries import Queries

KINDS = np.array([0, 0, 1, 1, 2])
COUNTS = np.array([3, 1, 1, 1, 5])
PLAIN = KindsConfig(half_life_days=None, history_decay=0.0, prior=1.0, smoothing=1.0)
DAY = 86_400


def flat(histories, times=None):
    items = np.concatenate(histories)
    indptr = np.concatenate([[0], np.cumsum([len(history) for history in histories])])
    return flat_sequences(items, np.ones(len(items)), np.arange(len(items)) if times is None else np.asarray(times), indptr)


def fitted(sequences, config=PLAIN, **settings) -> Kinds:
    return Kinds.of(KINDS, COUNTS, config, **settings).update(sequences, np.ones(len(sequences.items), bool))


def test_probabilities_by_hand():
    model = fitted(flat([[0, 2], [1, 3], [4, 0]]))
    assert model.transitions.tolist() == [[0, 2, 0], [0, 0, 0], [1, 0, 0]]
    # Kinds came 3, 2 and 1 times; smoothed shares 4/9, 3/9 and 2/9 are worth one event in each row.
    following = (np.array([0, 2, 0]) + np.array([4, 3, 2]) / 9) / 3
    # Items came 3, 1, 1, 1 and 5 times and once each, 0 twice, in the events; one more each by smoothing.
    shares = np.array([6 / 9, 3 / 9, 3 / 6, 3 / 6, 1])
    expected = following[KINDS] * shares
    assert np.exp(model.scores(Queries.from_lists([[4, 1]]))[0]) == pytest.approx(expected, rel=1e-5) and expected.sum() == pytest.approx(1)


def test_an_item_nobody_chose_has_its_kinds_place():
    scores = np.exp(Kinds.of(KINDS, np.zeros(5), PLAIN).update(flat([[0, 2]] * 30), np.ones(60, bool)).scores(Queries.from_lists([[1]]))[0])
    assert scores[3] > 10 * scores[4] > 0 and scores[2] > scores[3], "never chosen either, but of the kind that follows"


def test_older_events_of_a_history_say_less():
    model = fitted(flat([[0, 2], [2, 4]]), dataclasses.replace(PLAIN, history_decay=0.5))
    both = np.exp(model.scores(Queries.from_lists([[0, 3], [3], [0]])))
    np.testing.assert_allclose(both[0], (both[1] + 0.5 * both[2]) / 1.5, rtol=1e-5)
    short = fitted(flat([[0, 2], [2, 4]]), dataclasses.replace(PLAIN, history_decay=0.5, max_history=1))
    np.testing.assert_allclose(np.exp(short.scores(Queries.from_lists([[0, 3]])))[0], both[1], rtol=1e-5)


def test_parts_counted_one_after_the_other_are_as_good_as_all_at_once():
    config = KindsConfig(half_life_days=2.0)
    whole = flat([[0, 2, 4], [1, 3]], times=[0, DAY, 3 * DAY, 2 * DAY, 4 * DAY])
    old = whole.times <= 2 * DAY
    before = Kinds.of(KINDS, COUNTS, config).update(whole.where(old), np.ones(3, bool))
    after, once = before.update(whole, ~old), fitted(whole, config)
    for name in ("transitions", "arrivals", "item_counts"):
        np.testing.assert_allclose(getattr(after, name), getattr(once, name), rtol=1e-5, err_msg=name)
    # The pair of day 1 is three days old, one and a half half-lives.
    assert once.transitions[0, 1] == pytest.approx(2**-1.5 + 1) and once.watermark == 4 * DAY


def test_events_of_weight_zero_are_no_step():
    sequences = flat_sequences(np.array([0, 4, 2]), np.array([1, 2, 1]), np.arange(3), np.array([0, 3]))
    model = fitted(sequences, event_weights=[1.0, 1.0, 0.0])
    assert model.transitions[0, 1] == 1 and model.transitions.sum() == 1 and model.arrivals.tolist() == [1, 1, 0]


def test_emptied_forgets_what_follows_and_keeps_what_items_are():
    model = fitted(flat([[0, 2], [1, 3]]))
    empty = model.emptied()
    assert empty.transitions.sum() == 0 == empty.arrivals.sum() and empty.watermark == 0
    assert empty.item_counts is model.item_counts and empty.config == model.config


def test_new_items_join_the_kind_of_most_of_their_neighbours():
    model = fitted(flat([[0, 2], [1, 3]]))
    grown = model.grown(np.array([[0.3, 0.1, 0.0, 0.6, 0.0], [0.3, 0.3, 0.0, 0.4, 0.0]], np.float32))
    assert grown.kinds.tolist() == [0, 0, 1, 1, 2, 1, 0] and len(grown.item_counts) == 7
    assert grown.scores(Queries.from_lists([[0]])).shape == (1, 7) and model.kinds.tolist() == KINDS.tolist()


def test_the_product_of_its_vectors_is_its_scores():
    model, queries = fitted(flat([[0, 2], [1, 3], [4, 0]])), Queries.from_lists([[0], [], [4, 2]])
    assert isinstance(model, VectorSource)
    np.testing.assert_allclose(model.user_vectors(queries) @ model.item_vectors.T, model.scores(queries), rtol=1e-5, atol=1e-6)


def test_the_history_item_behind_an_answer():
    model = fitted(flat([[0, 2]] * 5 + [[4, 0]] * 5), dataclasses.replace(PLAIN, history_decay=0.9))
    assert model.contributions(Queries.from_lists([[1, 4]]), np.array([3, 0])).tolist() == [1, 4]
    assert model.contributions(Queries.from_lists([[]]), np.array([3])).tolist() == [-1]


@pytest.mark.parametrize("wrong", [{"history_decay": 1.0}, {"half_life_days": 0.0}, {"prior": 0.0}, {"max_history": 0}])
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        KindsConfig(**wrong)
