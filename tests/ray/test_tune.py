import json

import pytest
import yaml

from raysys.errors import ConfigError
from raysys.prepare.dataset import Prepared
from raysys.train.config import TrainConfig, load_train_config
from raysys.train.tune import DEFAULT_SEARCH, draw, read_search, tune
from tests import planted
from tests.prepared import leave_one_out, write_prepared

EPOCHS = 9


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return write_prepared(str(tmp_path_factory.mktemp("planted")), leave_one_out(planted.sequences()), planted.items_table())


def write_config(folder, **values):
    path = folder / "tune.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_the_best_of_a_few_trials_is_left_for_train(ray_cluster, prepared, tmp_path, capfd):
    # A rate of 1e-6 learns nothing: ASHA has to stop those trials, and the winner has to be another.
    settings = write_config(
        tmp_path,
        interest={"dim": 16, "num_layers": 1, "max_length": 16},
        encoder={"epochs": EPOCHS, "lr": 5e-3, "batch_size": 32, "warmup_steps": 5, "patience": EPOCHS, "validate_every": 1},
        search={"encoder.lr": {"choice": [1e-6]}, "interest": {"dropout": {"uniform": [0.1, 0.2]}}},
    )
    out = tmp_path / "tuned"
    rows = dict(tune(prepared, str(out), config_uri=settings, overrides=["encoder.weight_decay=0.001"], samples=4, seed=3))
    assert sorted(path.name for path in out.iterdir()) == ["best.yaml", "trials.json"]

    report = json.loads((out / "trials.json").read_text())
    trials = report["trials"]
    assert [trial["trial"] for trial in trials] == [0, 1, 2, 3] and report["best"] == 0 and rows["best"] == "trial 0"
    assert trials[0]["settings"] == {"encoder.lr": 5e-3, "interest.dropout": 0.5}
    assert trials[0]["epochs"] == EPOCHS and trials[0]["stopped"] is None and trials[0]["seconds"] > 0
    assert trials[0]["best"] == max(trials[0]["ndcg@10"]) > 0.3
    assert trials[0]["loss"][-1] < trials[0]["loss"][0] - 0.5
    assert all(trial["settings"]["encoder.lr"] == 1e-6 and 0.1 <= trial["settings"]["interest.dropout"] <= 0.2 for trial in trials[1:])
    stopped = [trial for trial in trials[1:] if trial["stopped"] == "ASHA"]
    assert stopped and all(len(trial["ndcg@10"]) == trial["epochs"] < EPOCHS for trial in stopped)
    assert all(trial["best"] < 0.2 for trial in trials[1:])

    best, given = load_train_config(str(out / "best.yaml"), [])
    assert (best.encoder.lr, best.encoder.weight_decay, best.interest.dropout, best.interest.dim) == (5e-3, 1e-3, 0.5, 16)
    assert {"encoder.lr", "interest.dropout", "encoder.batch_size"} <= given, "nothing of the winner is filled in from the data again"

    captured = capfd.readouterr()
    assert captured.out.count("      trial ") == 4 and "4 of 4 done" in captured.out
    assert "Trial status" not in captured.out and "╭" not in captured.out + captured.err


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({}, "search: expected a mapping of settings, got {}"),
        (["encoder.lr"], "search: expected a mapping of settings"),
        ({"encoder.lr": [1, 2]}, r"search.encoder.lr: expected one of choice, uniform, loguniform, randint, such as .* got \[1, 2\]"),
        ({"encoder.lr": {"unifrom": [1, 2]}}, "search.encoder.lr: expected one of choice, uniform"),
        ({"encoder.lr": {"uniform": [1, 2], "choice": [1]}}, "search.encoder.lr: expected one of"),
        ({"encoder.lr": {"uniform": [2, 1]}}, r"search.encoder.lr: expected uniform: \[low, high\] with low < high, got \[2, 1\]"),
        ({"encoder.lr": {"uniform": [1]}}, r"search.encoder.lr: expected uniform: \[low, high\], got \[1\]"),
        ({"encoder.lr": {"loguniform": [0, 1]}}, "with 0 < low < high"),
        ({"encoder.lr": {"choice": []}}, r"expected choice: \[one or more values\]"),
        ({"encoder.lr": {"choice": ["fast"]}}, "search.encoder.lr: expected float, got 'fast'"),
        ({"encoder.epoch": {"choice": [1]}}, "unknown setting 'search.encoder.epoch'; did you mean 'epochs'"),
        ({"interest": {"dim": {"uniform": [8, 64]}}}, "search.interest.dim: expected int, got 8.0"),
        (
            {"covisit.window": {"randint": [1, 9]}},
            "search.covisit.window: cannot be searched, because only settings under",
        ),
        ({"encoder.epochs": {"randint": [1, 9]}}, "search.encoder.epochs: cannot be searched, because it is the length of a trial"),
    ],
)
def test_a_wrong_search_space_is_one_clear_line(search, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_search(search)
    assert "\n" not in str(caught.value)


def test_wrong_settings_are_refused_before_anything_starts(prepared, tmp_path):
    # No cluster is needed to find these out.
    def refused(message, samples=2, overrides=(), **values):
        with pytest.raises(ConfigError, match=message):
            tune(prepared, str(tmp_path), config_uri=write_config(tmp_path, **values), overrides=list(overrides), samples=samples, seed=0)

    refused("unknown setting 'serach'; did you mean 'sources'|unknown setting 'serach'", serach={})
    refused("--samples: expected at least 1, got 0", samples=0)
    refused("search.encoder.lr: expected", overrides=["search.encoder.lr=fast"])
    # Each value alone is possible, together they are not.
    space = {"interest.dim": {"choice": [20, 40]}, "interest.num_heads": {"choice": [3]}}
    refused("search: interest: expected num_heads to divide dim, got dim=[24]0, num_heads=3", search=space)


def test_points_are_drawn_inside_the_space_and_with_the_seed():
    space = read_search({"interest.num_layers": {"randint": [1, 3]}, "encoder.lr": {"loguniform": ["1e-4", "1e-2"]}})
    points = draw(space, 300, seed=1)
    assert points == draw(space, 300, seed=1) != draw(space, 300, seed=2)
    assert {point["interest.num_layers"] for point in points} == {1, 2, 3}
    rates = [point["encoder.lr"] for point in points]
    assert 1e-4 <= min(rates) and max(rates) <= 1e-2
    assert sum(rate < 1e-3 for rate in rates) == pytest.approx(150, abs=40), "half of them lie below the geometric middle"


def test_the_default_space_and_the_example_are_possible(prepared):
    assert read_search(None) == DEFAULT_SEARCH == read_search(DEFAULT_SEARCH)
    from pathlib import Path

    example = yaml.safe_load((Path(__file__).parents[2] / "configs" / "tune.yaml").read_text())
    assert read_search(example.pop("search"))
    assert load_train_config(None, [f"{key}={json.dumps(value)}" for key, value in example.items()])[0] != TrainConfig()
    assert Prepared.open(prepared).num_items == 120
