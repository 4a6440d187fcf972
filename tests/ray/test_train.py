"""Training on Ray: planted truth, repeatability, survival of kills, and who may learn from what."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from ray.train.torch import TorchTrainer

from raysys.bundle import Bundle
from raysys.errors import ConfigError, SchemaError
from raysys.evaluate.run import evaluate
from raysys.models.covisit import Covisitation
from raysys.pipeline import recommend_user
from raysys.prepare.dataset import Prepared
from raysys.train import run as run_module
from raysys.train.config import TrainConfig, load_train_config
from raysys.train.parts import Parts
from raysys.train.run import train
from raysys.train.trainer import Trainer
from tests import planted
from tests.boards import Board
from tests.prepared import leave_one_out, write_prepared

ROOT = Path(__file__).parents[2]
BUDGET_S = 20
OVERRIDES = [
    "interest={dim: 32, num_layers: 1, max_length: 16, dropout: 0.1}",
    "encoder={epochs: 6, batch_size: 32, lr: 5e-3, warmup_steps: 5, validate_every: 1}",
    "ranker.epochs=2",
    "dot_product.steps=50",
    "refit_epochs=2",
    "num_candidates=30",
]


def fit(prepared: str, out, *, board=None, overrides=(), **options):
    """Train, and return the manifest and the lines of progress."""
    board = board or Board.remote()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "printed_progress", lambda say: contextlib.nullcontext(board))
        settings, given = load_train_config(None, [*OVERRIDES, *overrides])
        manifest = train(prepared, str(out), settings, given=given, seed=1, quiet=True, **options)
    return manifest, ray.get(board.lines.remote())


def fit_until_killed(address: str, prepared: str, out: str) -> None:
    """What the killed driver of a test runs."""
    ray.init(address=address, log_to_driver=False)
    fit(prepared, out, board=Board.remote("fit epoch 4", os.getpid()))


def losses(lines: list[str], stage: str = "fit") -> list[float]:
    return [float(line.split("loss ")[1].split(",")[0]) for line in lines if f"encoder: {stage} epoch" in line]


def arrays_of(uri) -> dict[str, np.ndarray]:
    return {f"{name}.{key}": array for name, model in Bundle.open(str(uri)).models.items() for key, array in model.to_arrays()[0].items()}


def assert_same(first, second) -> None:
    expected, found = arrays_of(first), arrays_of(second)
    assert expected.keys() == found.keys()
    assert [name for name, array in expected.items() if not np.array_equal(array, found[name])] == []


@pytest.fixture(scope="module")
def cluster():
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    ray.init(address=nodes.address, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return write_prepared(str(tmp_path_factory.mktemp("planted")), leave_one_out(planted.sequences()), planted.items_table())


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Data without any truth, and without a validation part: what a model knows of an event it can only have seen."""
    walks = planted.sequences()
    items = np.random.default_rng(5).integers(0, 120, len(walks.items)).astype(np.int32)
    return write_prepared(str(tmp_path_factory.mktemp("noise")), dataclasses.replace(walks, items=items), planted.items_table())


@pytest.fixture(scope="module")
def undisturbed(cluster, prepared, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "bundle"
    manifest, lines = fit(prepared, out)
    return out, manifest, lines


def test_the_planted_truth_is_learnt(undisturbed, prepared):
    out, manifest, _ = undisturbed
    bundle = Bundle.open(str(out))
    assert sorted(bundle.models) == ["content", "covisit", "dot_product", "interest", "linear", "popularity", "ranker"]
    assert manifest["fit"] == "train" and manifest["data"]["fingerprint"] == "planted-leave-one-out"
    assert manifest["leakage"] == {
        "retrieval_for_ranker": "fit: training part minus each user's last positions",
        "ranker_learns_on": "180 held-out training positions",
        "chosen_on": "validation part",
        "retrieval_served": "refit: training part",
    }
    # A user's next item is one or two steps ahead in its own cluster: the first places are decided, what comes after them is not.
    answers = [(user, row) for user in range(30) for row in recommend_user(bundle, f"user-{user}", 3).items]
    own = [planted.cluster_of(bundle.item_ids[row]) == user % planted.NUM_CLUSTERS for user, row in answers]
    assert np.mean(own) > 0.95
    metrics = evaluate(prepared, str(out), split="test", bootstrap=0)
    assert metrics["final"]["recall@10"] > 0.8 and metrics["final"]["ndcg@10"] > 0.5
    assert manifest["metrics"]["validation"]["interest"] > 4 * manifest["metrics"]["validation"]["popularity"]
    assert not Path(f"{out}.work").exists(), "checkpoints of a finished run are gone"


def test_kills_change_nothing(undisturbed, cluster, prepared, tmp_path):
    """The driver is killed in the fourth epoch; the same command continues, and loses its worker in the fifth.

    In the end stand the same bits as those of the undisturbed run with the same seed.
    """
    out, manifest, lines = undisturbed
    arguments = f"{cluster.address!r}, {prepared!r}, {str(tmp_path / 'bundle')!r}"
    code = f"from tests.ray.test_train import fit_until_killed; fit_until_killed({arguments})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "bundle").exists() and (tmp_path / "bundle.work").exists()

    again, told = fit(prepared, tmp_path / "bundle", board=Board.remote("fit epoch 5"))
    assert [line for line in told if "continuing" in line] == ["continuing from a checkpoint in stage fit"] * 2
    assert told[0].startswith("continuing")
    # What was saved is not done again; but a checkpoint counts a moment after it is reported, so the epoch before the kill may be.
    expected = losses(lines)
    assert losses(told) in [expected[first:5] + expected[then:] for first in (2, 3) for then in (3, 4)]
    assert again["metrics"] == manifest["metrics"] and again["fusion"] == manifest["fusion"]
    assert_same(out, tmp_path / "bundle")


def test_two_workers_learn_as_one_and_train_plus_valid_says_so(undisturbed, prepared, tmp_path):
    out, manifest, lines = undisturbed
    both, told = fit(prepared, tmp_path / "bundle", overrides=["scaling.workers=2"], fit="train+valid")
    # Every step takes the same sequences; what differs is the order of float additions, and which units dropout turns off.
    assert losses(told) == pytest.approx(losses(lines), rel=0.05)
    assert losses(told)[0] == pytest.approx(losses(lines)[0], rel=0.01)
    validation = manifest["metrics"]["validation"]
    assert both["metrics"]["validation"]["interest"] == pytest.approx(validation["interest"], abs=0.1)
    assert evaluate(prepared, str(tmp_path / "bundle"), split="test", bootstrap=0)["final"]["recall@10"] > 0.8

    assert both["fit"] == "train+valid" and both["leakage"]["retrieval_served"] == "refit: training and validation part"
    name = "covisit.counts" if "covisit.counts" in arrays_of(out) else next(key for key in arrays_of(out) if key.startswith("covisit."))
    assert not np.array_equal(arrays_of(out)[name], arrays_of(tmp_path / "bundle")[name]), "the validation events are in"
    with pytest.raises(ConfigError, match="fitted on train.valid, so its valid figures would be of seen data"):
        evaluate(prepared, str(tmp_path / "bundle"), split="valid", bootstrap=0)


def test_without_a_dashboard_nobody_waits_for_the_cleaner_that_would_ask_it(cluster, monkeypatch):
    def names(kind: type) -> set[str]:
        return {type(callback).__name__ for callback in kind(print)._create_default_callbacks()}

    cleaner = "PlacementGroupCleanerCallback"
    assert names(TorchTrainer) - names(Trainer) == {cleaner}, "or Ray has another name for it now"
    monkeypatch.setattr("raysys.train.trainer.get_dashboard_url", lambda: "127.0.0.1:8265")
    assert cleaner in names(Trainer)


@pytest.fixture(scope="module")
def of_noise(undisturbed, cluster, noise, tmp_path_factory):
    """A run on noise that would take hours without its time budget, on a node with a GPU that is only logical."""
    out = tmp_path_factory.mktemp("noise") / "bundle"
    node = cluster.add_node(num_cpus=1, num_gpus=1)
    forever = ["encoder.epochs=100000", "encoder.patience=100000", "scaling.use_gpu=true"]
    try:
        manifest, lines = fit(noise, out, overrides=forever, time_budget_s=BUDGET_S)
    finally:
        cluster.remove_node(node)
    return out, manifest, lines


def test_models_are_judged_by_events_they_never_saw(of_noise):
    """In noise, a figure above chance means that somebody had learnt from what it is judged by."""
    out, manifest, _ = of_noise
    assert manifest["data"]["split"] == "none" and manifest["leakage"]["chosen_on"] == "held-out training positions of every other user"
    assert manifest["leakage"]["retrieval_served"] == "refit: training part"
    chance = 30 / 110  # candidates, of the items that a history leaves
    assert manifest["metrics"]["ranker"]["recall"] == pytest.approx(chance, abs=0.12)
    # NDCG@10 of a random order of 110 items is 4.54 / 110 = 0.04.
    for name, figure in manifest["metrics"]["validation"].items():
        assert figure < 0.15, f"{name} knows the events it was chosen by"
    assert len(Bundle.open(str(out)).histories) == planted.NUM_USERS


def test_a_time_budget_is_kept(of_noise, undisturbed):
    _, manifest, lines = of_noise
    assert 1 <= manifest["metrics"]["encoder"]["epochs"] == len(losses(lines)) < 100_000
    # Ray takes its time to start, budget or not: at most as long as the whole of the other run.
    assert manifest["seconds"] < BUDGET_S + undisturbed[1]["seconds"]


def test_a_worker_goes_to_the_node_with_a_gpu(of_noise):
    if torch.cuda.is_available():
        pytest.skip("what happens where torch has no CUDA cannot be seen where it has")
    _, _, lines = of_noise
    assert lines[0] == "the node has a GPU, but torch cannot use it: training on the CPU; install torch with CUDA there"


def test_held_out_positions_are_in_no_fit(noise, prepared):
    def recall(part, parts):
        model = Covisitation.fit(part, 120)
        scores = model.scores(parts.all.queries_before(parts.heldout))
        return float(np.mean((scores > scores[np.arange(len(scores)), parts.all.items[parts.heldout]][:, None]).sum(axis=1) < 10))

    parts = Parts(Prepared.open(noise).sequences(), TrainConfig())
    assert recall(parts.fit, parts) < 0.2 and recall(parts.train, parts) > 0.6, "the second has seen them, and it shows"
    for uri in (noise, prepared):
        parts = Parts(Prepared.open(uri).sequences(), TrainConfig())
        heldout = np.zeros(len(parts.all.items), bool)
        heldout[parts.heldout] = True
        chosen = np.zeros(len(parts.all.items), bool)
        chosen[parts.choice] = True
        assert not (heldout & chosen).any()
        assert len(parts.fit.items) + heldout.sum() + (0 if parts.has_validation else chosen.sum()) == len(parts.train.items)
        # Events of the fit, by user: what remains is a prefix of every history, so nothing after a held-out position is in it.
        for user in range(0, len(parts.all), 17):
            history = parts.all.items[parts.all.indptr[user] : parts.all.indptr[user + 1]]
            fitted = parts.fit.items[parts.fit.indptr[user] : parts.fit.indptr[user + 1]]
            assert 0 < len(fitted) < len(history) and np.array_equal(fitted, history[: len(fitted)])
            first = min(np.flatnonzero((heldout | chosen) & (parts.all.rows == user)) - parts.all.indptr[user])
            assert len(fitted) == first


def test_what_the_cluster_cannot_give_is_one_line(cluster, prepared, tmp_path):
    for overrides, message in [
        (["scaling.workers=3"], "scaling asks for 3 workers of 1 CPUs, the cluster's nodes have 2"),
        (["scaling.cpus_per_worker=4"], "scaling asks for 1 workers of 4 CPUs"),
        (["scaling.workers=0"], "expected at least one worker with one CPU, got 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            fit(prepared, tmp_path / "bundle", overrides=overrides)
    with pytest.raises(SchemaError, match="expected a prepared set"):
        fit(str(tmp_path), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
