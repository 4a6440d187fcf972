"""What proves a change of tastes, and what starts anew."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from raysys.bundle import Bundle, Histories
from raysys.models.covisit import Covisitation
from raysys.models.popularity import Popularity
from raysys.online.change import Change, counted_along, log_ranks, outdated, ranks_better, started_anew
from raysys.online.feed import flat_sequences

N = 30
"""Everybody walks 0, 1, 2 ... from where they start; later everybody walks in steps of 7."""


def walks(users, step, seed, length=6):
    starts = np.random.default_rng(seed).integers(0, N, users)
    items = (starts[:, None] + step * np.arange(length)) % N
    return flat_sequences(items.ravel(), np.ones(items.size), np.tile(np.arange(length), users), np.arange(0, items.size + 1, length))


def bundle():
    known = walks(200, 1, 0)
    models = {"covisit": Covisitation.fit(known, N), "popularity": Popularity.fit(known, N), "recent": Covisitation.fit(known, N)}
    histories = Histories(pa.table({"user_key": []}), 1)
    table = pa.table({"item_id": [f"i{item}" for item in range(N)]})
    return Bundle(table, {**models, "ranker": object()}, {"mixture": {}, "ranker_weight": 0.4, "ranker_sources": ["covisit"]}, histories)


def told_by(sequences):
    """Arrival in the order of time, user by user where equal, and the positions with a history in that order."""
    order = np.argsort(sequences.times, kind="stable")
    arrival = np.empty(len(order), np.int64)
    arrival[order] = np.arange(len(order))
    return arrival, order[len(sequences) :]


def test_counts_are_outdated_when_none_would_predict_better():
    new = walks(60, 7, 1)
    assert outdated(bundle(), new, *told_by(new)) == ("covisit",), "what is popular has not changed"
    same = walks(60, 1, 1)
    assert outdated(bundle(), same, *told_by(same)) == ()


def test_people_whom_nothing_predicts_prove_no_change():
    items = np.random.default_rng(3).permuted(np.tile(np.arange(N), (40, 1)), axis=1)[:, :6]
    odd = flat_sequences(items.ravel(), np.ones(items.size), np.tile(np.arange(6), 40), np.arange(0, items.size + 1, 6))
    assert outdated(bundle(), odd, *told_by(odd)) == ()


def test_what_starts_anew_keeps_its_settings_and_the_ranker_goes():
    before = bundle()
    after = started_anew(before, ("covisit",))
    assert set(after.models) == {"covisit", "popularity", "recent"} and "ranker" in before.models
    assert after.models["covisit"].to_arrays()[0]["occurrences"].sum() == 0 == after.models["recent"].to_arrays()[0]["occurrences"].sum()
    assert after.models["covisit"].config == before.models["covisit"].config and after.models["popularity"] is before.models["popularity"]
    assert after.fusion == {"mixture": {}, "ranker_weight": 0.0, "ranker_sources": []}
    assert started_anew(before, ("popularity",)).models["popularity"].counts.sum() == 0


def test_log_ranks_by_hand():
    sequences = flat_sequences(np.array([0, 1, 2]), np.ones(3), np.arange(3), np.array([0, 3]))

    class Told:
        def scores(self, queries):
            return np.array([[9.0, 3.0, 5.0, 3.0], [9.0, 9.0, 1.0, 1.0]], np.float32)[: len(queries)]

    # Before event 1 item 0 is seen; item 2 is better, item 3 equal, half a place. Before event 2 items 0 and 1 are seen, 3 is equal.
    assert log_ranks(Told(), sequences, np.array([1, 2])) == pytest.approx(np.log([2.5, 1.5]))
    assert log_ranks(Told(), sequences, np.zeros(0, np.int64)).shape == (0,)


def test_luck_is_not_better():
    rng = np.random.default_rng(0)
    old = rng.normal(5, 1, 200)
    assert ranks_better(old - 0.5 + rng.normal(0, 1, 200), old) and not ranks_better(old - 0.01 + rng.normal(0, 1, 200), old)
    assert not ranks_better(old, old) and not ranks_better(old[:1] - 3, old[:1])


def test_a_part_is_scored_before_it_is_counted():
    new = walks(60, 7, 1)
    arrival, positions = told_by(new)
    empty = {"covisit": Covisitation.empty(N)}
    parts = list(counted_along(empty, new, arrival, positions))
    assert np.concatenate([part for part, _ in parts]).tolist() == positions.tolist()
    for part, models in parts:
        upto = arrival < arrival[part[0]]
        expected = Covisitation.fit(new.where(upto), N).to_arrays()[0]["occurrences"]
        assert models["covisit"].to_arrays()[0]["occurrences"] == pytest.approx(expected)
    late = next(counted_along(empty, new, arrival, positions[100:], counted=60))[1]["covisit"].to_arrays()[0]["occurrences"]
    assert late.sum() == arrival[positions[100]] - 60


def test_a_change_is_carried_from_round_to_round():
    change = Change(since=17, events=0)
    assert Change.of({"change": change.after(500)}) == dataclasses.replace(change, events=500)
    assert Change.of({}) is None and Change.of({"change": None}) is None
