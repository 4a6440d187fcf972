import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from raysys import config
from raysys.errors import ConfigError
from raysys.prepare.dataset import Prepared
from raysys.train.config import TrainConfig, load_train_config
from raysys.tune.config import TuneConfig
from raysys.tune.run import tune
from raysys.tune.space import DEFAULT_SEARCH, draw, grid, read_search
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
    assert sorted(path.name for path in out.iterdir()) == ["best.yaml", "plan.json", "report.html", "trials", "trials.json"]

    report = json.loads((out / "trials.json").read_text())
    trials = report["trials"]
    assert [trial["trial"] for trial in trials] == [0, 1, 2, 3] and report["best"] == 0 and rows["best"] == "trial 0"
    assert trials[0]["settings"] == {"encoder.lr": 5e-3, "interest.dropout": 0.5}
    assert trials[0]["epochs"] == EPOCHS and trials[0]["stopped"] is None and trials[0]["seconds"] > 0
    assert trials[0]["best"] == max(trials[0]["ndcg@10"]) > 0.3
    assert trials[0]["loss"][-1] < trials[0]["loss"][0] - 0.5
    assert all(trial["settings"]["encoder.lr"] == 1e-6 and 0.1 <= trial["settings"]["interest.dropout"] <= 0.2 for trial in trials[1:])
    stopped = [trial for trial in trials[1:] if trial["stopped"] == "scheduler"]
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
    refused(
        "search.encoder.lr: expected choice: .* for algorithm 'grid'",
        tune={"algorithm": "grid"},
        search={"encoder.lr": {"uniform": [1, 2]}},
    )
    refused("search.interest.dim: cannot be searched with scheduler 'pbt'", tune={"scheduler": "pbt"})
    refused("tune.scheduler: expected one of 'asha', 'pbt', 'none', got 'hyperband'", tune={"scheduler": "hyperband"})
    refused("tune: expected cpus_per_trial > 0", tune={"cpus_per_trial": 0})
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
    example = yaml.safe_load((Path(__file__).parents[2] / "configs" / "tune.yaml").read_text())
    assert read_search(example.pop("search")) and config.from_dict(TuneConfig, example.pop("tune"))
    assert load_train_config(None, [f"{key}={json.dumps(value)}" for key, value in example.items()])[0] != TrainConfig()
    assert Prepared.open(prepared).num_items == 120


SMALL = {
    "interest": {"dim": 16, "num_layers": 1, "max_length": 16},
    "encoder": {"epochs": 4, "lr": 5e-3, "batch_size": 32, "warmup_steps": 5, "patience": 9, "validate_every": 1},
}


def test_a_sweep_goes_on_with_the_trials_that_are_missing(ray_cluster, prepared, tmp_path, capfd):
    """Optuna, half a CPU a trial; one record is taken away and one is marked, as after a kill."""
    search = {"encoder.lr": {"loguniform": [1e-4, 1e-2]}, "interest.dropout": {"choice": [0.1, 0.3]}}
    settings = write_config(tmp_path, **SMALL, search=search, tune={"algorithm": "optuna", "cpus_per_trial": 0.5})
    out = tmp_path / "tuned"

    def sweep(**more):
        return tune(prepared, str(out), config_uri=settings, overrides=[], samples=3, seed=1, **more)

    sweep()
    records = sorted((out / "trials").iterdir())
    assert [path.name for path in records] == ["trial-0000.json", "trial-0001.json", "trial-0002.json"]
    marked = json.loads(records[2].read_text()) | {"seconds": 12345.0}
    records[2].write_text(json.dumps(marked))
    records[1].unlink()
    capfd.readouterr()
    sweep()
    printed = capfd.readouterr().out
    assert "going on: 2 of 3 trials are there" in printed and "trial 1: ndcg@10" in printed and "1 of 1 done" in printed
    report = json.loads((out / "trials.json").read_text())
    assert [trial["trial"] for trial in report["trials"]] == [0, 1, 2] and report["trials"][2]["seconds"] == 12345.0
    page = (out / "report.html").read_text()
    assert "Parallel coordinates" in base64_texts(page) and "<script" not in page and "trial" in page
    with pytest.raises(ConfigError, match="holds another sweep .seed differ"):
        tune(prepared, str(out), config_uri=settings, overrides=[], samples=3, seed=2)


def base64_texts(page):
    import base64

    drawn = [base64.b64decode(found).decode() for found in re.findall(r"base64,([^']+)'", page)]
    return " ".join(re.findall(r"<!-- (.*?) -->", "".join(drawn)))


@pytest.mark.slow
def test_a_sweep_killed_in_the_middle_goes_on(prepared, tmp_path):
    """A real kill -9 of the command; its cluster dies with it, the second call runs the trials without a record, and those alone."""
    search = {"encoder.lr": {"loguniform": [1e-4, 1e-2]}}
    settings = write_config(tmp_path, **SMALL, search=search, tune={"scheduler": "none"})
    out = tmp_path / "tuned"
    command = [sys.executable, "-m", "raysys.cli", "tune", "--prepared", prepared, "--config", settings, "--samples", "5", "--seed", "3"]
    process = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob("trials/trial-*.json")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("trials/trial-*.json")}
    assert 0 < len(before) < 5 and not (out / "trials.json").exists()

    again = subprocess.run([*command, "--out", str(out)], check=True, stdout=subprocess.PIPE, text=True, timeout=300).stdout
    assert f"going on: {len(before)} of 5 trials are there" in again
    finished = {f"trial-{int(number):04d}.json" for number in re.findall(r"trial (\d+): ndcg@10", again)}
    assert not finished & before.keys() and len(finished) == 5 - len(before)
    assert all((out / "trials" / name).stat().st_mtime_ns == written for name, written in before.items())
    trials = json.loads((out / "trials.json").read_text())["trials"]
    assert [(trial["trial"], trial["epochs"], trial["error"]) for trial in trials] == [(number, 4, None) for number in range(5)]
    assert [trial["settings"] for trial in trials[1:]] == draw(read_search(search), 4, seed=3)
    assert sorted(path.name for path in out.iterdir()) == ["best.yaml", "plan.json", "report.html", "trials", "trials.json"]


@pytest.mark.slow  # trials take turns
def test_a_population_copies_what_learns(ray_cluster, prepared, tmp_path):
    """Of four trials three cannot learn at 1e-6 to 2e-6; they take over the weights of the one that does."""
    encoder = {**SMALL["encoder"], "epochs": 8, "validate_every": 1}
    settings = write_config(
        tmp_path,
        interest=SMALL["interest"],
        encoder=encoder,
        search={"encoder.lr": {"choice": [1e-6, 2e-6]}},
        tune={"scheduler": "pbt", "perturb_every": 2, "cpus_per_trial": 0.5},
    )
    out = tmp_path / "population"
    tune(prepared, str(out), config_uri=settings, overrides=[], samples=4, seed=0)
    trials = json.loads((out / "trials.json").read_text())["trials"]
    assert len(trials) == 4 and all(trial["epochs"] == 8 for trial in trials)
    taken = [trial for trial in trials[1:] if trial["best"] > 0.3]
    assert taken, "a trial whose own rate learns nothing got there by copying"
    assert {trial["settings"]["encoder.lr"] for trial in taken} <= {1e-6, 2e-6}, "what is copied changes inside the space"


def test_a_grid_is_every_combination():
    space = read_search({"interest.dim": {"choice": [16, 32]}, "encoder.weight_decay": {"choice": [0.0, 0.1, 0.2]}})
    points = grid(space)
    assert len(points) == 6 and len({tuple(point.items()) for point in points}) == 6
    assert points[0] == {"interest.dim": 16, "encoder.weight_decay": 0.0}


@pytest.mark.slow
def test_the_winner_is_compared_on_the_test_part(ray_cluster, prepared, tmp_path):
    """The given rate learns nothing, the searched one does: the interval has to lie above zero."""
    encoder = {**SMALL["encoder"], "epochs": 6, "lr": 1e-6}
    settings = write_config(
        tmp_path,
        interest=SMALL["interest"],
        encoder=encoder,
        sources=["interest"],
        refit_epochs=1,
        search={"encoder.lr": {"choice": [5e-3]}},
    )
    rows = dict(tune(prepared, str(tmp_path / "out"), config_uri=settings, overrides=[], samples=2, seed=0, compared=True))
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert comparison["difference"] == pytest.approx(comparison["winner"] - comparison["default"])
    assert comparison["difference_interval"][0] > 0 and "paired" in rows["test ndcg@10"]
    assert "Winner against the settings given" in (tmp_path / "out" / "report.html").read_text()
