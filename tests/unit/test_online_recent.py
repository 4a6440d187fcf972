import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from raysys.bundle import Bundle, Histories
from raysys.models.covisit import Covisitation, CovisitConfig
from raysys.models.popularity import Popularity
from raysys.online.feed import flat_sequences
from raysys.online.growth import grown
from raysys.online.recent import HALF_LIVES, with_recent
from raysys.queries import Queries

N, DAY = 6, 86_400
OLD, NEW = np.array([0, 1, 2]), np.array([0, 3, 4])
"""Everybody went from 0 to 1 long ago, and goes from 0 to 3 now."""


def bundle_of(**manifest) -> Bundle:
    items = np.concatenate([OLD, NEW])
    times = np.concatenate([np.arange(3), (HALF_LIVES * 4 + 1) * DAY + np.arange(3)])
    flat = flat_sequences(items, np.ones(6), times, np.array([0, 3, 6]))
    models = {"covisit": Covisitation.fit(flat, N, event_weights=[1.0, 2.0]), "popularity": Popularity.fit(flat, N)}
    table = pa.table({"item_idx": pa.array(range(N), pa.int32()), "item_id": [f"i{i}" for i in range(N)], "num_train": np.ones(N, int)})
    return Bundle(table, models, {}, Histories.build(flat, ["a", "b"], max_events=10), {"time": "utc", **manifest})


def test_it_is_made_from_the_newest_events_alone():
    bundle = bundle_of()
    after = with_recent(bundle, 4.0)
    ask = Queries.from_lists([[0]], events=[[1]])
    assert after.models["recent"].scores(ask)[0].nonzero()[0].tolist() == [3, 4] and "recent" not in bundle.models
    assert bundle.models["covisit"].scores(ask)[0].nonzero()[0].tolist() == [1, 2, 3, 4]
    newest = flat_sequences(NEW, np.ones(3), np.arange(3), np.array([0, 3]))
    alone = Covisitation.fit(newest, N, CovisitConfig(half_life_days=4.0), event_weights=[1.0, 2.0])
    assert after.models["recent"].scores(ask) == pytest.approx(alone.scores(ask), rel=1e-3)


def test_a_version_that_has_one_keeps_it_and_another_half_life_starts_anew():
    once = with_recent(bundle_of(), 4.0)
    assert with_recent(once, 4.0) is once
    assert with_recent(once, 2.0).models["recent"].config.half_life_days == 2.0
    assert grown(once, {"i-new": {}}).models["recent"].num_items == N + 1


def test_none_without_a_half_life_or_without_real_time():
    assert "recent" not in with_recent(bundle_of(), 0.0).models
    assert "recent" not in with_recent(bundle_of(time="ordinal"), 4.0).models
    empty = dataclasses.replace(bundle_of(), histories=Histories(bundle_of().histories.table.slice(0, 0), 10))
    assert with_recent(empty, 4.0).models["recent"].scores(Queries.from_lists([[0]])).sum() == 0
