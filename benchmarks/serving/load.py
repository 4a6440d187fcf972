"""Latency and throughput of `POST /v1/recommend` beside no-op apps and peers, all in one run.

    raysys bench serving/load --bundle BUNDLE --prepared PREPARED --out runs/serving [--sides raysys noop-1] [--rounds 1]
    raysys bench serving/load --items 3000 100000 1000000 --sides raysys uvicorn noop-1 --out runs/serving   (synthetic catalogues)

Sides: raysys as shipped; `forgetful` without remembered histories (every request encodes); `apart` with retrieval and ranking in
deployments of their own; `default` with Serve's default settings; `uvicorn`, the same code in one process without Ray; and no-op apps
with 0, 1 and 2 hops. Users with 50 to 200 events rotate; n = 20, 200 candidates ranked. Clients: one connection of http.client, which
also checks each answer, and tells users asked for the first time, whose histories nobody has encoded yet, from the others; wrk with 8
and with 32 (closed loop); then threads that send half of what 32 clients got, each request at its own time (open loop; latency from
when it was due). From 50,000 items on retrieval asks an index; building it is not measured here.
Needs `wrk` (Debian: apt-get install wrk). Load generator and service share the machine.
"""

import argparse
import contextlib
import http.client
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import yaml

from raysys import config, storage
from raysys.bundle import ITEMS
from raysys.prepare.dataset import Prepared
from raysys.registry import Registry
from raysys.serve.launch import running_service
from raysys.serve.models import histories_folder

sys.path.insert(0, str(Path(__file__).parent))
import _catalogue  # noqa: E402
from _clients import Load, quantile  # noqa: E402

ROOT = Path(__file__).parents[2]
PORT = 8077
N = 20
SIDES = ("raysys", "forgetful", "apart", "default", "uvicorn", "noop-0", "noop-1", "noop-2")
LUA = """
local bodies = {%s}
local at = 0
request = function()
  at = at %% #bodies + 1
  return wrk.format("POST", "/v1/recommend", {["Content-Type"] = "application/json"}, bodies[at])
end
"""
APART = [
    {"name": name, "max_ongoing_requests": 100, "ray_actor_options": {"num_cpus": cpus}}
    for name, cpus in (("Retrieval", 0.5), ("Ranking", 0.3))
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default=None)
    parser.add_argument("--prepared", default=None, help="the prepared set, for user ids")
    parser.add_argument("--items", type=int, nargs="*", default=[], help="synthetic catalogues of these sizes, in place of a bundle")
    parser.add_argument("--open-share", type=float, default=0.5, help="rate of the open loop as a share of the throughput at 32 clients")
    parser.add_argument("--ready-s", type=float, default=600.0, help="seconds that a service may take to start")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--rounds", type=int, default=1, help="each round starts every side anew; medians are reported")
    parser.add_argument("--single", type=int, default=1000, help="requests at one client")
    parser.add_argument("--seconds", type=int, default=15, help="of each load by wrk")
    parser.add_argument("--min-events", type=int, default=50, help="shortest history of the users asked for")
    parser.add_argument("--max-events", type=int, default=200, help="longest")
    parser.add_argument("--out", default=None, help="folder of the JSON")
    parser.add_argument("--name", default="load", help="of the JSON, where one folder takes several")
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("expected wrk on the PATH; on Debian and Ubuntu: apt-get install wrk")
    if not arguments.items and (arguments.bundle is None or arguments.prepared is None):
        raise SystemExit("expected --bundle and --prepared, or --items")
    rows, judged, floors = [], [], {}
    for size in arguments.items or [None]:
        with tempfile.TemporaryDirectory() as folder:
            people, count = published(arguments, size, folder)
            of_size = measure_sides(arguments, people, count, folder, floors)
        rows += of_size
        judged += bars({row["series"]: row for row in of_size}, count)
        floors |= {row["series"]: row for row in of_size if row["series"].startswith("noop")}
    columns = ("p50 c=1", "p99 c=1", "p50 c=8", "p99 c=8", "p50 open", "p99 open")
    print(f"\n{'':<12}{'items':>10}{''.join(f'{column:>11}' for column in columns)}{'req/s c=32':>12}{'errors':>8}")
    for row in rows:
        times = (row[f"{name}_ms"] for name in ("p50", "p99", "c8_p50", "c8_p99", "open_p50", "open_p99"))
        print(
            f"{row['series']:<12}{row['items']:>10,}{''.join(f'{value:>9.2f}ms' for value in times)}"
            f"{row['per_second']:>12.0f}{row['errors']:>8.0f}"
        )
    result = {"name": arguments.name, "rows": rows, "bars": judged, "figures": {}, "about": about(arguments)}
    for bar in result["bars"]:
        print(f"{'met' if bar['met'] else 'missed'}  {bar['what']}: {bar['measured']:.2f} ({bar['bar']})")
    if arguments.out:
        storage.write_json(storage.join(arguments.out, f"{arguments.name}.json"), result)


def published(arguments: argparse.Namespace, size: int | None, folder: str) -> tuple[list[str], int]:
    """Users to ask for and the number of items, once what is to be served stands in the registry of the folder."""
    registry = Registry(f"{folder}/registry")
    if size is None:
        registry.publish(arguments.bundle)
        return users(arguments), storage.read_table(storage.join(arguments.bundle, ITEMS)).num_rows
    # In a process of its own: what building takes of memory is given back.
    build = "import sys, _catalogue as c; n = int(sys.argv[1]); c.build_bundle(n).write(sys.argv[2], manifest=c.manifest(n))"
    subprocess.run([sys.executable, "-c", build, str(size), f"{folder}/bundle"], check=True, cwd=Path(__file__).parent)
    registry.publish(f"{folder}/bundle")
    return _catalogue.user_ids()[:500], size


def measure_sides(arguments: argparse.Namespace, people: list[str], items: int, folder: str, floors: dict[str, dict]) -> list[dict]:
    """A row a side, medians over the rounds; a no-op, which no catalogue changes, is measured with the first one only."""
    found: dict[str, list[dict]] = {side: [] for side in arguments.sides if side not in floors}
    for _ in range(arguments.rounds):
        for side in found:
            with running(side, folder, arguments.ready_s):
                found[side].append(measure(people, arguments, is_noop=side.startswith("noop")))
            print(f"{side}, {items:,} items", {name: round(value, 2) for name, value in found[side][-1].items()}, flush=True)
    again = [floors[side] | {"items": items} for side in arguments.sides if side in floors]
    return [
        {"series": side, "items": items} | {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        for side, runs in found.items()
    ] + again


def bars(rows: dict[str, dict], items: int) -> list[dict]:
    """What the service promises, as ratios inside this run; only for sides that ran."""
    ours, floor, default = rows.get("raysys"), rows.get("noop-1"), rows.get("default")
    found = []
    if ours and floor:
        for name, of in (("p50_ms", ""), ("first_p50_ms", ", histories asked for the first time"), ("again_p50_ms", ", asked for again")):
            found.append((f"p50 at c=1 against the no-op with one hop{of}", "<= 2.5", ours[name] / floor["p50_ms"], 2.5, False))
        found.append(("throughput at c=32 against it", ">= 0.5", ours["per_second"] / floor["per_second"], 0.5, True))
    if ours and default:
        found.append(("throughput against default Serve settings", ">= 2", ours["per_second"] / default["per_second"], 2.0, True))
    if ours:
        found.append(("p99 at c=8 against its p50", "<= 6", ours["c8_p99_ms"] / ours["c8_p50_ms"], 6.0, False))
        found.append(("errors and degraded answers", "0", ours["errors"] + ours["degraded"], 0.0, False))
    return [
        {"what": f"{what}, {items:,} items", "bar": wanted, "measured": value, "met": value >= bound if least else value <= bound}
        for what, wanted, value, bound, least in found
    ]


def about(arguments: argparse.Namespace) -> dict:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    given = {"bundle": arguments.bundle or "synthetic", "rounds": arguments.rounds, "open loop": f"{arguments.open_share:g} of c=32"}
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit, **given}


def users(arguments: argparse.Namespace) -> list[str]:
    """Ids of at most 500 users whose histories have the wanted length."""
    prepared = Prepared.open(arguments.prepared)
    ids, sequences = prepared.users()["user_id"].to_pylist(), prepared.sequences()
    lengths = np.diff(sequences.indptr)
    wanted = (lengths >= arguments.min_events) & (lengths <= arguments.max_events)
    chosen = [ids[row] for row in sequences.user_idx[wanted]]
    if not chosen:
        raise SystemExit(f"expected users with {arguments.min_events} to {arguments.max_events} events in {arguments.prepared}, found none")
    return chosen[:500]


@contextlib.contextmanager
def running(side: str, folder: str, ready_s: float) -> Iterator[None]:
    """One side's service, alone on the machine while the block runs."""
    places = {"registry": f"{folder}/registry", **{name: f"{folder}/{side}-{name}" for name in ("events", "state")}}
    # What one side has encoded is not to be another's; it is a cache, and who has it open keeps it.
    for place in (places["events"], places["state"], histories_folder()):
        storage.remove(place)
    if side == "uvicorn":
        with uvicorn_service(places):
            yield
        return
    path = Path(folder) / f"{side}.yaml"
    path.write_text(yaml.safe_dump(noop_config(int(side[-1])) if side.startswith("noop") else raysys_config(side)))
    known = {} if side.startswith("noop") else places
    with running_service(**known, config_path=str(path), port=PORT, fast=side != "default", require_model=bool(known), ready_s=ready_s):
        yield


def raysys_config(side: str) -> dict:
    values = config.read_yaml(str(ROOT / "serve_config.yaml"))
    application = values["applications"][0]
    application["args"] = {"apart": {"placement": "apart"}, "forgetful": {"cached_histories": 0}}.get(side, {})
    if side == "apart":
        application["deployments"] += APART
    return values


def noop_config(hops: int) -> dict:
    application = {"name": "noop", "route_prefix": "/", "import_path": "benchmarks.serving._noop_app:build", "args": {"hops": hops}}
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": PORT},
        "logging_config": {"enable_access_log": False},
        "applications": [application],
    }


@contextlib.contextmanager
def uvicorn_service(places: dict[str, str]) -> Iterator[None]:
    command = [sys.executable, str(Path(__file__).with_name("_uvicorn_app.py")), *places.values(), str(PORT)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
    try:
        while True:
            with contextlib.suppress(OSError):
                get("/health/ready")
                break
            if process.poll() is not None:
                raise SystemExit(f"the uvicorn peer ended with status {process.returncode}")
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait()


def measure(people: list[str], arguments: argparse.Namespace, *, is_noop: bool) -> dict[str, float]:
    bodies = [json.dumps({"user_id": user, "n": N}) for user in people]
    warm = min(200, len(bodies) // 2)
    single(bodies, warm, is_noop)
    times, degraded = single(bodies, arguments.single, is_noop)
    figures = {"p50_ms": statistics.median(times), "p99_ms": float(np.quantile(times, 0.99)), "degraded": float(degraded)}
    # Who is asked for the first time has a history that nobody has encoded yet.
    first, again = times[warm : len(bodies)], times[:warm] + times[len(bodies) :]
    figures |= {"first_p50_ms": statistics.median(first), "again_p50_ms": statistics.median(again)}
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(LUA % ",".join(f"[==[{body}]==]" for body in bodies))
        script.flush()
        load(script.name, 3, 8)  # warm
        eight, many = load(script.name, arguments.seconds, 8), load(script.name, arguments.seconds, 32)
    if not is_noop:
        counts = json.loads(get("/v1/models"))["counts"]
        figures["degraded"] += sum(value for name, value in counts.items() if name.startswith("degraded_"))
    figures |= {"c8_p50_ms": eight["p50_ms"], "c8_p99_ms": eight["p99_ms"], "c8_rps": eight["rps"]}
    figures |= {"per_second": many["rps"], "c32_p50_ms": many["p50_ms"], "c32_p99_ms": many["p99_ms"]}
    rate = arguments.open_share * many["rps"]
    with Load(PORT, people, n=None if is_noop else N, rate=rate, clients=64) as opened:
        time.sleep(arguments.seconds)
    late = [one for one in opened.seen if one.kind not in ("answered", "degraded")]
    figures |= {"open_per_second": rate, "open_p50_ms": quantile(opened.seen, 0.5), "open_p99_ms": quantile(opened.seen, 0.99)}
    figures["degraded"] += sum(one.kind == "degraded" for one in opened.seen)
    requests = len(times) + eight["requests"] + many["requests"] + len(opened.seen)
    return figures | {"requests": requests, "errors": eight["errors"] + many["errors"] + len(late)}


def single(bodies: list[str], count: int, is_noop: bool) -> tuple[list[float], int]:
    """Milliseconds of each request, one after the other on one connection, and how many answers were degraded."""
    connection, times, degraded = http.client.HTTPConnection("127.0.0.1", PORT), [], 0
    for at in range(count):
        started = time.perf_counter()
        connection.request("POST", "/v1/recommend", bodies[at % len(bodies)], {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        times.append((time.perf_counter() - started) * 1000)
        if response.status != 200:
            raise SystemExit(f"HTTP {response.status} at one client: {answer[:200]!r}")
        if not is_noop:
            told = json.loads(answer)
            degraded += told["degraded"] or told["strategy"] != "personalized" or len(told["items"]) != N
    return times, degraded


def load(script: str, seconds: int, connections: int) -> dict[str, float]:
    """wrk with so many connections on one thread."""
    url = f"http://127.0.0.1:{PORT}"
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "--timeout", "10s", "-s", script, url]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    errors = sum(int(number) for number in re.findall(r"(?:connect|read|write|timeout) (\d+)", text))
    errors += sum(int(number) for number in re.findall(r"Non-2xx or 3xx responses: (\d+)", text))
    quantile = {name: _ms(value) for name, value in re.findall(r"(50|99)%\s+([\d.]+\w+)", text)}
    requests = int(re.search(r"(\d+) requests in", text)[1])
    rps = float(re.search(r"Requests/sec:\s+([\d.]+)", text)[1])
    return {"rps": rps, "p50_ms": quantile["50"], "p99_ms": quantile["99"], "requests": requests, "errors": errors}


def _ms(text: str) -> float:
    number, unit = re.match(r"([\d.]+)(us|ms|s)", text).groups()
    return float(number) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[unit]


def get(path: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", PORT)
    connection.request("GET", path)
    return connection.getresponse().read()


if __name__ == "__main__":
    main()
