"""A node dies under a training whose item table is cut over two nodes: it goes on with one worker where the loss curve was."""

import threading
import time

import pytest
import ray
from ray.cluster_utils import Cluster

from tests import planted
from tests.boards import Board
from tests.prepared import leave_one_out, write_prepared
from tests.ray.test_train import fit, losses

STILL = ["interest.dropout=0", "scaling.cpus_per_worker=1"]


@pytest.fixture
def cluster():
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=nodes.address, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.mark.slow
def test_two_workers_become_one_when_a_node_dies(cluster, tmp_path):
    prepared = write_prepared(str(tmp_path / "planted"), leave_one_out(planted.sequences()), planted.items_table())
    _, lines = fit(prepared, tmp_path / "one", overrides=STILL)
    node, board = cluster.add_node(num_cpus=1), Board.remote()

    def remove_node() -> None:
        while not any("fit epoch 2" in line for line in ray.get(board.lines.remote())):
            time.sleep(0.2)
        cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=remove_node, daemon=True)
    thread.start()
    # Long enough for the node to die before the fit is over: an epoch takes a fraction of a second.
    both = [*STILL, "scaling.workers=2", "scaling.min_workers=1", "scaling.shard_items=true", "encoder.checkpoint_steps=2"]
    _, told = fit(prepared, tmp_path / "two", board=board, overrides=both)
    thread.join(timeout=5)
    assert not thread.is_alive() and any(line.startswith("continuing from a checkpoint") for line in told)
    assert losses(told)[:2] == pytest.approx(losses(lines)[:2], rel=1e-3)
    assert losses(told)[-1] == pytest.approx(losses(lines)[-1], rel=0.02)
    assert losses(told, "refit")[-1] == pytest.approx(losses(lines, "refit")[-1], rel=0.05)
