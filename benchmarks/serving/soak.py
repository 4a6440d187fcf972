"""A service that is kept busy while its replicas are killed and versions are published: what clients see, and what memory does.

    raysys bench serving/soak --bundle BUNDLE --prepared PREPARED --minutes 20 --out runs/serving
    raysys bench serving/soak --items 3000 --minutes 3 --out runs/serving          (a synthetic bundle)

The peak is measured first, by clients that ask again when they have their answer. Then requests come at 70% of it, each at its own time
whatever became of the one before (open loop; latency counts from when a request was due). Every 30 s one of the service's replicas, two
of ingress and one of ingestion, dies by kill -9; every 60 s a version is published. One request in twenty is an event. Memory is the
proportional set size of the processes of the service. What is asked to stay flat, after a warm-up against the end, is what lives all the
time: Ray's own processes and one ingress replica that is spared. Replicas that die have no time to grow, and how many of them are
young at a moment says more of the sum of all than any leak: it goes up and down by a third.

Leaves `soak.json` (the shape that benchmarks/scale/README.md describes) and `soak.png`.
"""

import argparse
import contextlib
import dataclasses
import os
import random
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import yaml

from raysys import config, storage
from raysys.bundle import Bundle
from raysys.prepare.dataset import Prepared
from raysys.registry import Registry
from raysys.serve.launch import family, running_service

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "scale")]
import _catalogue  # noqa: E402
from _clients import Load, quantile  # noqa: E402
from _memory import pss_bytes  # noqa: E402

N, PORT, WINDOW_S, MARK = 10, 8078, 5.0, "RAYSYS_SOAK"
WRITE_EVERY = 20
"""One request in so many is an event."""
ALLOWED_SHEDDING, ALLOWED_GROWTH = 0.001, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default=None, help="what is served; with --prepared, for user ids")
    parser.add_argument("--prepared", default=None)
    parser.add_argument("--items", type=int, default=3000, help="of a synthetic bundle, where none is given")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument(
        "--warm-up-minutes", type=float, default=None, help="before memory counts; a quarter of the time, at most 5, when absent"
    )
    parser.add_argument("--share", type=float, default=0.7, help="of the peak")
    parser.add_argument("--kill-s", type=float, default=30.0, help="seconds between kills")
    parser.add_argument("--publish-s", type=float, default=60.0, help="seconds between versions")
    parser.add_argument("--peak-s", type=float, default=20.0, help="seconds of the measurement of the peak")
    parser.add_argument("--clients", type=int, default=32, help="while the peak is measured; twice as many wait for their time afterwards")
    parser.add_argument("--ready-s", type=float, default=600.0, help="seconds that the service may take to start")
    parser.add_argument("--out", default="runs/serving", help="folder of the JSON and the plot")
    arguments = parser.parse_args()
    if (arguments.bundle is None) != (arguments.prepared is None):
        raise SystemExit("expected --bundle and --prepared together, or neither; --items makes a synthetic bundle")
    found = run(arguments)
    storage.write_json(storage.join(arguments.out, "soak.json"), found)
    plot(found, str(Path(arguments.out) / "soak.png"))
    for bar in found["bars"]:
        print(f"{'met' if bar['met'] else 'missed'}  {bar['what']}: {bar['measured']:.4g} ({bar['bar']})")
    for name, value in found["figures"].items():
        print(f"  {name}: {value}")


def run(arguments: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory(prefix="raysys-soak-", ignore_cleanup_errors=True) as folder:
        if arguments.bundle is None:
            bundle, users = _catalogue.build_bundle(arguments.items), _catalogue.user_ids()
            bundle.write(f"{folder}/first", manifest=_catalogue.manifest(arguments.items))
        else:
            bundle, users = Bundle.open(arguments.bundle), Prepared.open(arguments.prepared).users()["user_id"].to_pylist()[:2000]
        registry = Registry(f"{folder}/registry")
        registry.publish(arguments.bundle or f"{folder}/first")
        token = secrets.token_hex(8)
        os.environ[MARK] = token  # every process of the service inherits it, and no other's has it
        path = Path(folder) / "soak.yaml"
        path.write_text(yaml.safe_dump(service_config()))
        places = {name: f"{folder}/{name}" for name in ("registry", "events", "state")}
        with running_service(**places, config_path=str(path), port=PORT, ready_s=arguments.ready_s):
            del os.environ[MARK]
            items = [str(item) for item in bundle.items["item_id"].to_pylist()[:2000]]
            peak = closed_loop(arguments, users, items)
            print(f"peak: {peak:.0f} requests a second with {arguments.clients} clients", flush=True)
            rate, clients = arguments.share * peak, 2 * arguments.clients
            load = Load(PORT, users, n=N, rate=rate, clients=clients, items=items, write_every=WRITE_EVERY)
            harm = Harm(load, registry, bundle, folder, f"{MARK}={token}".encode(), arguments)
            with load, harm:
                time.sleep(60 * arguments.minutes)
    return report(load, harm, peak, arguments)


def service_config() -> dict:
    """serve_config.yaml with two ingress replicas and one of ingestion, all the time."""
    values = config.read_yaml(str(HERE.parents[1] / "serve_config.yaml"))
    for deployment in values["applications"][0]["deployments"]:
        replicas = 2 if deployment["name"] == "Ingress" else 1
        deployment["autoscaling_config"] |= {"min_replicas": replicas, "max_replicas": replicas}
    return values


def closed_loop(arguments: argparse.Namespace, users: list[str], items: list[str]) -> float:
    """Requests a second of clients that ask again when they have their answer, after a quarter of the time to warm up."""
    load = Load(PORT, users, n=N, rate=None, clients=arguments.clients, items=items, write_every=WRITE_EVERY)
    with load:
        time.sleep(arguments.peak_s / 4)
        before = len(load.seen)
        started = time.monotonic()
        time.sleep(arguments.peak_s)
        return (len(load.seen) - before) / (time.monotonic() - started)


class Harm:
    """Kills, publishes, and looks at memory, each on its own clock."""

    def __init__(self, load: Load, registry: Registry, bundle: Bundle, folder: str, marker: bytes, arguments: argparse.Namespace):
        self.load, self.registry, self.bundle, self.folder, self.marker = load, registry, bundle, folder, marker
        self.spared = min(pid for pid in family(marker) if replica_of(pid) == "Ingress")  # lives through all of it
        self.kills: list[tuple[float, str]] = []
        self.versions: list[tuple[float, str]] = []
        self.memory: list[tuple[float, dict[str, int]]] = []
        self.problems: list[str] = []
        self._random = random.Random(0)
        self._done = threading.Event()
        jobs = ((self._kill, arguments.kill_s), (self._publish, arguments.publish_s), (self._look, WINDOW_S))
        self._threads = [threading.Thread(target=self._repeat, args=job, daemon=True) for job in jobs]

    def __enter__(self) -> "Harm":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(timeout=60)

    def _repeat(self, job: Callable[[], None], every_s: float) -> None:
        while not self._done.wait(every_s):
            try:
                job()
            except Exception as error:  # a benchmark that stopped doing harm would look good
                self.problems.append(f"{job.__name__}: {error!r}")

    def _kill(self) -> None:
        replicas = {pid: name for pid in family(self.marker) if (name := replica_of(pid)) and pid != self.spared}
        if not replicas:
            raise RuntimeError("no replica is there")
        pid = self._random.choice(sorted(replicas))
        os.kill(pid, signal.SIGKILL)
        self.kills.append((time.monotonic(), replicas[pid]))

    def _publish(self) -> None:
        """The same models under a new version: what is loaded is all of it."""
        place = f"{self.folder}/next"
        dataclasses.replace(self.bundle).write(place, manifest=self.bundle.told)
        self.versions.append((time.monotonic(), self.registry.publish(place).version))

    def _look(self) -> None:
        sizes = dict.fromkeys(("spared", "replicas", "ray"), 0)
        for pid in family(self.marker):
            with contextlib.suppress(OSError):  # it ended
                sizes["spared" if pid == self.spared else "replicas" if replica_of(pid) else "ray"] += pss_bytes(Path(f"/proc/{pid}"))
        self.memory.append((time.monotonic(), sizes))


def replica_of(pid: int) -> str | None:
    """Name of the deployment that a process is a replica of; None for other processes."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return None
    return next((name for name in ("Ingress", "Ingestion") if "ServeReplica" in line and f":{name}" in line), None)


def report(load: Load, harm: Harm, peak: float, arguments: argparse.Namespace) -> dict:
    """Figures, bars, and the timeline in windows of WINDOW_S."""
    first, last, counts = load.started, load.started + 60 * arguments.minutes, Counter(one.kind for one in load.seen)
    windows = []
    for number in range(int((last - first) / WINDOW_S)):
        low, high = first + number * WINDOW_S, first + (number + 1) * WINDOW_S
        inside = [one for one in load.seen if low <= one.at < high]
        times = sorted(one.ms for one in inside if one.kind in ("answered", "degraded"))
        look = next((sizes for at, sizes in reversed(harm.memory) if at < high), {})
        windows.append(
            {"series": "timeline", "s": number * WINDOW_S, "rps": len(times) / WINDOW_S}
            | {"p50_ms": times[len(times) // 2] if times else None, "p99_ms": times[int(0.99 * len(times))] if times else None}
            | {kind: sum(one.kind == kind for one in inside) for kind in ("degraded", "shed", "failed")}
            | {f"{name}_bytes": look.get(name) for name in ("spared", "replicas", "ray")}
            | {"kills": sum(low <= at < high for at, _ in harm.kills), "versions": sum(low <= at < high for at, _ in harm.versions)}
        )
    warm_s = 60 * (arguments.warm_up_minutes if arguments.warm_up_minutes is not None else min(5.0, arguments.minutes / 4))
    span_s = min(120.0, (last - first - warm_s) / 2)
    before = [sizes for at, sizes in harm.memory if first + warm_s <= at < first + warm_s + span_s]
    after = [sizes for at, sizes in harm.memory if at >= last - span_s]
    growth = median_of(after, "spared", "ray") / median_of(before, "spared", "ray") - 1 if before and after else float("nan")
    shed, taken = counts["shed"] / max(1, len(load.seen)), {one.told for one in load.seen if one.kind == "answered"}
    bars = [
        {"what": "requests that failed", "bar": "== 0", "measured": counts["failed"], "met": counts["failed"] == 0},
        {"what": "share of honest 503s", "bar": f"< {ALLOWED_SHEDDING:g}", "measured": shed, "met": shed < ALLOWED_SHEDDING},
        {
            "what": "growth of memory after warm-up, of what lives all the time",
            "bar": f"within {ALLOWED_GROWTH:.0%}",
            "measured": growth,
            "met": abs(growth) <= ALLOWED_GROWTH,
        },
    ]
    failed = [one for one in load.seen if one.kind == "failed"]
    reasons = Counter(one.told for one in load.seen if one.kind in ("failed", "shed"))
    figures = {
        **{f"requests {kind}": counts[kind] for kind in ("answered", "degraded", "written", "shed", "failed")},
        "kills": dict(Counter(name for _, name in harm.kills)) and str(dict(Counter(name for _, name in harm.kills))),
        "versions published": len(harm.versions),
        "versions that answered": len(taken),
        "peak, requests a second": peak,
        "p99 of all answers, ms": quantile(load.seen, 0.99),
        **{
            f"memory {when}, {whose}, bytes": median_of(looks, *parts) if looks else None
            for whose, parts in (("the spared replica", ["spared"]), ("Ray", ["ray"]), ("all", ["spared", "replicas", "ray"]))
            for when, looks in (("after warm-up", before), ("at the end", after))
        },
        "what failed or was shed": "; ".join(f"{count} x {told}" for told, count in reasons.most_common(5)) or None,
        "failures, seconds after the last kill": ", ".join(f"{since_kill(one.at + one.ms / 1000, harm):.1f}" for one in failed[:20])
        or None,
        "harm that was not done": "; ".join(harm.problems[:5]) or None,
    }
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip()
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit, "minutes": arguments.minutes}
    about |= {"share of peak": arguments.share, "kill every": f"{arguments.kill_s:g} s", "version every": f"{arguments.publish_s:g} s"}
    about |= {"bundle": arguments.bundle or f"synthetic, {arguments.items:,} items", "cores": os.cpu_count()}
    return {"name": "soak", "rows": windows, "figures": figures, "bars": bars, "about": about}


def median_of(looks: list[dict[str, int]], *parts: str) -> float:
    """Median over looks of the sum of some parts, bytes."""
    return statistics.median(sum(sizes[part] for part in parts) for sizes in looks)


def since_kill(moment: float, harm: Harm) -> float:
    """Seconds since the last kill before a moment; infinite before the first."""
    return min((moment - at for at, _ in harm.kills if at <= moment), default=float("inf"))


def plot(found: dict, path: str) -> None:
    """Answers, latency and memory over time, with kills and versions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from raysys.evaluate.plots import FINAL, RETRIEVAL, SOURCES, STYLE

    windows, about = found["rows"], found["about"]
    seconds = [window["s"] for window in windows]
    with matplotlib.rc_context(STYLE):
        figure, (load, latency, memory) = plt.subplots(3, 1, sharex=True, figsize=(9, 7), layout="constrained")
        load.plot(seconds, [window["rps"] for window in windows], color=FINAL, label="answers a second")
        for kind, colour in (("degraded", SOURCES[0]), ("shed", SOURCES[1]), ("failed", SOURCES[5])):
            some = [(window["s"], window[kind]) for window in windows if window[kind]]
            load.scatter(*zip(*some, strict=True) if some else ([], []), color=colour, s=12, label=f"{kind}, in {WINDOW_S:g} s", zorder=3)
        load.legend(ncol=4)
        load.set_ylim(bottom=0)
        load.set_title(
            f"{about['minutes']:g} minutes at {about['share of peak']:.0%} of the peak; lines: a replica killed (red), a version (grey)",
            loc="left",
        )
        for name, colour in (("p50_ms", FINAL), ("p99_ms", SOURCES[1])):
            latency.plot(seconds, [window[name] for window in windows], color=colour, label=name.partition("_")[0])
        latency.set_ylabel("milliseconds")
        latency.set_yscale("log")
        latency.legend()
        for name, colour in (("spared_bytes", FINAL), ("replicas_bytes", RETRIEVAL), ("ray_bytes", SOURCES[2])):
            values = [None if window[name] is None else window[name] / 2**20 for window in windows]
            memory.plot(seconds, values, color=colour, label=name.partition("_")[0])
        memory.set_ylabel("PSS, MiB")
        memory.set_ylim(bottom=0)
        memory.set_xlabel("seconds")
        memory.legend()
        for axes in (load, latency, memory):
            for window in windows:
                if window["kills"]:
                    axes.axvline(window["s"], color=SOURCES[5], linewidth=0.5, alpha=0.5)
                if window["versions"]:
                    axes.axvline(window["s"], color="grey", linewidth=0.5, linestyle="--")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
        plt.close(figure)


if __name__ == "__main__":
    main()
