"""Latency and throughput of `POST /v1/recommend`, beside a no-op app with the same hops in the same run.

    raysys bench serving --bundle BUNDLE --prepared PREPARED [--requests 10000] [--out FILE.json]

Users rotate; n=20, 200 candidates ranked. Needs `wrk` (Debian: apt-get install wrk). Load generator and service share the machine.
"""

import argparse
import http.client
import json
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import yaml

from raysys import storage
from raysys.prepare.dataset import Prepared
from raysys.registry import Registry
from raysys.serve.launch import running_service

PORT = 8077
LUA = """
local bodies = {%s}
local at = 0
request = function()
  at = at %% #bodies + 1
  return wrk.format("POST", "/v1/recommend", {["Content-Type"] = "application/json"}, bodies[at])
end
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--prepared", required=True, help="the prepared set, for user ids")
    parser.add_argument("--requests", type=int, default=10_000, help="at 32 clients, at least")
    parser.add_argument("--single", type=int, default=1000, help="at one client")
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("expected wrk on the PATH; on Debian and Ubuntu: apt-get install wrk")
    users = Prepared.open(arguments.prepared).users()["user_id"].to_pylist()[:500]
    bodies = [json.dumps({"user_id": user, "n": 20}) for user in users]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        registry = f"{folder}/registry"
        Registry(registry).publish(arguments.bundle)
        places = {"registry": registry, "events": f"{folder}/events", "state": f"{folder}/state"}
        with running_service(**places, port=PORT) as url:
            results["raysys"] = measure(url, bodies, arguments)
            counts = json.loads(get("/v1/models"))["counts"]
            results["raysys"]["degraded"] = sum(value for name, value in counts.items() if name.startswith("degraded_"))
        noop = Path(folder) / "noop.yaml"
        noop.write_text(yaml.safe_dump(noop_config()))
        with running_service(config_path=str(noop), port=PORT, require_model=False) as url:
            results["no-op, 2 hops"] = measure(url, bodies, arguments)
    print(f"\n{'':<16}{'p50 c=1':>10}{'p99 c=1':>10}{'req/s c=32':>12}{'p50 c=32':>10}{'p99 c=32':>10}{'requests':>10}{'errors':>8}")
    for name, r in results.items():
        print(
            f"{name:<16}{r['p50_ms']:>8.2f}ms{r['p99_ms']:>8.2f}ms{r['rps']:>12.0f}{r['loaded_p50_ms']:>8.1f}ms"
            f"{r['loaded_p99_ms']:>8.1f}ms{r['requests']:>10,}{r['errors']:>8}"
        )
    ours, floor = results["raysys"], results["no-op, 2 hops"]
    print(f"ratio to the floor: p50 {ours['p50_ms'] / floor['p50_ms']:.2f}x, throughput {ours['rps'] / floor['rps']:.2f}x")
    print(f"degraded answers: {ours['degraded']}")
    if arguments.out:
        storage.write_json(arguments.out, results)


def noop_config() -> dict:
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": PORT},
        "logging_config": {"enable_access_log": False},
        "applications": [{"name": "noop", "route_prefix": "/", "import_path": "benchmarks._noop_app:build", "args": {}}],
    }


def measure(url: str, bodies: list[str], arguments: argparse.Namespace) -> dict:
    single(bodies, 200)  # warm
    times = single(bodies, arguments.single)
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(LUA % ",".join(f"[==[{body}]==]" for body in bodies))
        script.flush()
        load(url, script.name, 5)  # warm
        seconds, loaded = 20, {}
        while not loaded or loaded["requests"] < arguments.requests:
            loaded = load(url, script.name, seconds)
            seconds *= 2
    return {"p50_ms": statistics.median(times), "p99_ms": sorted(times)[int(0.99 * len(times))], **loaded}


def single(bodies: list[str], count: int) -> list[float]:
    """Milliseconds of each request, one after the other on one connection."""
    connection, times = http.client.HTTPConnection("127.0.0.1", PORT), []
    for at in range(count):
        started = time.perf_counter()
        connection.request("POST", "/v1/recommend", bodies[at % len(bodies)], {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        times.append((time.perf_counter() - started) * 1000)
        if response.status != 200:
            raise SystemExit(f"HTTP {response.status} at one client")
    return times


def load(url: str, script: str, seconds: int) -> dict:
    """wrk with 32 connections."""
    command = ["wrk", "-t1", "-c32", f"-d{seconds}s", "--latency", "--timeout", "10s", "-s", script, url]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    errors = sum(int(number) for number in re.findall(r"(?:connect|read|write|timeout) (\d+)", text))
    errors += sum(int(number) for number in re.findall(r"Non-2xx or 3xx responses: (\d+)", text))
    quantile = {name: _ms(value) for name, value in re.findall(r"(50|99)%\s+([\d.]+\w+)", text)}
    requests = int(re.search(r"(\d+) requests in", text)[1])
    rps = float(re.search(r"Requests/sec:\s+([\d.]+)", text)[1])
    return {"rps": rps, "loaded_p50_ms": quantile["50"], "loaded_p99_ms": quantile["99"], "requests": requests, "errors": errors}


def _ms(text: str) -> float:
    number, unit = re.match(r"([\d.]+)(us|ms|s)", text).groups()
    return float(number) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[unit]


def get(path: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", PORT)
    connection.request("GET", path)
    return connection.getresponse().read()


if __name__ == "__main__":
    main()
