"""Start the service with the fast settings, and stop everything that was started.

Ray and Serve read the settings from the environment of the process that starts
them, so this must run before Ray does. HAProxy outlives Serve and `ray stop`;
it is found by what it listens on and ended here.
"""

import contextlib
import copy
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raysys import config, storage
from raysys.errors import ConfigError, RaysysError
from raysys.serve.keys import FILE_VARIABLE, KEY_VARIABLE, keys_are_set
from raysys.serve.settings import FAST_SETTINGS

READY_TIMEOUT_S = 120.0
START_TIMEOUT_S = 1800.0
"""Of `raysys serve`: the first start over a million items builds an index, which takes minutes. A service that ends is noticed at once."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MARKER = "RAYSYS_SERVICE"
PRIVATE_CLUSTER = {
    "RAY_ADDRESS": "local",  # `serve run` would otherwise join whatever cluster it finds on the machine
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_WAIT_POLICY": "PASSIVE",  # replicas share the processors; see cluster.py
    "GOMP_SPINCOUNT": "0",
    # Nobody routes to this node after Ctrl-C, so nothing has to be drained for half a minute.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "1",
    # A proxy that takes longer than 5 s, on a busy machine, would be killed, and `serve run` would give up.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "45",
}
HAPROXY_PORTS = (8404, 9101)
"""HAProxy's own statistics ports; all interfaces."""


def launch(
    config_path: str,
    *,
    host: str | None = None,
    port: int | None = None,
    registry: str | None = None,
    events: str | None = None,
    state: str | None = None,
    insecure: bool = False,
) -> None:
    """`raysys serve`: run until Ctrl-C or SIGTERM.

    Raises:
        ConfigError: the config file is wrong, the port is taken, or another host than loopback is asked for without an API key.
    """
    # A shell that starts this in the background has SIGINT ignored, and every child would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with running_service(
        registry=registry,
        events=events,
        state=state,
        host=host,
        port=port,
        config_path=config_path,
        insecure=insecure,
        require_model=False,
        ready_s=START_TIMEOUT_S,
    ) as base_url:
        print(f"raysys serves at {base_url} (API: {base_url}/docs); Ctrl-C stops it", flush=True)
        ready = _health(f"{base_url}/health/ready")
        if ready["status"] != "ready":
            print(f"not ready: {ready['status']}", flush=True)
        for warning in ready.get("warnings", ()):
            print(f"warning: {warning}", flush=True)
        try:
            signal.pause()
        except (KeyboardInterrupt, SystemExit):
            print("stopping", flush=True)


@contextlib.contextmanager
def running_service(
    *,
    registry: str | None = None,
    events: str | None = None,
    state: str | None = None,
    host: str | None = None,
    port: int | None = None,
    config_path: str | None = None,
    insecure: bool = False,
    fast: bool = True,
    require_model: bool = True,
    ready_s: float = READY_TIMEOUT_S,
) -> Iterator[str]:
    """A service on a Ray cluster of its own, as a base URL, while the block runs.

    The service is a child process in a session of its own, so that all of it
    (Ray, Serve, HAProxy) can be ended together, however this process ends.

    Args:
        registry: published bundles; default as in `AppArgs`.
        events: event log, likewise.
        state: online state, likewise.
        host: address to listen on; the config file's when None.
        port: TCP port, likewise.
        config_path: a Serve config; the package's own when None or missing.
        insecure: allow another host than loopback without an API key.
        fast: set the fast settings (a benchmark turns them off).
        require_model: wait until a model is loaded, not only until it answers.
        ready_s: seconds that is waited for.

    Raises:
        ConfigError: see `launch`.
        RaysysError: it did not come up; with the end of its log.
    """
    serve_config = _serve_config(config_path)
    http = serve_config.setdefault("http_options", {})
    http["host"] = host or http.get("host", "127.0.0.1")
    http["port"] = port or http.get("port", 8000)
    if http["host"] not in LOOPBACK and not insecure and not keys_are_set():
        raise ConfigError(
            f"host {http['host']}: expected {KEY_VARIABLE} or {FILE_VARIABLE} to be set when listening beyond this machine; "
            "set one, or pass --insecure"
        )
    arguments = serve_config["applications"][0].setdefault("args", {}) or {}
    given = {"registry": registry, "events": events, "state": state}
    serve_config["applications"][0]["args"] = {**arguments, **{name: value for name, value in given.items() if value}}
    for wanted in (http["port"], *(HAPROXY_PORTS if fast else ())):
        require_free(wanted)
    token = secrets.token_hex(8)
    with tempfile.TemporaryDirectory(prefix="raysys-serve-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "serve_config.json"
        path.write_text(json.dumps(serve_config))
        log_path = Path(folder) / "serve.log"
        with open(log_path, "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "ray.serve.scripts", "run", str(path)],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **(FAST_SETTINGS if fast else {}), **PRIVATE_CLUSTER, MARKER: token},
            )
        base_url = f"http://{http['host'] if http['host'] != '0.0.0.0' else '127.0.0.1'}:{http['port']}"
        try:
            _wait(base_url, process, log_path, "ready" if require_model else "live", ready_s)
            yield base_url
        finally:
            _stop(process, http["port"], f"{MARKER}={token}".encode())


def _serve_config(path: str | None) -> dict[str, Any]:
    if path is not None and (storage.exists(path) or path != "serve_config.yaml"):
        return copy.deepcopy(config.read_yaml(path))
    beside = Path(__file__).resolve().parents[2] / "serve_config.yaml"
    if not beside.exists():
        raise ConfigError("expected serve_config.yaml in the working directory; pass --config FILE")
    return config.read_yaml(str(beside))


def _wait(base_url: str, process: subprocess.Popen, log_path: Path, wanted: str, ready_s: float) -> None:
    deadline = time.monotonic() + ready_s
    path = "/health/ready" if wanted == "ready" else "/health/live"
    reason = "no answer"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RaysysError(f"the service ended with status {process.returncode} while starting:\n{_tail(log_path)}")
        reason = _health(base_url + path)["status"]
        if reason == wanted:
            return
        time.sleep(0.2)
    raise RaysysError(f"the service did not become {wanted} within {ready_s:.0f} s ({reason}); end of its log:\n{_tail(log_path)}")


def _health(url: str) -> dict[str, Any]:
    """A health call's answer; `status` holds what went wrong where it is not one."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return {"status": "unknown", **json.loads(response.read())}
    except urllib.error.HTTPError as error:
        try:
            return {"status": json.loads(error.read())["error"]["message"]}
        except (ValueError, KeyError):
            return {"status": f"HTTP {error.code}"}
    except (OSError, ValueError, TypeError) as error:
        return {"status": str(error)}


def _tail(path: Path, lines: int = 25) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def _stop(process: subprocess.Popen, port: int, marker: bytes) -> None:
    """End the service's session: politely, then by force, HAProxy included."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
    for pid in family(marker):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30  # Serve's own proxy takes its time to let go of the port, and the kernel when that has been killed
    while not is_free(port) and time.monotonic() < deadline:
        time.sleep(0.1)


def family(marker: bytes) -> list[int]:
    """Every process whose environment carries the marker: Ray starts its daemons in groups of their own, the environment stays."""
    members = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                if marker in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                    members.append(int(entry))
    return members


def require_free(port: int) -> None:
    """Check that nobody listens on a port.

    Raises:
        ConfigError: naming the process that does.
    """
    if not is_free(port):
        holder = port_holder(port) or "another process"
        raise ConfigError(f"port {port}: expected it to be free, {holder} holds it; stop that process or choose another port")


def is_free(port: int) -> bool:
    """Whether a service could listen on a port of this machine now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))
            return True
    return False


def port_holder(port: int) -> str | None:
    """Name and pid of the process that listens on a TCP port of this machine; None when nobody does or it is not ours to see."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    for entry in os.listdir("/proc") if inodes else []:
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            for descriptor in os.listdir(f"/proc/{entry}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{entry}/fd/{descriptor}") in inodes:
                        name = Path(f"/proc/{entry}/comm").read_text().strip()
                        return f"process {entry} ({name})"
    return None
