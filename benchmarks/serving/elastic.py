"""Load rises and falls on a cluster that adds GPU nodes by itself: replicas follow the load, nodes follow the replicas, no request fails.

    raysys bench serving/elastic --bundle BUNDLE --prepared PREPARED [--out runs/elastic] [--clients 16] [--load-s 90] [--nodes 3]

Needs no GPU: nodes with one logical GPU each come from Ray's fake node provider and its real autoscaler, on this machine. Retrieval
asks for a GPU as in deploy/serve_config.gpu.yaml and waits 50 ms a batch, without computing, for the time that a device would take;
what the processors here can compute is not what is scaled.

Leaves `elastic.json` (the shape that benchmarks/scale/README.md describes) and `elastic.png`.
"""

import argparse
import contextlib
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from raysys import config, storage
from raysys.prepare.dataset import Prepared
from raysys.registry import Registry
from raysys.serve.launch import MARKER, PRIVATE_CLUSTER, family
from raysys.serve.settings import FAST_SETTINGS

HERE = Path(__file__).resolve().parent
GPU_CONFIG = HERE.parents[1] / "deploy" / "serve_config.gpu.yaml"
QUIET_S, PATIENCE_S, WINDOW_S = 15.0, 300.0, 2.0
SCALING = {
    "min_replicas": 1,
    "target_ongoing_requests": 3,
    "upscale_delay_s": 2,
    "downscale_delay_s": 8,
    "metrics_interval_s": 1,
    "look_back_period_s": 4,
}
"""As in deploy/, but a load of a few clients counts and nobody waits for minutes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--prepared", required=True, help="the prepared set, for user ids")
    parser.add_argument("--out", default="runs/elastic", help="folder of the JSON and the plot (default: runs/elastic)")
    parser.add_argument("--clients", type=int, default=16, help="under load; one otherwise")
    parser.add_argument("--load-s", type=float, default=90.0, help="seconds of load")
    parser.add_argument("--nodes", type=int, default=3, help="GPU nodes at most")
    arguments = parser.parse_args()
    users = Prepared.open(arguments.prepared).users()["user_id"].to_pylist()[:500]
    found = run(arguments.bundle, users, clients=arguments.clients, load_s=arguments.load_s, nodes=arguments.nodes)
    storage.write_json(storage.join(arguments.out, "elastic.json"), found)
    plot(found, str(Path(arguments.out) / "elastic.png"))
    for bar in found["bars"]:
        print(f"{bar['what']:<40}{bar['bar']:>8}{bar['measured']:>8}  {'met' if bar['met'] else 'MISSED'}")


def run(bundle: str, users: list[str], *, clients: int, load_s: float, nodes: int) -> dict:
    """One quiet time, one of load, and as long as it takes until all is as it was.

    Args:
        bundle: what is served.
        users: asked for in turn.
        clients: each sends its next request when it has its answer.
        load_s: seconds of load.
        nodes: GPU nodes at most.
    """
    import ray

    with tempfile.TemporaryDirectory(prefix="raysys-elastic-", ignore_cleanup_errors=True) as folder, cluster(folder, nodes) as address:
        Registry(f"{folder}/registry").publish(bundle)
        with serving(folder, address, nodes) as port:
            ray.init(address=address, log_to_driver=False)
            try:
                watch, load = Watch(), Load(port, users)
                with watch, load:
                    watch.wait(QUIET_S)
                    load.clients = clients
                    watch.wait(load_s)
                    load.clients = 1
                    quiet = time.monotonic()
                    while watch.timeline[-1]["gpu_nodes"] > 1 and time.monotonic() - quiet < PATIENCE_S:
                        watch.wait(1.0)
                    watch.wait(QUIET_S)
            finally:
                ray.shutdown()
    return report(watch.timeline, load, clients=clients, load_s=load_s, nodes=nodes)


@contextlib.contextmanager
def cluster(folder: str, nodes: int) -> Iterator[str]:
    """A head without GPUs and an autoscaler that may add nodes of one logical GPU; its address."""
    from ray.util import get_node_ip_address

    token, port = secrets.token_hex(8), free_port()
    address = f"{get_node_ip_address()}:{port}"
    path = Path(folder) / "cluster.json"
    path.write_text(json.dumps(autoscaling(address, nodes)))
    environment = {
        **os.environ,
        **FAST_SETTINGS,
        **{name: value for name, value in PRIVATE_CLUSTER.items() if name != "RAY_ADDRESS"},
        MARKER: token,
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),  # not those of a service that runs beside this
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_raylet_start_wait_time_s": "240",  # a busy machine starts its nodes in minutes, not in seconds
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(HERE)])),  # _elastic_app, for every worker
    }
    os.environ["RAY_AUTH_MODE"] = "disabled"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", f"--autoscaling-config={path}"]
    flags = ["--num-cpus=2", "--num-gpus=0", "--include-dashboard=false", "--disable-usage-stats"]
    try:
        log = Path(folder) / "ray.log"
        if subprocess.run([*command, *flags], env=environment, stdout=log.open("wb"), stderr=subprocess.STDOUT).returncode:
            raise SystemExit(f"ray start failed; end of its log:\n{log.read_text()[-3000:]}")
        yield address
    finally:
        for pid in family(f"{MARKER}={token}".encode()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def autoscaling(address: str, nodes: int) -> dict:
    """Settings of Ray's autoscaler with its fake node provider, which starts nodes as processes of this machine."""
    provider = {
        "type": "fake_multinode",
        "gcs_address": address,
        "use_node_id_as_ip": True,
        "use_internal_ips": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "head_node_id": "f" * 51 + "00000",  # Ray knows its head by this
    }
    gpu = {"resources": {"CPU": 1, "GPU": 1, "object_store_memory": 100_000_000}, "node_config": {}, "min_workers": 0, "max_workers": nodes}
    empty_lists = ("setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    return {
        "cluster_name": "elastic",
        "max_workers": nodes,
        "provider": provider,
        "available_node_types": {"ray.head.default": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0}, "gpu": gpu},
        "head_node_type": "ray.head.default",
        "upscaling_speed": 20,
        "idle_timeout_minutes": 0.2,
        "auth": {"ssh_user": "ray", "ssh_private_key": "/dev/null"},
        **{name: [] for name in (*empty_lists, "initialization_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter")},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "docker": {},
    }


@contextlib.contextmanager
def serving(folder: str, address: str, nodes: int) -> Iterator[int]:
    """`serve run` of deploy/serve_config.gpu.yaml on the cluster; its port once it answers with a model."""
    values, port = config.read_yaml(str(GPU_CONFIG)), free_port()
    values["http_options"] = {"host": "127.0.0.1", "port": port}
    (application,) = values["applications"]
    application["import_path"] = "_elastic_app:build"
    application["args"] |= {name: f"{folder}/{name}" for name in ("registry", "events", "state")}
    for deployment in application["deployments"]:
        if deployment["name"] == "Retrieval":
            deployment |= {"autoscaling_config": {**SCALING, "max_replicas": nodes}, "ray_actor_options": {"num_cpus": 0.5, "num_gpus": 1}}
        else:  # one of each, so that it is the GPU replicas that scale
            deployment["autoscaling_config"] = {"min_replicas": 1, "max_replicas": 1}
            if deployment["name"] == "Ranking":
                deployment["ray_actor_options"] = {"num_cpus": 0.5}
    path, log = Path(folder) / "serve.json", Path(folder) / "serve.log"
    path.write_text(json.dumps(values))
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.serve.scripts", "run", str(path)],
        env={**os.environ, **FAST_SETTINGS, "RAY_ADDRESS": address},
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
    )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while get(port, "/health/ready") != 200:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the service did not come up; end of its log:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()


class Load:
    """Clients that each ask again when they have their answer; `clients` of them at a time."""

    def __init__(self, port: int, users: list[str]):
        self.port, self.users, self.clients = port, users, 1
        self.answers: list[tuple[float, float]] = []
        self.failures: list[tuple[float, str]] = []
        self.degraded: Counter[str] = Counter()
        self._done = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Load":
        starter = threading.Thread(target=self._start, daemon=True)
        self._threads.append(starter)
        starter.start()
        return self

    def __exit__(self, *error) -> None:
        self._done.set()
        for thread in list(self._threads):
            thread.join(timeout=40)

    def _start(self) -> None:
        number = 0
        while not self._done.wait(0.1):
            while number < self.clients:
                thread = threading.Thread(target=self._client, args=(number,), daemon=True)
                self._threads.append(thread)
                thread.start()
                number += 1

    def _client(self, number: int) -> None:
        connection, turn = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30), number
        while not self._done.is_set():
            if number >= self.clients:
                time.sleep(0.2)
                continue
            turn, started = turn + 1, time.monotonic()
            try:
                body = json.dumps({"user_id": self.users[turn % len(self.users)], "n": 10})
                connection.request("POST", "/v1/recommend", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                text = response.read()
                answer = json.loads(text) if response.status == 200 else {}
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                self.failures.append((started, repr(error)))
                continue
            if len(answer.get("items", ())) != 10:
                self.failures.append((started, f"HTTP {response.status}: {text[:200]!r}"))
            else:
                self.answers.append((started, (time.monotonic() - started) * 1000))
                if answer["degraded"]:
                    self.degraded[answer["degraded_reason"]] += 1


class Watch:
    """Nodes with a GPU and replicas of retrieval, once a second."""

    def __init__(self) -> None:
        self.timeline: list[dict] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self._look_once()
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._done.set()
        self._thread.join(timeout=20)

    def wait(self, seconds: float) -> None:
        self._done.wait(seconds)

    def _look(self) -> None:
        while not self._done.wait(1.0):
            self._look_once()

    def _look_once(self) -> None:
        import ray
        from ray import serve

        gpu_nodes = sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU"))
        replicas = serve.status().applications["raysys"].deployments["Retrieval"].replica_states.get("RUNNING", 0)
        self.timeline.append({"at": time.monotonic(), "gpu_nodes": gpu_nodes, "replicas": replicas})


def report(timeline: list[dict], load: Load, *, clients: int, load_s: float, nodes: int) -> dict:
    """Figures, bars and the timeline in windows of WINDOW_S."""
    first, last = timeline[0]["at"], timeline[-1]["at"]
    windows = []
    for number in range(int((last - first) / WINDOW_S)):
        low, high = first + number * WINDOW_S, first + (number + 1) * WINDOW_S
        times = sorted(ms for at, ms in load.answers if low <= at < high)
        looks = [look for look in timeline if low <= look["at"] < high] or [timeline[-1]]
        windows.append(
            {
                "series": "timeline",
                "s": number * WINDOW_S,
                "rps": len(times) / WINDOW_S,
                "p50_ms": times[len(times) // 2] if times else None,
                "p99_ms": times[int(0.99 * len(times))] if times else None,
                "failed": sum(1 for at, _ in load.failures if low <= at < high),
                "gpu_nodes": looks[-1]["gpu_nodes"],
                "replicas": looks[-1]["replicas"],
            }
        )
    most = {name: max(look[name] for look in timeline) for name in ("gpu_nodes", "replicas")}
    end = {name: timeline[-1][name] for name in ("gpu_nodes", "replicas")}
    bars = [
        {"what": "GPU nodes under load", "bar": f">= {nodes}", "measured": most["gpu_nodes"], "met": most["gpu_nodes"] >= nodes},
        {"what": "retrieval replicas under load", "bar": f">= {nodes}", "measured": most["replicas"], "met": most["replicas"] >= nodes},
        {"what": "GPU nodes afterwards", "bar": "== 1", "measured": end["gpu_nodes"], "met": end["gpu_nodes"] == 1},
        {"what": "requests that failed", "bar": "== 0", "measured": len(load.failures), "met": not load.failures},
    ]
    return {
        "name": "elastic",
        "rows": windows,
        "figures": {
            "requests": len(load.answers) + len(load.failures),
            "degraded answers": load.degraded.total(),
            "why": "; ".join(f"{count} x {reason}" for reason, count in load.degraded.most_common(3)) or None,
            "failures": "; ".join(text for _, text in load.failures[:5]) or None,
        },
        "bars": bars,
        "about": {
            "clients": clients,
            "load_s": load_s,
            "nodes": f"at most {nodes}, one logical GPU each, processes of one machine with {os.cpu_count()} cores",
            "device": "retrieval waits 50 ms a batch in place of one",
            "scaling": json.dumps(SCALING),
        },
    }


def plot(found: dict, path: str) -> None:
    """Load, replicas and nodes, latency over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from raysys.evaluate.plots import FINAL, RETRIEVAL, SOURCES, STYLE

    windows, about, figures = found["rows"], found["about"], found["figures"]
    seconds = [window["s"] for window in windows]
    with matplotlib.rc_context(STYLE):
        figure, (load, size, latency) = plt.subplots(3, 1, sharex=True, figsize=(8, 7), layout="constrained")
        load.plot(seconds, [window["rps"] for window in windows], color=FINAL)
        load.set_ylabel("answers a second")
        failed = [(window["s"], window["rps"]) for window in windows if window["failed"]]
        load.scatter(*zip(*failed, strict=True) if failed else ([], []), color=SOURCES[5], label="failed requests", zorder=3)
        load.set_title(
            f"{about['clients']} clients for {about['load_s']:.0f} s, one before and after; "
            f"{figures['requests']:,} requests, {sum(window['failed'] for window in windows)} failed\n"
            "logical GPUs on one machine; retrieval waits 50 ms a batch in place of a device",
            loc="left",
        )
        size.step(seconds, [window["replicas"] for window in windows], where="post", color=RETRIEVAL, label="retrieval replicas")
        size.step(seconds, [window["gpu_nodes"] for window in windows], where="post", color=SOURCES[0], linestyle="--", label="GPU nodes")
        size.set_ylabel("number")
        size.set_ylim(bottom=0)
        size.legend()
        for name, colour in (("p50_ms", FINAL), ("p99_ms", SOURCES[1])):
            latency.plot(seconds, [window[name] for window in windows], color=colour, label=name.partition("_")[0])
        latency.set_ylabel("milliseconds")
        latency.set_yscale("log")
        latency.set_xlabel("seconds")
        latency.legend()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def get(port: int, path: str) -> int:
    """Status of a call, 0 without an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
