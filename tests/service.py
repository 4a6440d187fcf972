"""A running service as a client and as an operator see it."""

import json
import os
import socket
import urllib.error
import urllib.request
from pathlib import Path

from raysys import config
from raysys.registry import Registry

ROOT = Path(__file__).parents[1]


def call(base_url: str, method: str, path: str, body: object = None) -> tuple[int, dict]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(base_url + path, data=data, method=method, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def ids(base_url: str, **body) -> list[str]:
    status, answer = call(base_url, "POST", "/v1/recommend", body)
    assert status == 200, answer
    return [item["item_id"] for item in answer["items"]]


def replica_pids(name: str) -> list[int]:
    """Processes of a deployment's replicas in this test run; a service that the machine has besides is left alone."""
    found, mine = [], f"RAYSYS_TEST_RUN={os.environ['RAYSYS_TEST_RUN']}".encode()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                line = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                environment = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if "ServeReplica" in line and f":{name}" in line and mine in environment:
                found.append(int(entry))
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def apart_config() -> dict:
    """serve_config.yaml with retrieval and ranking in deployments of their own, as its comments say."""
    values = config.read_yaml(str(ROOT / "serve_config.yaml"))
    application = values["applications"][0]
    application["args"] = {"placement": "apart"}
    application["deployments"] += [{"name": name, "ray_actor_options": {"num_cpus": 0.3}} for name in ("Retrieval", "Ranking")]
    return values


def published(folder: Path, bundle: str) -> dict[str, str]:
    """Where a service in this folder has registry, log and state, the bundle published."""
    registry = str(folder / "registry")
    Registry(registry).publish(bundle)
    return {"registry": registry, "events": str(folder / "events"), "state": str(folder / "state")}
