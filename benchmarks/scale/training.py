"""Training at scale: throughput beside RecTools and RecBole, two workers against one, memory of a cut table, kills.

    .venv/bin/python benchmarks/scale/training.py peers   --src Beauty.txt --rectools-python PYTHON --recbole-python PYTHON
    .venv/bin/python benchmarks/scale/training.py workers --src Beauty.txt
    .venv/bin/python benchmarks/scale/training.py memory  --items 1000000
    .venv/bin/python benchmarks/scale/training.py kill    --prepared DIR --kills 20

Each prints a table; with `--out FOLDER` it also leaves `FOLDER/training-NAME.json` for `report.py`.

The peers live in environments of their own, never in that of raysys:

    python3.11 -m venv rectools && rectools/bin/pip install "rectools[torch]==0.19.0"
    python3.11 -m venv recbole && recbole/bin/pip install recbole==1.2.1 "numpy<2" "scipy<1.12" "pandas<2.2"

All sides: 2 layers, d=64, 2 heads, length 50, dropout .5, Adam, 2 threads, the training part of a leave-one-out split, interleaved
rounds, medians. The common unit is the training target (a next item that is learnt once an epoch), because RecBole's sample is one
prefix and those of the others are whole histories; sequences/s of RecTools and raysys stand beside it. RecBole's batch is of prefixes,
so it takes the same number as the others take targets a step.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from raysys import cluster, storage
from raysys.models.interest import InterestConfig, InterestEncoder
from raysys.prepare.dataset import Sequences
from raysys.train.batches import InMemory
from raysys.train.encoder import EncoderTrainConfig, EncoderTraining
from raysys.train.parallel import Parallel
from raysys.train.table import ShardedTable

SHAPE = InterestConfig(dim=64, num_layers=2, num_heads=2, max_length=50, dropout=0.5)
BATCH, NEGATIVES = 256, 256
TABLES = (("whole", False), ("cut", True))


class Enough(Exception):
    """As many steps were taken as were asked for."""


def read(src: str) -> tuple[Sequences, int]:
    """The training part (all but the last two items of each user) of a one-line-a-user file, and the number of items."""
    rows = [[int(word) for word in line.split()[1:]] for line in Path(src).read_text().splitlines()]
    num_items = max(max(row) for row in rows)
    return sequences([np.array(row[:-2], np.int32) - 1 for row in rows if len(row) > 3]), num_items


def sequences(histories: list[np.ndarray]) -> Sequences:
    items = np.concatenate(histories)
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in histories])]).astype(np.int64)
    E = len(items)
    flat = (np.ones(E, np.int8), np.arange(E), np.full(E, np.nan, np.float32), np.ones(E, bool), np.zeros(E, np.int8))
    return Sequences(np.arange(len(histories), dtype=np.int32), indptr, items, *flat)


def timed(data: Sequences, num_items: int, config: EncoderTrainConfig, steps: int, parallel: Parallel) -> float:
    """Seconds a step, the median, without the first tenth of the steps."""
    torch.manual_seed(0)
    cut = parallel.shard_items and parallel.world_size > 1
    encoder = InterestEncoder(num_items, 2, SHAPE, (lambda seed: ShardedTable(num_items, SHAPE.dim, seed, parallel)) if cut else None)
    marks = [time.perf_counter()]

    def on_step(figures: dict, step: int) -> None:
        marks.append(time.perf_counter())
        if step >= steps:
            raise Enough

    training = EncoderTraining(encoder, InMemory(data), config, seed=0, parallel=parallel, on_step=on_step)
    try:
        training.run()
    except Enough:
        pass
    return float(np.mean(np.diff(marks)[steps // 10 :]))  # batches differ in length: the mean, over whole epochs where steps allow


def epoch_figures(data: Sequences) -> tuple[int, int]:
    """Targets and sequences of an epoch."""
    lengths = np.diff(data.indptr)
    return int((lengths - 1).sum()), int((lengths > 1).sum())


def left(name: str, rows: list[dict], bars: list[tuple[str, str, float, bool]], figures: dict | None = None) -> dict:
    """The JSON of one part, as README.md describes it."""
    listed = [dict(zip(("what", "bar", "measured", "met"), bar, strict=True)) for bar in bars]
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    return {"name": f"training-{name}", "rows": rows, "figures": figures or {}, "bars": listed, "about": about}


def peers(arguments: argparse.Namespace) -> dict:
    data, num_items = read(arguments.src)
    targets, users = epoch_figures(data)
    per_epoch = -(-InMemory(data).num_windows(SHAPE.max_length) // BATCH)
    torch.set_num_threads(2)
    here = Path(__file__).parent
    rows: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for loss in ("softmax", "sampled"):
            config = EncoderTrainConfig(epochs=1000, batch_size=BATCH, loss=loss, num_negatives=NEGATIVES)
            seconds = timed(data, num_items, config, 2 * per_epoch, Parallel()) * per_epoch
            rows.setdefault(f"raysys {loss}", []).append(seconds)
            if arguments.rectools_python:
                command = [arguments.rectools_python, str(here / "_peer_rectools.py"), arguments.src, loss, str(arguments.steps)]
                rows.setdefault(f"rectools {loss}", []).append(answer(command)["epoch_s"])
        if arguments.recbole_python:
            command = [
                arguments.recbole_python,
                str(here / "_peer_recbole.py"),
                arguments.src,
                str(targets // per_epoch),
                str(arguments.steps),
            ]
            rows.setdefault("recbole softmax", []).append(answer(command)["epoch_s"])
    print(f"\n{users:,} sequences, {targets:,} targets an epoch, {num_items:,} items")
    found, bars = [], []
    print(f"{'':<18}{'s an epoch':>12}{'targets/s':>12}{'sequences/s':>13}{'raysys is':>12}")
    for name, values in rows.items():
        seconds = statistics.median(values)
        ours = statistics.median(rows[f"raysys {name.split()[1]}"])
        print(f"{name:<18}{seconds:>12.2f}{targets / seconds:>12,.0f}{users / seconds:>13,.0f}{seconds / ours:>11.1f}x")
        row = {"series": name, "seconds_an_epoch": seconds, "targets_per_second": targets / seconds}
        found.append(row | {"sequences_per_second": users / seconds, "runs": len(values)})
        if seconds != ours:
            least = 5 if name.startswith("recbole") else 10
            bars.append((f"epoch against {name}", f">= {least}", seconds / ours, seconds / ours >= least))
    return left("peers", found, bars, {"sequences": users, "targets an epoch": targets, "items": num_items})


def answer(command: list[str]) -> dict:
    """The last line of a peer's output, JSON; two threads for each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    for name in ("PYTHONPATH", *cluster.WAITING):  # a peer waits as it likes
        environment.pop(name, None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tempfile.mkdtemp())
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def spawned(world_size: int, job: str, *arguments: object) -> list[dict]:
    """What each rank of `job` says."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tempfile.mkdtemp()
    torch.multiprocessing.spawn(_rank, (world_size, port, folder, job, arguments), nprocs=world_size)
    return [storage.read_json(f"{folder}/{rank}.json") for rank in range(world_size)]


def _rank(rank: int, world_size: int, port: int, folder: str, job: str, arguments: tuple) -> None:
    torch.set_num_threads(2 // world_size)
    if world_size > 1:
        torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    storage.write_json(f"{folder}/{rank}.json", {"throughput": _throughput, "table": _table}[job](rank, world_size, *arguments))
    if world_size > 1:
        torch.distributed.destroy_process_group()


def _throughput(rank: int, world_size: int, src: str, loss: str, steps: int) -> dict:
    data, num_items = read(src)
    config = EncoderTrainConfig(epochs=1000, batch_size=BATCH, loss=loss, num_negatives=NEGATIVES)  # type: ignore[arg-type]
    return {"step_s": timed(data, num_items, config, steps, Parallel(rank, world_size))}


def workers(arguments: argparse.Namespace) -> dict:
    found, bars = [], []
    print(f"{'loss':<10}{'1 worker x 2 cores':>20}{'2 workers x 1 core':>20}{'ratio':>8}   sequences/s")
    for loss in ("softmax", "sampled"):
        one, two = [], []
        for _ in range(arguments.rounds):
            one.append(spawned(1, "throughput", arguments.src, loss, arguments.steps)[0]["step_s"])
            two.append(max(found["step_s"] for found in spawned(2, "throughput", arguments.src, loss, arguments.steps)))
        first, second = BATCH / statistics.median(one), BATCH / statistics.median(two)
        print(f"{loss:<10}{first:>20,.0f}{second:>20,.0f}{second / first:>8.2f}")
        for workers_, per_second in ((1, first), (2, second)):
            found.append({"series": f"{loss}, 2 cores in all", "workers": workers_, "per_second": per_second, "runs": arguments.rounds})
        bars.append((f"2 workers x 1 core against 1 x 2, {loss}", ">= 0.85", second / first, second / first >= 0.85))
    return left("workers", found, bars)


def _table(rank: int, world_size: int, num_items: int, cut: bool, steps: int) -> dict:
    # Resident memory of this process: before there is a table, and at most while it trains.
    rng = np.random.default_rng(0)
    data = sequences([rng.integers(0, num_items, 20).astype(np.int32) for _ in range(2000)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    config = EncoderTrainConfig(epochs=1, batch_size=64, loss="sampled", num_negatives=1024)
    timed(data, num_items, config, steps, Parallel(rank, world_size, shard_items=cut))
    return {"before": before, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def memory(arguments: argparse.Namespace) -> dict:
    """Two workers, table whole or cut; AdamW, average of weights, dense gradients."""
    found = {cut: spawned(2, "table", arguments.items, cut, 6) for cut in (False, True)}
    peaks = {cut: max(one["peak"] for one in ranks) for cut, ranks in found.items()}
    base = max(one["before"] for one in found[True])
    print(f"table of {arguments.items:,} x {SHAPE.dim} float32: {arguments.items * SHAPE.dim * 4 / 2**20:,.0f} MiB")
    whole, cut = peaks[False] / 2**20, peaks[True] / 2**20
    print(f"peak a worker, whole {whole:,.0f} MiB, cut over 2 {cut:,.0f} MiB: {cut / whole:.2f}x")
    print(f"without the {base / 2**20:,.0f} MiB of an idle worker: {(peaks[True] - base) / (peaks[False] - base):.2f}x")
    rows = [{"series": f"2 workers, table {name}", "items": arguments.items, "peak_bytes": peaks[key]} for name, key in TABLES]
    bar = ("peak memory of a worker, cut table against whole", "<= 0.6", cut / whole, cut / whole <= 0.6)
    return left("memory", rows, [bar], {"idle worker, bytes": base})


def kill(arguments: argparse.Namespace) -> dict:
    """One worker is killed at a random moment of a run, so many times. Noise stated beforehand: with one worker none, the same bits;

    with two 1e-6, because a ring may add floats in another order.
    """
    from raysys.errors import RaysysError
    from raysys.evaluate.run import evaluate
    from raysys.train.config import TrainConfig, load_train_config
    from raysys.train.run import train

    settings: TrainConfig
    settings, given = load_train_config(
        None, ["encoder.epochs=6", "refit_epochs=2", "encoder.checkpoint_steps=20", "scaling.max_failures=5"]
    )
    settings = dataclasses.replace(settings, scaling=dataclasses.replace(settings.scaling, workers=arguments.workers))
    folder = tempfile.mkdtemp()
    pick = random.Random(arguments.seed)
    again: list[int] = []

    def run(number: int, after_s: float | None) -> tuple[dict, float, bool]:
        killed = threading.Event()
        if after_s is not None:
            threading.Timer(after_s, lambda: killed.set() if _kill_worker(pick) else None).start()
        started = time.monotonic()
        while True:
            try:
                train(arguments.prepared, f"{folder}/{number}", settings, given=given, seed=0, quiet=True)
                break
            except RaysysError as error:  # Ray's own controller died with the worker: the same command continues, as its error says
                again.append(number)
                if again.count(number) > 2:
                    raise
                print(f"started again: {str(error).splitlines()[0]}", flush=True)
        took = time.monotonic() - started
        return evaluate(arguments.prepared, f"{folder}/{number}", split="test", bootstrap=0)["final"], took, killed.is_set()

    with cluster.connected():
        expected, whole_s, _ = run(0, None)
        print(f"undisturbed: ndcg@10 {expected['ndcg@10']:.6f}, {whole_s:.0f} s", flush=True)
        differences, number = [], 0
        while len(differences) < arguments.kills:
            number += 1
            figures, took, hit = run(number, pick.uniform(0.3, 0.9) * whole_s)
            if not hit:
                continue  # no worker was there at that moment
            differences.append(figures["ndcg@10"] - expected["ndcg@10"])
            print(f"kill {len(differences):2d}: ndcg@10 {figures['ndcg@10']:.6f}, {took:.0f} s", flush=True)
    largest = max(map(abs, differences))
    print(f"largest difference {largest:.2g} over {len(differences)} kills")
    allowed = 0.0 if arguments.workers == 1 else 1e-6
    rows = [{"series": "killed once", "run": run, "ndcg_difference": value} for run, value in enumerate(differences, 1)]
    figures = {"undisturbed ndcg@10": expected["ndcg@10"], "undisturbed seconds": whole_s, "commands given twice": len(again)}
    bar = (f"largest difference of NDCG@10 over {len(differences)} kills, {arguments.workers} workers", f"<= {allowed:g}", largest)
    return left("kill", rows, [(*bar, largest <= allowed)], figures)


def _kill_worker(pick: random.Random) -> bool:
    """Kill one Ray Train worker of the cluster that this process started."""
    parents, workers_found = {}, []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            pid = int(status.parent.name)
            parents[pid] = int(status.read_text().split("PPid:\t")[1].split()[0])
            if b"RayTrainWorker" in (status.parent / "cmdline").read_bytes():
                workers_found.append(pid)

    def is_ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and is_ours(parents[pid]))

    ours = [pid for pid in workers_found if is_ours(pid)]
    if ours:
        os.kill(pick.choice(ours), signal.SIGKILL)
    return bool(ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("peers")
    command.set_defaults(run=peers)
    command.add_argument("--src", required=True)
    command.add_argument("--rectools-python")
    command.add_argument("--recbole-python")
    command.add_argument("--steps", type=int, default=30, help="of each peer, after 5 that do not count")
    command.add_argument("--rounds", type=int, default=3)
    command = commands.add_parser("workers")
    command.set_defaults(run=workers)
    command.add_argument("--src", required=True)
    command.add_argument("--steps", type=int, default=170)
    command.add_argument("--rounds", type=int, default=3)
    command = commands.add_parser("memory")
    command.set_defaults(run=memory)
    command.add_argument("--items", type=int, default=1_000_000)
    command = commands.add_parser("kill")
    command.set_defaults(run=kill)
    command.add_argument("--prepared", required=True)
    command.add_argument("--kills", type=int, default=20)
    command.add_argument("--workers", type=int, default=1)
    command.add_argument("--seed", type=int, default=0)
    for command in commands.choices.values():
        command.add_argument("--out", help="folder for the JSON")
    arguments = parser.parse_args()
    if not cluster.WAITING.keys() <= os.environ.keys():  # threads wait as those of raysys's workers
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **cluster.WAITING})
    if hasattr(arguments, "src"):
        arguments.src = os.path.abspath(arguments.src)
    result = arguments.run(arguments)
    if arguments.out:
        storage.write_json(f"{arguments.out}/{result['name']}.json", result)


if __name__ == "__main__":
    main()
