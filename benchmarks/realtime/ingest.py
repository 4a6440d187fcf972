"""Telling in real time: the log alone, log and state, events over HTTP, and the time from an event's answer to a changed recommendation.

    raysys bench realtime/ingest --out runs/realtime [--bundle BUNDLE] [--seconds 10] [--only log|http]

Leaves `ingest.json` in the shape that benchmarks/scale/README.md describes. Without a bundle the last figure is that
of answers from live popularity. Needs `wrk` for HTTP (Debian: apt-get install wrk); `redis-server`, where there is one, is measured
beside the files.
Load generator and service share the machine.
"""

import argparse
import http.client
import json
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from raysys import storage
from raysys.events.log import open_log
from raysys.events.state import open_state
from raysys.events.store import EventStore
from raysys.registry import Registry
from raysys.serve.launch import running_service

PORT = 8078
GROUPS = (1, 50, 500, 5000)
CLIENTS = 8
LUA = """
local name, at = "%s", 0
math.randomseed(os.time())
local run = math.random(1, 1e9)
local template = '{"user_id":"u%%d","item_id":"i%%d","event":"click","event_id":"' .. name .. run .. '-%%d"}'
request = function()
  local events = {}
  for n = 1, %d do
    at = at + 1
    events[n] = string.format(template, at %% 997, at %% 1009, at)
  end
  return wrk.format("POST", "/v1/events", {["Content-Type"] = "application/json"}, '{"events":[' .. table.concat(events, ",") .. ']}')
end
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/realtime", help="folder of the JSON (default: runs/realtime)")
    parser.add_argument("--bundle", default=None, help="a trained bundle to serve")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--only", choices=["log", "http"], default=None)
    arguments = parser.parse_args()
    rows: list[dict] = []
    figures: dict[str, float | None] = {}
    bars: list[dict] = []
    with tempfile.TemporaryDirectory(prefix="raysys-bench-") as folder:
        if arguments.only != "http":
            rows += log_rows(folder, arguments.seconds / 3)
            best = max(row["per_second"] for row in rows if row["series"] == "log, files")
            bars.append(bar("log alone, fsync group commit, events/s", ">= 30000", best, best >= 30_000))
        if arguments.only != "log":
            if shutil.which("wrk") is None:
                raise SystemExit("expected wrk on the PATH; on Debian and Ubuntu: apt-get install wrk (or --only log)")
            found, figures = http_rows(folder, arguments)
            rows += found
            batched, single = figures["HTTP events/s, batches of 50"], figures["HTTP single event p99 ms, 8 clients"]
            changed = figures["event answered to changed recommendation, p99 ms"]
            bars.append(bar("HTTP, batches of 50, events/s", ">= 3000", batched, batched >= 3000))
            bars.append(bar("HTTP, single event, 8 clients, p99 ms", "<= 50", single, single <= 50))
            bars.append(bar("event answered to changed recommendation, p99 ms", "<= 100", changed, changed <= 100))
    result = {"name": "ingest", "rows": rows, "figures": figures, "bars": bars}
    storage.write_json(storage.join(arguments.out, "ingest.json"), result)
    for row in rows:
        print("  ".join(f"{name} {value:,.1f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()))
    for one in bars:
        print(f"{'met   ' if one['met'] else 'missed'}  {one['what']}: {one['measured']:,.1f} ({one['bar']})")


def bar(what: str, wanted: str, measured: float | None, met: bool) -> dict:
    return {"what": what, "bar": wanted, "measured": measured, "met": met}


def log_rows(folder: str, seconds: float) -> list[dict]:
    """Events a second by size of the group that shares a flush, with and without the state behind it."""
    rows = []
    with locations(folder) as places:
        for kind, place in places.items():
            for group in GROUPS:
                log = open_log(place(f"log-{group}"), writable=True)
                rows.append({"series": f"log, {kind}", "group": group, **measured(log.append, group, seconds)})
                log.close()
            store = EventStore(open_log(place("log"), writable=True), open_state(place("state")))
            found = measured(lambda records: store.submit(records).result(), 500, seconds)  # noqa: B023
            rows.append({"series": f"log and state, {kind}", "group": 500, **found})
            store.close()
    return rows


def event(n: int) -> dict:
    """A record as ingestion writes it, about 200 bytes."""
    ids = {"user_id": f"user-{n % 997}", "item_id": f"item-{n % 1009}", "event_id": f"event-{n:020d}"}
    return {"kind": "event", **ids, "event": "click", "timestamp": 1.7e9 + n, "received": 1.7e9 + n, "recommendation_id": "0" * 32}


def measured(write: Callable[[list[dict]], object], group: int, seconds: float) -> dict:
    started, at = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds:
        write([event(at + n) for n in range(group)])
        at += group
    return {"events": at, "seconds": passed, "per_second": at / passed}


@contextmanager
def locations(folder: str) -> Iterator[dict[str, Callable[[str], str]]]:
    """Where log and state are tried: files, and a Redis of our own where there is one."""
    places: dict[str, Callable[[str], str]] = {"files": lambda name: str(Path(folder) / name)}
    if shutil.which("redis-server") is None:
        yield places
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = ["--appendonly", "yes", "--appendfsync", "always", "--save", "", "--dir", folder]
    server = subprocess.Popen(["redis-server", "--port", str(port), *settings], stdout=subprocess.DEVNULL)
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.05)
        places["redis"] = lambda name: f"redis://127.0.0.1:{port}/0?prefix={name}"
        yield places
    finally:
        server.kill()
        server.wait()


def http_rows(folder: str, arguments: argparse.Namespace) -> tuple[list[dict], dict]:
    """Over HTTP, with a published bundle where one is given."""
    places = {name: f"{folder}/http-{name}" for name in ("registry", "events", "state")}
    if arguments.bundle:
        Registry(places["registry"]).publish(arguments.bundle)
    with running_service(**places, port=PORT, require_model=bool(arguments.bundle)) as url:
        load(url, folder, "warm", 50, 3)
        batched = load(url, folder, "batch", 50, arguments.seconds)
        single = load(url, folder, "single", 1, arguments.seconds)
        changed = sorted(visible_ms(arguments.seconds))
    rows = [{"series": "HTTP, batches of 50", "clients": CLIENTS, **batched}, {"series": "HTTP, single", "clients": CLIENTS, **single}]
    figures = {
        "HTTP events/s, batches of 50": batched["per_second"],
        "HTTP single event p99 ms, 8 clients": single["p99_ms"],
        "event answered to changed recommendation, p50 ms": changed[len(changed) // 2],
        "event answered to changed recommendation, p99 ms": changed[int(0.99 * len(changed))],
        "of answers": len(changed),
    }
    return rows, figures


def load(url: str, folder: str, name: str, size: int, seconds: float) -> dict:
    """wrk with CLIENTS connections, each request `size` events with ids of their own."""
    script = Path(folder) / f"{name}.lua"
    script.write_text(LUA % (name, size))
    command = ["wrk", "-t1", f"-c{CLIENTS}", f"-d{int(max(1, seconds))}s", "--latency", "--timeout", "10s", "-s", str(script), url]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    errors = sum(int(n) for n in re.findall(r"(?:connect|read|write|timeout) (\d+)", text))
    errors += sum(int(n) for n in re.findall(r"Non-2xx or 3xx responses: (\d+)", text))
    quantile = {q: float(n) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[unit] for q, n, unit in re.findall(r"(50|99)%\s+([\d.]+)(us|ms|s)", text)}
    per_second = float(re.search(r"Requests/sec:\s+([\d.]+)", text)[1]) * size  # type: ignore[index]
    return {"per_second": per_second, "p50_ms": quantile["50"], "p99_ms": quantile["99"], "errors": errors}


def visible_ms(seconds: float) -> list[float]:
    """Milliseconds from an event's answer to an answer without the item that was just used; another client writes meanwhile."""
    times: list[float] = []
    stop = threading.Event()

    def others() -> None:
        connection, at = http.client.HTTPConnection("127.0.0.1", PORT), 0
        while not stop.is_set():
            at += 1
            post(connection, "/v1/events", {"user_id": f"other-{at % 100}", "item_id": f"i{at % 1009}", "event_id": f"other-{at}"})
            time.sleep(0.01)

    thread = threading.Thread(target=others)
    thread.start()
    connection, ends, at = http.client.HTTPConnection("127.0.0.1", PORT), time.monotonic() + seconds, 0
    while time.monotonic() < ends:
        user, at = f"seer-{at % 50}", at + 1
        best = post(connection, "/v1/recommend", {"user_id": user, "n": 1})["items"][0]["item_id"]
        post(connection, "/v1/events", {"user_id": user, "item_id": best, "event": "click"})
        answered = time.perf_counter()
        while best in [item["item_id"] for item in post(connection, "/v1/recommend", {"user_id": user, "n": 10})["items"]]:
            pass
        times.append((time.perf_counter() - answered) * 1000)
    stop.set()
    thread.join()
    return times


def post(connection: http.client.HTTPConnection, path: str, body: dict) -> dict:
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    if response.status != 200:
        raise SystemExit(f"HTTP {response.status} at {path}: {content[:200]!r}")
    return json.loads(content)


if __name__ == "__main__":
    main()
