"""cluster.yaml against Ray's own schema, and against what the code expects of its nodes."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import fillout_defaults, validate_config

from raysys.serve.settings import FAST_SETTINGS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cluster() -> dict:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_ray_accepts_it(cluster):
    validate_config(cluster)
    validate_config(fillout_defaults(cluster))


def test_ray_would_refuse_a_misspelt_key(cluster):
    """The check above can fail."""
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config({**cluster, "idle_timeout": 5})


def test_head_has_no_gpu_and_gpu_workers_start_from_zero(cluster):
    types = cluster["available_node_types"]
    assert "GPU" not in types[cluster["head_node_type"]]["resources"]
    gpu = [kind for kind in types.values() if kind["resources"].get("GPU")]
    assert gpu and all(kind["min_workers"] == 0 < kind["max_workers"] for kind in gpu)
    assert cluster["max_workers"] >= sum(kind.get("max_workers", 0) for kind in types.values())


def test_environment_of_the_nodes(cluster, tmp_path):
    """Runs the commands that write the environment file, and reads it back as `ray start` would see it."""
    (tmp_path / "raysys-secrets.env").write_text("export RAYSYS_API_KEY=secret\n")
    commands = [command for command in cluster["setup_commands"] if "raysys.env" in command]
    script = "\n".join([*commands, ". ~/raysys.env", "env -0"])
    outside = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    output = subprocess.run(["bash", "-ec", script], env=outside, capture_output=True, text=True, check=True).stdout
    seen = dict(entry.split("=", 1) for entry in output.split("\0") if "=" in entry)
    assert FAST_SETTINGS.items() <= seen.items()
    assert seen["OMP_WAIT_POLICY"] == "PASSIVE"
    assert seen["RAYSYS_API_KEY"] == "secret"
    for name in ("RAYSYS_REGISTRY", "RAYSYS_EVENTS", "RAYSYS_STATE"):
        assert "://" in seen[name] or os.path.isabs(seen[name]), name


def test_every_ray_process_starts_with_that_environment(cluster):
    starts = [command for kind in ("head", "worker") for command in cluster[f"{kind}_start_ray_commands"] if "ray start" in command]
    assert len(starts) == 2
    assert all(command.startswith(". ~/raysys.env;") for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]


def test_nodes_install_from_the_checkout_with_its_constraints(cluster):
    install = next(command for command in cluster["setup_commands"] if "sh install.sh" in command)
    remote = install.removeprefix("cd ~/").split(" ")[0]
    assert cluster["file_mounts"][f"/home/{cluster['auth']['ssh_user']}/{remote}"] == "."
    assert "-c constraints.txt" in (ROOT / "install.sh").read_text()
