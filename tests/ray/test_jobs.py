"""The jobs as users start them: `ray job submit --working-dir . -- python jobs/NAME.py ...` on a cluster with a job server."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl
import pytest
from ray.cluster_utils import Cluster

from raysys.bundle import read_manifest
from raysys.events.embedded_log import EmbeddedLog
from raysys.registry import Registry
from raysys.train.config import load_train_config
from tests import planted
from tests.prepared import leave_one_out, write_prepared

ROOT = Path(__file__).parents[2]
QUICK = [
    "--set=interest={dim: 16, num_layers: 1, max_length: 16}",
    "--set=encoder={epochs: 2, batch_size: 32, lr: 5e-3, warmup_steps: 5, validate_every: 1}",
    "--set=ranker.epochs=1",
    "--set=dot_product.steps=20",
    "--set=refit_epochs=1",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server():
    """Address of the job server of a private cluster."""
    with pytest.MonkeyPatch.context() as patch:
        # A job runs `python` of the node it lands on.
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        patch.delenv("RAY_ADDRESS", raising=False)
        # A job joins the newest cluster of its temporary folder: with a shared one, that may be somebody else's.
        folder = tempfile.mkdtemp(prefix="raysys-")
        # Dashboard and job agent listen on fixed ports of the machine unless told otherwise; another cluster may have them.
        dashboard_port, agent_port = free_port(), free_port()
        head = {
            "num_cpus": 2,
            "include_dashboard": True,
            "temp_dir": folder,
            "dashboard_port": dashboard_port,
            "dashboard_agent_listen_port": agent_port,
        }
        cluster = Cluster(initialize_head=True, head_node_args=head)
        yield f"http://{cluster.head_node.webui_url}"
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def submit(server: str, name: str, *arguments: str) -> tuple[int, str]:
    """Exit status and output of a job, started as the README says."""
    ray_command = str(Path(sys.executable).with_name("ray"))
    command = [ray_command, "job", "submit", "--address", server, "--working-dir", ".", "--", "python", f"jobs/{name}.py", *arguments]
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        output = done.stdout + done.stderr
        # A young cluster answers before the agent that runs jobs is there.
        if "No available agent" not in output or time.monotonic() > deadline:
            return done.returncode, output
        time.sleep(1)


def succeed(server: str, name: str, *arguments: str) -> str:
    status, output = submit(server, name, *arguments)
    assert status == 0, output
    return output


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    walks = planted.sequences()
    users, items = planted.user_ids(), planted.items_table()["item_id"].to_pylist()
    frame = {
        "user_id": [users[row] for row in walks.rows],
        "item_id": [items[item] for item in walks.items],
        "timestamp": walks.times,
    }
    pl.DataFrame(frame).write_parquet(folder / "interactions.parquet")
    return str(folder)


def test_prepare_and_publish(server, data, planted_bundle, tmp_path):
    output = succeed(server, "prepare", "--data", data, "--out", f"{tmp_path}/prepared")
    assert "raysys train --prepared" in output
    assert json.loads((tmp_path / "prepared" / "manifest.json").read_text())["counts"]["users"] == planted.NUM_USERS
    output = succeed(server, "publish", planted_bundle, "--registry", f"{tmp_path}/registry")
    version = read_manifest(planted_bundle)["version"]
    assert version in output and Registry(f"{tmp_path}/registry").current().version == version


def test_a_relative_path_is_refused(server):
    # It would be written into the job's copy of the working directory, which is deleted with the job.
    status, output = submit(server, "publish", "runs/bundle", "--registry", "/nowhere")
    assert status != 0
    assert "publish: error: BUNDLE: expected an absolute path or a URI inside a submitted job, got 'runs/bundle'" in output
    assert "Traceback" not in output.split("raysys publish: error")[0]


@pytest.mark.slow
def test_every_other_job(server, data, tmp_path):
    prepared = write_prepared(f"{tmp_path}/planted", leave_one_out(planted.sequences()), planted.items_table())
    at = {name: f"{tmp_path}/{name}" for name in ("bundle", "metrics.json", "report.html", "registry", "events", "state", "tuned", "whole")}

    output = succeed(server, "train", "--prepared", prepared, "--out", at["bundle"], "--seed", "1", *QUICK)
    assert "encoder: fit epoch 2" in output and "fusion weights" in output, "progress reaches whoever submitted the job"
    succeed(
        server,
        "evaluate",
        *("--prepared", prepared, "--model", at["bundle"], "--out", at["metrics.json"], "--report", at["report.html"]),
    )
    assert json.loads(Path(at["metrics.json"]).read_text())["final"]["ndcg@10"] > 0.3
    assert Path(at["report.html"]).stat().st_size > 10_000
    succeed(server, "publish", at["bundle"], "--registry", at["registry"])
    assert "item-" in succeed(server, "recommend", "--model", at["bundle"], "--user", "user-3", "-k", "3")

    log = EmbeddedLog(at["events"], writable=True)
    views = [{"user_id": "user-1", "item_id": f"item-{n:03d}", "event": "view", "timestamp": 2e9 + n} for n in range(9)]
    log.append([{"kind": "event", **view} for view in views])
    locations = ["--registry", at["registry"], "--events", at["events"], "--state", at["state"]]
    succeed(server, "online", *locations, "--once", "--set=margin=1.0")
    assert Registry(at["registry"]).current().version != read_manifest(at["bundle"])["version"]
    succeed(server, "rollback", "--registry", at["registry"])
    assert Registry(at["registry"]).current().version == read_manifest(at["bundle"])["version"]

    search = "--set=search={encoder.lr: {loguniform: [1e-3, 1e-2]}}"
    succeed(server, "tune", "--prepared", prepared, "--out", at["tuned"], "--samples", "2", *QUICK, search)
    assert load_train_config(f"{at['tuned']}/best.yaml", [])[0].interest.dim == 16

    output = succeed(server, "pipeline", "--data", data, "--out", at["whole"], "--registry", f"{tmp_path}/second", *QUICK)
    assert Registry(f"{tmp_path}/second").current().version in output
    assert json.loads(Path(f"{at['whole']}/metrics.json").read_text())["split"] == "test"
    succeed(server, "import_data", "synthetic", "--out", f"{tmp_path}/synthetic", "--users", "50", "--items", "20", "--events", "500")
    assert (tmp_path / "synthetic" / "items.parquet").exists()
