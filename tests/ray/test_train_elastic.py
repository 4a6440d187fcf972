"""Nodes come and go under a training whose item table is cut by rows: one worker, two, one again, and the loss curve goes on."""

import re
import threading

import pytest
import ray
from ray.cluster_utils import Cluster

from tests import planted
from tests.boards import Gates, training_workers
from tests.prepared import leave_one_out, write_prepared
from tests.ray.test_train import fit, losses

STILL = ["interest.dropout=0", "scaling.cpus_per_worker=1"]
ELASTIC = [
    *STILL,
    "encoder.checkpoint_steps=2",
    "scaling={workers: 2, min_workers: 1, shard_items: true, resize_every_s: 2}",
]


@pytest.fixture
def cluster(monkeypatch):
    # How long Ray Train waits for a node that has died before it counts again: nothing brings nodes here but the test.
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    # A thread adds a node, and the handlers of an orderly exit can be set in the main thread only.
    nodes = Cluster(initialize_head=True, shutdown_at_exit=False, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=nodes.address, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def workers_by_node(cluster: Cluster) -> list[int]:
    """Number of training workers on each node, the head first."""
    raylets = [node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()]
    return [len(training_workers(raylet)) for raylet in raylets]


@pytest.mark.slow
def test_one_worker_becomes_two_and_one_again(cluster, tmp_path):
    prepared = write_prepared(str(tmp_path / "planted"), leave_one_out(planted.sequences()), planted.items_table())
    _, lines = fit(prepared, tmp_path / "still", overrides=STILL)
    board, groups = Gates.remote(["fit epoch 2", "fit epoch 4"]), []

    def come_and_go() -> None:
        ray.get(board.reached.remote("fit epoch 2"))
        groups.append(workers_by_node(cluster))
        node = cluster.add_node(num_cpus=1)  # the gate stays shut: the group that stands before it is ended, two workers go on
        ray.get(board.reached.remote("fit epoch 4"))
        groups.append(workers_by_node(cluster))
        cluster.remove_node(node, allow_graceful=False)
        ray.get(board.open.remote("fit epoch 4"))

    thread = threading.Thread(target=come_and_go, daemon=True)
    thread.start()
    _, told = fit(prepared, tmp_path / "elastic", board=board, overrides=ELASTIC)
    thread.join(timeout=5)
    assert groups == [[1], [1, 1]] and not thread.is_alive()
    # On a machine that hardly answers Ray may end a group once more; that must not change the curve either.
    restarts = sum(line == "continuing from a checkpoint in stage fit" for line in told)
    assert restarts >= 2
    # Without dropout the only difference is the order of float additions. The epochs before a gate are told of twice:
    # their checkpoint comes after the line, and the one of the epoch before may not count yet.
    expected = dict(enumerate(losses(lines), 1))
    epochs = [int(re.search(r"epoch (\d+)", line)[1]) for line in told if "encoder: fit epoch" in line]
    assert sorted({*epochs}) == sorted(expected) and len(epochs) <= len(expected) + 2 * restarts
    assert losses(told) == pytest.approx([expected[epoch] for epoch in epochs], rel=0.01)
    assert losses(told, "refit") == pytest.approx(losses(lines, "refit"), rel=0.02)
