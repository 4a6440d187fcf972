"""The source of kinds as the learner makes and keeps it."""

import dataclasses

import numpy as np
import pyarrow as pa

from raysys.bundle import Bundle, Histories
from raysys.features.text import DIM
from raysys.models.content import ContentNeighbours
from raysys.models.covisit import Covisitation
from raysys.models.kinds import Kinds
from raysys.models.popularity import Popularity
from raysys.online.change import outdated, started_anew
from raysys.online.feed import flat_sequences
from raysys.online.growth import grown
from raysys.online.kinds import NUM_KINDS, with_kinds

GROUPS, N = 16, 320
"""Item i is of group i % GROUPS; group g leads to g + 1, and after a change to g + 5."""


def walks(users: int, step: int, seed: int, length: int = 6):
    rng = np.random.default_rng(seed)
    group = (rng.integers(0, GROUPS, (users, 1)) + step * np.arange(length)) % GROUPS
    items = group + GROUPS * rng.integers(0, N // GROUPS, group.shape)
    return flat_sequences(items.ravel(), np.ones(items.size), np.tile(np.arange(length), users), np.arange(0, items.size + 1, length))


def bundle_of(*, content: bool = True, **manifest) -> Bundle:
    rng, known = np.random.default_rng(0), walks(150, 1, 0)
    models = {"covisit": Covisitation.fit(known, N), "popularity": Popularity.fit(known, N)}
    if content:
        raw = rng.standard_normal((GROUPS, DIM))[np.arange(N) % GROUPS] + 0.1 * rng.standard_normal((N, DIM))
        models["content"] = ContentNeighbours.fit((raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32))
    counts = np.bincount(known.items, minlength=N)
    table = pa.table({"item_idx": pa.array(range(N), pa.int32()), "item_id": [f"i{row}" for row in range(N)], "num_train": counts})
    histories = Histories.build(known, [f"u{row}" for row in range(150)], max_events=10)
    return Bundle(table, models, {"mixture": {}}, histories, {"time": "utc", **manifest})


def test_as_many_kinds_as_the_events_tell_apart():
    bundle = bundle_of()
    source = with_kinds(bundle, 4.0).models["kinds"]
    assert len(source.arrivals) == GROUPS and GROUPS in NUM_KINDS
    for group in range(GROUPS):
        assert len(set(source.kinds[group::GROUPS])) == 1
    followers = source.transitions.argmax(axis=1)
    assert (followers[source.kinds[np.arange(GROUPS)]] == source.kinds[(np.arange(GROUPS) + 1) % GROUPS]).all()
    assert source.item_counts.tolist() == bundle.items["num_train"].to_pylist(), "its histories are in the items' counts already"


def test_an_item_without_content_is_of_a_kind_of_its_own():
    bundle = bundle_of()
    vectors = bundle.models["content"].item_vectors.copy()
    vectors[:3] = 0
    models = {**bundle.models, "content": bundle.models["content"].with_vectors(vectors)}
    kinds = with_kinds(dataclasses.replace(bundle, models=models), 4.0).models["kinds"].kinds
    assert len(set(kinds[:3])) == 1 and kinds[0] not in kinds[3:]


def test_a_version_that_has_one_keeps_it_and_it_grows():
    once = with_kinds(bundle_of(), 4.0)
    assert with_kinds(once, 4.0) is once
    assert with_kinds(once, 2.0).models["kinds"].config.half_life_days == 2.0
    assert len(grown(once, {"i-new": {}}).models["kinds"].kinds) == N + 1


def test_none_without_content_half_life_or_real_time():
    assert "kinds" not in with_kinds(bundle_of(content=False), 4.0).models
    assert "kinds" not in with_kinds(bundle_of(), 0.0).models
    assert "kinds" not in with_kinds(bundle_of(time="ordinal"), 4.0).models


def test_no_history_at_all():
    empty = dataclasses.replace(bundle_of(), histories=Histories(bundle_of().histories.table.slice(0, 0), 10))
    source = with_kinds(empty, 4.0).models["kinds"]
    assert isinstance(source, Kinds) and source.transitions.sum() == 0


def test_it_proves_a_change_that_pairs_of_items_cannot_yet_tell():
    bundle, new = with_kinds(bundle_of(), 4.0), walks(40, 5, 1)
    order = np.argsort(new.times, kind="stable")
    arrival = np.empty(len(order), np.int64)
    arrival[order] = np.arange(len(order))
    assert outdated(bundle, new, arrival, order[len(new) :]) == ("kinds",)
    same = walks(40, 1, 1)
    assert outdated(bundle, same, arrival, order[len(same) :]) == ()
    after = started_anew(bundle, ())
    assert after.models["kinds"].transitions.sum() == 0 and after.models["covisit"] is bundle.models["covisit"]
