"""Measure and fit the constants of `raysys plan` on this machine, and check its predictions at sizes that the fit did not see.

    .venv/bin/python benchmarks/scale/calibrate.py --out runs/scale --constants raysys/plan/constants.json

Preparation, encoder epochs (full and sampled softmax), batch scoring and single requests run at 1/4, 1/2 and 1 of a base
size, which are fitted, and at 3 and 10 times the base, which are predicted. Training also runs at the base size with another batch,
width, number of negatives and catalogue, because the costs of these could not be told apart by size. Bar: every prediction within 25%
of the measurement.
"""

import argparse
import functools
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import torch
from scipy.optimize import nnls

from raysys import cluster, storage
from raysys.adapters import import_dataset
from raysys.bundle import Bundle, Histories
from raysys.models.covisit import Covisitation
from raysys.models.fusion import Fusion
from raysys.models.interest import InterestConfig, InterestEncoder, InterestRetriever
from raysys.models.popularity import Popularity
from raysys.models.ranker import RankerConfig
from raysys.pipeline import Pipeline, seen_mask
from raysys.plan import counts
from raysys.plan.workload import CONSTANTS, Constants
from raysys.prepare.config import PrepareConfig
from raysys.prepare.dataset import Sequences
from raysys.prepare.run import prepare
from raysys.queries import Queries
from raysys.train.batches import InMemory
from raysys.train.encoder import EncoderTrainConfig, train_encoder
from raysys.train.loss import fast_dtype
from raysys.train.ranker import train_ranker

FITTED, CHECKED, BAR = (0.25, 0.5, 1.0), (3.0, 10.0), 0.25
PREPARE_EVENTS, TRAIN_USERS, TRAIN_ITEMS, SCORE_ITEMS, HISTORY = 1_000_000, 2_048, 8_000, 10_000, 20
LOSSES = ("softmax", "sampled")
BATCH, NEGATIVES, DIM, LAYERS, REQUESTS = 256, 1024, 64, 2, 150


@dataclass(frozen=True)
class Measurement:
    """Seconds at one size, and the counts that explain them."""

    what: str
    size: float
    counts: tuple[float, ...]
    seconds: float
    row: dict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for calibrate.json, which report.py reads")
    parser.add_argument("--constants", default=CONSTANTS, help="where the constants go (default: those of the package)")
    parser.add_argument("--scale", type=float, default=1.0, help="all sizes times this; below 1 for a trial run")
    parser.add_argument("--repeats", type=int, default=3, help="medians of so many runs")
    arguments = parser.parse_args()
    if not cluster.WAITING.keys() <= os.environ.keys():  # threads wait as those of raysys's workers
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **cluster.WAITING})
    torch.set_num_threads(os.cpu_count() or 1)
    sizes = (*FITTED, *CHECKED)
    facts: dict[str, float] = {}
    with cluster.connected():
        prepared = [measure_prepare(size, arguments.scale, arguments.repeats, facts) for size in sizes]
    parts = {
        "prepare": prepared,
        "train": [measure_train(run) for run in training_runs(arguments.scale)],
    }
    worlds = [(size, scoring_world(max(300, int(SCORE_ITEMS * arguments.scale * size)))) for size in sizes]
    parts["batch"] = [measure_batch(size, world, arguments.repeats) for size, world in worlds]
    parts["request"], tail = measure_requests(worlds, arguments.repeats)
    fits = {name: fit([m for m in measured if m.size in FITTED]) for name, measured in parts.items()}
    checks = [check(m, fits[name]) for name, measured in parts.items() for m in measured if m.size in CHECKED]
    constants = as_constants(fits, facts, tail, checks)
    storage.write_json(arguments.constants, asdict(constants))
    storage.write_json(storage.join(arguments.out, "calibrate.json"), as_report(parts, constants, checks))
    for item in checks:
        figures = f"predicted {item['predicted']:9.4g} s  measured {item['measured']:9.4g} s  {item['error']:+.0%}"
        print(f"{item['what']:<18}{item['size']:>5g}x  {figures}")
    missed = [item for item in checks if abs(item["error"]) > BAR]
    print(f"{len(checks) - len(missed)} of {len(checks)} predictions within {BAR:.0%}; constants in {arguments.constants}")
    sys.exit(1 if missed else 0)


def told(measured: Measurement) -> Measurement:
    """The measurement, after a line of progress."""
    print(f"  {measured.what:<18}{measured.size:>5g}x  {measured.seconds:9.4g} s", flush=True)
    return measured


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def measure_prepare(size: float, scale: float, repeats: int, facts: dict[str, float]) -> Measurement:
    """`raysys prepare` without the start of Ray; four partitions at every size, so that the same stages run."""
    events = int(PREPARE_EVENTS * scale * size)
    with tempfile.TemporaryDirectory() as folder:
        data, out = os.path.join(folder, "data"), os.path.join(folder, "prepared")
        import_dataset("synthetic", None, data, users=max(50, events // HISTORY), items=max(50, events // 100), events=events, seed=1)
        settings = PrepareConfig(partitions=4)
        if size == FITTED[0]:
            prepare(data, out, config=settings, progress=False)  # starts Ray's workers
        seconds = median_seconds(lambda: prepare(data, out, config=settings, progress=False), repeats)
        written = storage.read_json(os.path.join(out, "manifest.json"))["counts"]
        total = sum(written[part] for part in ("train", "valid", "test"))
        facts["raw_bytes_event"] = folder_bytes(data, "interactions") / total
        facts["prepared_bytes_event"] = folder_bytes(out, "sequences") / total
    row = {"series": "prepare", "events": total, "seconds": seconds, "runs": repeats}
    return told(Measurement("prepare", size, (1.0, float(total)), seconds, row))


def folder_bytes(folder: str, part: str) -> int:
    """Bytes of the files whose name begins with `part`."""
    return sum(os.path.getsize(os.path.join(folder, name)) for name in storage.list_files(folder) if name.startswith(part))


def sequences_of(users: int, items: int, seed: int = 0) -> Sequences:
    """Random histories of HISTORY events, items by a power law."""
    rng = np.random.default_rng(seed)
    chance = 1.0 / np.arange(1, items + 1) ** 0.8
    total = users * HISTORY
    rows = rng.choice(items, total, p=chance / chance.sum()).astype(np.int32)
    return Sequences(
        np.arange(users, dtype=np.int32),
        np.arange(0, total + 1, HISTORY, dtype=np.int64),
        rows,
        np.full(total, 1, np.int8),
        1_700_000_000 + np.tile(np.arange(HISTORY, dtype=np.int64) * 3600, users),
        np.ones(total, np.float32),
        np.ones(total, bool),
        np.zeros(total, np.int8),
    )


def encoder_of(items: int, dim: int = DIM) -> InterestEncoder:
    """An encoder with random weights."""
    torch.manual_seed(0)
    return InterestEncoder(items, 2, InterestConfig(dim=dim, num_layers=LAYERS, max_length=50, dropout=0.2))


@dataclass(frozen=True)
class Run:
    """One shape of training. Runs of one size share users and items; the others vary one thing, so that its cost can be told apart."""

    size: float
    loss: str
    users: int
    items: int
    batch: int = BATCH
    negatives: int = NEGATIVES
    dim: int = DIM


def training_runs(scale: float) -> list[Run]:
    """Sizes for both losses; and at the base size one run each with another batch, width, number of negatives, catalogue."""
    runs = []
    for size in (*FITTED, *CHECKED):
        users, items = (max(BATCH, int(base * scale * size)) for base in (TRAIN_USERS, TRAIN_ITEMS))
        runs += [Run(size, loss, users, items) for loss in LOSSES]
    base = Run(1.0, "sampled", max(BATCH, int(TRAIN_USERS * scale)), max(BATCH, int(TRAIN_ITEMS * scale)))
    varied = ({"batch": BATCH // 4}, {"negatives": 4 * NEGATIVES})
    both = ({"dim": 2 * DIM}, {"items": 8 * base.items})
    return runs + [replace(base, **one) for one in varied] + [replace(base, loss=loss, **one) for loss in LOSSES for one in both]


def measure_train(run: Run) -> Measurement:
    """Seconds of a steady epoch: the median of those after the first."""
    sequences = sequences_of(run.users, run.items)
    epochs = 5 if run.size <= 1 else 3 if run.size <= 3 else 2
    config = EncoderTrainConfig(epochs=epochs, batch_size=run.batch, loss=run.loss, num_negatives=run.negatives)  # type: ignore[arg-type]
    ends: list[float] = []
    encoder = encoder_of(run.items, run.dim)
    train_encoder(encoder, InMemory(sequences), config, seed=0, on_epoch=lambda state: ends.append(time.perf_counter()))
    seconds = float(np.median(np.diff(ends)))  # the history's own seconds are rounded to hundredths
    epoch = counts.epoch_of(run.users, HISTORY, 50)
    steps = np.ceil(epoch.windows / run.batch)
    is_full = run.loss == "softmax"
    explained = (
        float(steps),
        3 * epoch.positions * counts.encoder_flops(run.dim, LAYERS, epoch.length, 1),
        3 * epoch.positions * counts.loss_flops(run.dim, run.items) if is_full else 0.0,
        0.0 if is_full else 3 * epoch.positions * counts.loss_flops(run.dim, run.negatives + 1),
        float(steps) * counts.table_bytes_moved(run.items, run.dim, "adamw", 0),
    )
    row = {"series": f"train, {run.loss}", "events": int(run.users * HISTORY), "items": run.items, "batch": run.batch, "dim": run.dim}
    row |= {"negatives": 0 if is_full else run.negatives, "seconds": seconds, "per_second": run.users / seconds, "runs": epochs - 1}
    return told(Measurement(f"epoch, {run.loss}", run.size, explained, seconds, row))


@dataclass(frozen=True)
class World:
    """A bundle's pipeline over N items, and queries for it."""

    items: int
    pipeline: Pipeline
    queries: Queries


def scoring_world(items: int) -> World:
    """Encoder, co-visitation, popularity and a ranker over a catalogue; weights are random, the work is the same."""
    sequences = sequences_of(1_000, items)
    models = {
        "interest": InterestRetriever.from_encoder(encoder_of(items).eval(), np.ones(items, np.int64)),
        "covisit": Covisitation.fit(sequences, items),
        "popularity": Popularity.fit(sequences, items),
    }
    mixture = Fusion.of(dict.fromkeys(models, 1 / 3), dict.fromkeys(models, 1.0)).to_dict()
    table = pa.table({"item_idx": pa.array(np.arange(items), pa.int32()), "item_id": [f"i{row}" for row in range(items)]})
    histories = Histories.build(sequences.where(np.zeros(len(sequences.items), bool)), [], max_events=1)
    bundle = Bundle(table, models, {"mixture": mixture, "ranker_weight": 0.5}, histories)
    pipeline = Pipeline(bundle)
    positions = sequences.last_positions()
    queries = sequences.queries_before(positions)
    few = queries[slice(0, 256)]
    ranker, _ = train_ranker(
        few,
        pipeline.retrieve(few).candidates,
        sequences.items[positions][:256].astype(np.int64),
        None,
        item_vectors=models["interest"].item_vectors,
        content_vectors=None,
        item_counts=np.bincount(sequences.items, minlength=items),
        config=RankerConfig(epochs=1),
        seed=0,
    )
    models["ranker"] = ranker
    return World(items, Pipeline(bundle), queries)


def measure_batch(size: float, world: World, repeats: int) -> Measurement:
    """Seconds a user of the whole pipeline in batches of 64, seen items masked."""
    users = 256

    def score() -> None:
        for first in range(0, users, 64):
            batch = world.queries[slice(first, first + 64)]
            world.pipeline.recommend(batch, 100, allowed=seen_mask(batch, world.items))

    score()
    seconds = median_seconds(score, repeats) / users
    row = {"series": "batch scoring", "items": world.items, "seconds": seconds * users, "per_second": 1 / seconds, "runs": repeats}
    return told(Measurement("batch, a user", size, (1.0, counts.loss_flops(DIM, world.items)), seconds, row))


def measure_requests(worlds: list[tuple[float, World]], rounds: int) -> tuple[list[Measurement], float]:
    """Mean seconds of single requests, one after the other, at each size, and p99 / mean; medians of interleaved rounds."""
    torch.set_num_threads(1)  # as a replica has: two were twice as slow from 10,000 items on
    means: dict[float, list[float]] = {size: [] for size, _ in worlds}
    tails = []
    for _ in range(rounds):
        for size, world in worlds:
            times = []
            for row in range(REQUESTS + 20):
                query = world.queries[slice(row, row + 1)]
                started = time.perf_counter()
                world.pipeline.recommend(query, 20, allowed=seen_mask(query, world.items))
                times.append(time.perf_counter() - started)
            steady = np.array(times[20:])
            means[size].append(float(steady.mean()))
            tails.append(float(np.quantile(steady, 0.99) / steady.mean()))
    found = []
    for size, world in worlds:
        mean = float(np.median(means[size]))
        row = {"series": "request", "items": world.items, "seconds": mean, "runs": rounds * REQUESTS}
        found.append(told(Measurement("request", size, (1.0, world.items * DIM * 4.0), mean, row)))
    torch.set_num_threads(os.cpu_count() or 1)
    return found, float(np.median(tails))


def fit(measured: Sequence[Measurement]) -> np.ndarray:
    """Non-negative least squares of the relative error: seconds = sum of coefficient * count."""
    explained = np.array([m.counts for m in measured]) / np.array([[m.seconds] for m in measured])
    scale = np.abs(explained).max(axis=0)
    coefficients, _ = nnls(explained / scale, np.ones(len(measured)))
    return coefficients / scale


def check(measured: Measurement, coefficients: np.ndarray) -> dict:
    """A prediction beside its measurement."""
    predicted = float(np.dot(measured.counts, coefficients))
    error = predicted / measured.seconds - 1
    return {"what": measured.what, "size": measured.size, "predicted": predicted, "measured": measured.seconds, "error": round(error, 4)}


def as_constants(fits: dict[str, np.ndarray], facts: dict[str, float], tail: float, checks: list[dict]) -> Constants:
    """The fitted coefficients by name. One that the runs could not tell from 0 is kept above it, as a share of its peak cannot exceed 1."""
    gemm, loss_gemm, stream = gemm_flops(torch.float32), gemm_flops(fast_dtype("cpu")), stream_bytes_s()
    step_s, encoder_s, loss_s, sampled_s, table_s = fits["train"]
    return Constants(
        date=datetime.now(UTC).date().isoformat(),
        commit=git_commit(),
        machine=machine(),
        cores=os.cpu_count() or 1,
        gemm_flops=gemm,
        loss_gemm_flops=loss_gemm,
        stream_bytes_s=stream,
        prepare_s=float(fits["prepare"][0]),
        prepare_s_event=float(fits["prepare"][1]),
        raw_bytes_event=facts["raw_bytes_event"],
        prepared_bytes_event=facts["prepared_bytes_event"],
        step_s=float(step_s),
        encoder_s_flop=max(float(encoder_s), 1 / gemm),
        loss_s_flop=max(float(loss_s), 1 / loss_gemm),
        sampled_s_flop=max(float(sampled_s), 1 / loss_gemm),
        table_s_byte=max(float(table_s), 1 / stream),
        batch_s_user=float(fits["batch"][0]),
        batch_s_flop=max(float(fits["batch"][1]), 1 / gemm),
        request_s=float(fits["request"][0]),
        request_s_byte=max(float(fits["request"][1]), 1 / stream),
        tail=max(1.0, tail),
        checks=checks,
    )


@functools.cache
def gemm_flops(dtype: torch.dtype) -> float:
    """Flop/s of a large square matrix product, the best of ten."""
    size = 2048
    left = torch.randn(size, size).to(dtype)
    return 2 * size**3 / min(median_seconds(lambda: left @ left, 1) for _ in range(10))


def stream_bytes_s() -> float:
    """Bytes a second read and written while copying 512 MB, the best of ten."""
    source = torch.ones(128 << 20)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(median_seconds(lambda: target.copy_(source), 1) for _ in range(10))


def git_commit() -> str:
    """Short hash of HEAD; "unknown" outside a checkout."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def machine() -> str:
    """Processor and cores."""
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else platform.processor()}"


def as_report(parts: dict[str, list[Measurement]], constants: Constants, checks: list[dict]) -> dict:
    """The JSON that report.py gathers."""
    bars = [
        {
            "what": f"{item['what']}, {item['size']:g}x, prediction against measurement",
            "bar": f"within {BAR:.0%}",
            "measured": item["error"],
            "met": abs(item["error"]) <= BAR,
        }
        for item in checks
    ]
    figures = {name: value for name, value in asdict(constants).items() if isinstance(value, float)}
    about = {
        "commit": constants.commit,
        "date": constants.date,
        "machine": constants.machine,
        "fitted": str(FITTED),
        "checked": str(CHECKED),
    }
    return {"name": "calibrate", "rows": [m.row for part in parts.values() for m in part], "figures": figures, "bars": bars, "about": about}


if __name__ == "__main__":
    main()
