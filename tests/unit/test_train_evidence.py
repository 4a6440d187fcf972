"""A piece of the users at a time gives what all of them give, and takes the memory of a piece."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

from raysys.bundle import Histories
from raysys.models.covisit import CovisitConfig
from raysys.models.interest import InterestConfig, InterestEncoder
from raysys.models.popularity import PopularityConfig
from raysys.prepare.dataset import Sequences
from raysys.train.batches import InMemory
from raysys.train.config import ScalingConfig, TrainConfig
from raysys.train.evidence import Evidence
from raysys.train.parts import Held
from raysys.train.sources import Sources
from raysys.train.survey import survey_if_streamed
from tests import planted
from tests.prepared import in_files, leave_one_out

NUM_ITEMS = planted.NUM_CLUSTERS * planted.CLUSTER_ITEMS
STAGES = ("fit", "refit", "last refit")
SETTINGS = TrainConfig(
    covisit=CovisitConfig(half_life_days=2, window=4),
    popularity=PopularityConfig(half_life_days=2),
    sources=["interest", "covisit", "popularity", "dot_product"],
    scaling=ScalingConfig(input="stream", shuffle_events=600),
)


def both(folder, sequences: Sequences, *, order=None) -> tuple[Evidence, Evidence]:
    """Evidence of the same set, streamed and in memory."""
    prepared = in_files(str(folder), sequences, planted.items_table(), order=order)
    return Evidence(prepared, SETTINGS, survey_if_streamed(prepared, SETTINGS.scaling)), Evidence(prepared, SETTINGS, None)


@pytest.fixture(scope="module", params=[leave_one_out, lambda sequences: sequences], ids=["leave-one-out", "none"])
def streamed_and_whole(request, tmp_path_factory):
    return both(tmp_path_factory.mktemp("planted"), request.param(planted.sequences()))


def assert_same(found: Held, expected: Held) -> None:
    for name in ("items", "events", "times", "indptr", "now"):
        np.testing.assert_array_equal(getattr(found.queries, name), getattr(expected.queries, name))
    np.testing.assert_array_equal(found.targets, expected.targets)
    np.testing.assert_array_equal(found.positive, expected.positive)


def test_pieces_are_all_users_once_and_never_too_many(streamed_and_whole):
    streamed, whole = streamed_and_whole
    survey = streamed.survey
    assert len(survey.fragments) == 9 and sum(fragment.events for fragment in survey.fragments) == len(whole.piece(0).all.items)
    assert len(streamed) == 4 and len(whole) == 1, "100 or 250 events a fragment, 600 a piece"
    assert all(len(streamed.piece(index).all.items) <= 600 for index in range(len(streamed)))
    for stage in STAGES:
        (expected,) = whole.of(stage)
        for name in ("items", "events", "times", "positive"):
            found = np.concatenate([getattr(part, name) for part in streamed.of(stage)])
            np.testing.assert_array_equal(found, getattr(expected, name))
        assert survey.num_windows(stage, 4, SETTINGS) == InMemory(expected).num_windows(4)
    assert sorted(streamed.lengths) == sorted(whole.lengths)
    np.testing.assert_array_equal(streamed.item_counts, whole.item_counts)
    np.testing.assert_array_equal(whole.item_counts, np.bincount(whole.piece(0).fit.items, minlength=NUM_ITEMS))


@pytest.mark.parametrize("role", ["choice", "heldout"])
@pytest.mark.parametrize("count", [1, 50, 10_000])
def test_the_same_positions_are_drawn(streamed_and_whole, role, count):
    streamed, whole = streamed_and_whole
    positions = getattr(whole.piece(0), role)
    assert streamed.num_held(role) == whole.num_held(role) == len(positions) > 50
    found = whole.held(role, count)
    assert len(found) == min(count, len(positions))
    assert_same(streamed.held(role, count), found)
    if count == 10_000:
        assert_same(found, Held.at(whole.piece(0).all, positions))


def test_nothing_held_is_no_question(tmp_path):
    """Every user has one training event, so nothing can be held out."""
    walks = planted.sequences()
    first = walks.where(np.arange(len(walks.items)) == walks.indptr[:-1][walks.rows])
    for evidence in both(tmp_path, first):
        assert evidence.num_held("choice") == evidence.num_held("heldout") == 0
        assert len(evidence.held("choice", 5)) == len(evidence.held("choice", 5).queries) == 0


def test_files_in_the_order_of_a_hash_hold_the_same(tmp_path):
    """`prepare` deals users out by a hash: then a sample of positions is another one, as large; all of them are the same."""
    streamed, whole = both(tmp_path, leave_one_out(planted.sequences()), order=np.random.default_rng(0).permutation(planted.NUM_USERS))
    for role in ("choice", "heldout"):
        found, expected = streamed.held(role, 10_000), whole.held(role, 10_000)
        assert sorted(zip(found.targets, found.queries.now, found.queries.lengths)) == sorted(
            zip(expected.targets, expected.queries.now, expected.queries.lengths)
        )
        assert len(streamed.held(role, 70)) == 70
    np.testing.assert_array_equal(streamed.item_counts, whole.item_counts)


@pytest.mark.parametrize("stage", STAGES)
def test_sources_count_the_same_piece_by_piece(streamed_and_whole, stage):
    torch.manual_seed(0)
    encoder = InterestEncoder(NUM_ITEMS, len(planted.EVENTS), InterestConfig(dim=8, num_layers=1, max_length=16)).eval()
    found, expected = (Sources(part.prepared, part.settings).fit(part, stage, encoder) for part in streamed_and_whole)
    assert list(found) == list(expected) == SETTINGS.sources
    queries = streamed_and_whole[1].held("choice", 40).queries
    for name in ("interest", "covisit", "popularity"):
        np.testing.assert_allclose(found[name].scores(queries), expected[name].scores(queries), rtol=1e-4, atol=1e-6)
    assert expected["covisit"].scores(queries).max() > 0
    assert found["dot_product"].scores(queries).std() > 0


def test_the_dot_product_learns_from_users_drawn_with_the_seed(streamed_and_whole):
    streamed, whole = streamed_and_whole
    sample = streamed.sample("fit")
    assert 40 <= len(sample) <= 75 and set(sample.user_idx) < set(whole.sample("fit").user_idx)
    np.testing.assert_array_equal(sample.user_idx, streamed.sample("refit").user_idx)
    seeds = [Evidence(streamed.prepared, dataclasses.replace(SETTINGS, seed=seed), streamed.survey) for seed in range(1, 5)]
    assert any(set(other.sample("fit").user_idx) != set(sample.user_idx) for other in seeds)


def test_histories_of_a_bundle_are_built_piece_by_piece(streamed_and_whole):
    streamed, whole = streamed_and_whole
    expected = Histories.build(whole.piece(0).all.upto("valid"), planted.user_ids(), max_events=5)
    ids = np.array(planted.user_ids())
    found = Histories.stack(Histories.build(part, ids[part.user_idx].tolist(), max_events=5) for part in streamed.of("last refit"))
    assert found.table == expected.table and len(found) == planted.NUM_USERS and found.max_events == 5
    for mine, theirs in zip(found.lookup("user-170"), expected.lookup("user-170"), strict=True):
        np.testing.assert_array_equal(mine, theirs)


ALL_PASSES = """
import re, sys
from raysys.models.dot_product import DotProductConfig
from raysys.prepare.dataset import Prepared
from raysys.train.config import ScalingConfig, TrainConfig
from raysys.train.evidence import Evidence
from raysys.train.sources import Sources
from raysys.train.survey import survey_if_streamed

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1000

prepared = Prepared.open(sys.argv[1])
scaling = ScalingConfig(input=sys.argv[2], shuffle_events=100_000)
settings = TrainConfig(sources=["covisit", "dot_product"], dot_product=DotProductConfig(steps=1), scaling=scaling)
before = peak()
evidence = Evidence(prepared, settings, survey_if_streamed(prepared, scaling))
for stage in ("fit", "refit", "last refit"):
    Sources(prepared, settings).fit(evidence, stage, None)
for role in ("choice", "heldout"):
    evidence.held(role, 3000)
print(peak() - before)
"""


def peak_mb(prepared, kind: str) -> float:
    done = subprocess.run([sys.executable, "-c", ALL_PASSES, prepared.uri, kind], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout)


@pytest.mark.slow
def test_memory_is_that_of_a_piece_whatever_the_size_of_the_data(tmp_path):
    peaks = {}
    for num_users in (20_000, 150_000):
        rng = np.random.default_rng(0)
        items = (rng.random(num_users * 10) ** 2 * NUM_ITEMS).astype(np.int32)
        E = len(items)
        flat = (np.ones(E, np.int8), np.tile(np.arange(10), num_users), np.ones(E, np.float32), np.ones(E, bool), np.zeros(E, np.int8))
        sequences = Sequences(np.arange(num_users, dtype=np.int32), np.arange(num_users + 1) * 10, items, *flat)
        prepared = in_files(str(tmp_path / str(num_users)), leave_one_out(sequences), planted.items_table(), num_files=10, group=2000)
        for kind in ("stream", "memory"):
            peaks[kind, num_users] = peak_mb(prepared, kind)
    grown = {kind: peaks[kind, 150_000] - peaks[kind, 20_000] for kind in ("stream", "memory")}
    assert grown["stream"] < 0.1 * grown["memory"], peaks
    assert peaks["stream", 150_000] < 0.5 * peaks["memory", 150_000], peaks
