"""Defaults that follow from the data, and settings that cannot stand together."""

from pathlib import Path

import numpy as np
import pytest

from raysys.errors import ConfigError
from raysys.online.feed import flat_sequences
from raysys.queries import Queries
from raysys.train.config import LARGE_CATALOGUE, demo_config, load_train_config, with_data_defaults

CONFIGS = Path(__file__).parents[2] / "configs"
LENGTHS, LONG = np.full(1000, 8), np.full(5000, 100)


def defaults(overrides=(), *, num_items=5000, repeats=0.0, lengths=LENGTHS):
    settings, given = load_train_config(None, list(overrides))
    return with_data_defaults(settings, given, lengths, num_items, repeats)


def test_many_long_histories_get_depth_and_less_dropout():
    short, few, many = (defaults(lengths=lengths).interest for lengths in (LENGTHS, np.full(1000, 100), LONG))
    assert (short.num_layers, short.dropout, short.max_length) == (2, 0.5, 16)
    assert (few.num_layers, few.dropout, few.max_length) == (2, 0.3, 128)
    assert (many.num_layers, many.dropout, many.max_length) == (4, 0.2, 128)
    assert defaults(["interest.num_layers=1"], lengths=LONG).interest.num_layers == 1


def test_much_data_with_long_histories_is_learnt_longer():
    assert [defaults(lengths=lengths).encoder.epochs for lengths in (LENGTHS, np.full(1000, 100), LONG)] == [20, 20, 32]
    assert defaults(["encoder.epochs=3"], lengths=LONG).encoder.epochs == 3


def test_the_demo_keeps_its_own_settings():
    settings, given = demo_config()
    assert with_data_defaults(settings, given, LENGTHS, 2000, 0.0).encoder.epochs == settings.encoder.epochs == 10


def test_only_unseen_items_are_learnt_where_long_histories_hardly_repeat():
    assert defaults(lengths=LONG).interest.exclude_seen
    assert not defaults().interest.exclude_seen
    assert not defaults(lengths=LONG, repeats=0.2).interest.exclude_seen
    assert defaults(["interest.exclude_seen=true"], repeats=0.2).interest.exclude_seen
    assert not defaults(["interest.exclude_seen=false"], lengths=LONG).interest.exclude_seen


@pytest.mark.parametrize("overrides", [["encoder.loss=sampled"], ["scaling.shard_items=true"], ["encoder.repeat_short=true"]])
def test_seen_items_are_learnt_too_where_the_loss_does_not_see_whole_rows_or_histories_are_repeated(overrides):
    assert not defaults(overrides, lengths=LONG).interest.exclude_seen
    with pytest.raises(ConfigError, match="exclude_seen"):
        load_train_config(None, ["interest.exclude_seen=true", *overrides])


def test_large_catalogues_are_sampled():
    settings = defaults(num_items=LARGE_CATALOGUE + 1, lengths=LONG)
    assert settings.encoder.loss == "sampled" and not settings.interest.exclude_seen


def sequences(histories):
    queries = Queries.from_lists(histories)
    return flat_sequences(queries.items, queries.events, queries.times, queries.indptr)


def test_repeats_by_hand():
    """User 0 has items 1 1 2, user 1 has 1 3: one of five events repeats. An item of two users does not, nor do unknown items."""
    assert sequences([[1, 1, 2], [1, 3], [-1, -1]]).repeats == pytest.approx(1 / 5)
    assert sequences([[]]).repeats == 0.0


@pytest.mark.parametrize("path", sorted(path for path in CONFIGS.glob("*.yaml") if path.name != "tune.yaml"), ids=lambda path: path.stem)
def test_the_configs_of_data_sets_are_settings_of_train(path):
    settings, given = load_train_config(str(path), [])
    assert {name.partition(".")[0] for name in given} == {"interest", "encoder"}
    assert with_data_defaults(settings, given, LENGTHS, 5000, 0.0).interest.dropout == settings.interest.dropout
    assert f"## {path.stem}" in (CONFIGS / "README.md").read_text(), "its sweep"
