"""Exact top-100 for a million users: ours, Faiss flat and the bare matrix products side by side; then `recommend-all` end to end.

    pip install faiss-cpu          # into the environment of the benchmark only
    python benchmarks/scale/batch.py --out runs/batch
    python benchmarks/scale/batch.py --out runs/batch --users 65536 --end-to-end 20000     # minutes instead of a quarter of an hour

Users come in chunks; every chunk is searched by all three in turn, so that what else the machine does hits them alike.
Reported: seconds in all, and the median over chunks of each ratio. Lists are compared; scores of different blocks differ in the last bit,
so two nearly equal items may change places.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before any library that starts threads

import numpy as np
import pyarrow as pa
import threadpoolctl
import torch

from raysys import cluster, storage
from raysys.batch.config import BatchConfig
from raysys.batch.run import run_batch
from raysys.bundle import HISTORY_SCHEMA, Bundle, Histories
from raysys.index.exact import exact_top_k
from raysys.models.fusion import Fusion
from raysys.models.interest import InterestConfig, InterestEncoder, InterestRetriever

CHUNK = 16_384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("-k", type=int, default=100)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--end-to-end", type=int, default=100_000, help="users of the recommend-all run; 0 leaves it out")
    parser.add_argument("--out", required=True, help="folder for batch.json and the files of the run")
    arguments = parser.parse_args()
    out = storage.resolve(arguments.out)[1]
    settings = {name: getattr(arguments, name) for name in ("users", "items", "dim", "k", "threads")}
    found = search(arguments)
    whole = end_to_end(arguments, out) if arguments.end_to_end else None
    result = as_told(found, whole, settings)
    storage.write_json(f"{out}/batch.json", result)
    print(json.dumps(result, indent=2))


def as_told(found: dict, whole: dict | None, settings: dict) -> dict:
    """The measurements in the shape of benchmarks/scale/README.md."""
    sides = {name: side for name, side in found.items() if isinstance(side, dict)}
    rows = [{"series": name, **settings, "per_second": settings["users"] / side["seconds"], **side} for name, side in sides.items()]
    if whole is not None:
        end = {"users": whole["users"], "seconds": whole["seconds"], "per_second": whole["users_per_second"]}
        rows.append({"series": "recommend-all, end to end", **settings, **end})
    ratio = found.get("median_raysys_over_faiss")
    bar = {
        "what": "seconds against Faiss flat, the same threads",
        "bar": "<= 1",
        "measured": ratio,
        "met": None if ratio is None else ratio <= 1,
    }
    figures = {name: value for name, value in found.items() if not isinstance(value, dict)}
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    return {"name": "batch", "rows": rows, "figures": figures, "bars": [bar], "about": about}


def search(arguments: argparse.Namespace) -> dict:
    """Seconds of each side over all chunks, medians of ratios, and how many places of the lists agree."""
    rng = np.random.default_rng(0)
    items = rng.standard_normal((arguments.items, arguments.dim), dtype=np.float32)
    sides: dict[str, Callable] = {
        "raysys": lambda queries: exact_top_k(queries, items, arguments.k, threads=arguments.threads),
        "products": lambda queries: products(queries, items, arguments.threads),
    }
    try:
        import faiss

        faiss.omp_set_num_threads(arguments.threads)
        flat = faiss.IndexFlatIP(arguments.dim)
        flat.add(items)
        sides["faiss"] = lambda queries: flat.search(queries, arguments.k)[::-1]
    except ImportError:
        print("faiss is not installed: measured without it; pip install faiss-cpu")
    for side in sides.values():  # compilation and first touch are not measured
        side(items[:CHUNK])
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    agreed, places = 0, 0
    for number, first in enumerate(range(0, arguments.users, CHUNK)):
        queries = rng.standard_normal((min(CHUNK, arguments.users - first), arguments.dim), dtype=np.float32)
        lists = {}
        order = list(sides) if number % 2 else list(sides)[::-1]
        for name in order:
            started = time.perf_counter()
            lists[name] = sides[name](queries)
            seconds[name].append(time.perf_counter() - started)
        if "faiss" in sides:
            agreed += int((lists["raysys"][0] == lists["faiss"][0]).sum())
            places += lists["faiss"][0].size
    flops = 2.0 * arguments.users * arguments.items * arguments.dim
    figures: dict = {
        name: {"seconds": round(sum(values), 2), "gflops": round(flops / sum(values) / 1e9, 1)} for name, values in seconds.items()
    }
    mine = np.array(seconds["raysys"])
    for name in sides:
        if name != "raysys":
            figures[f"median_raysys_over_{name}"] = round(float(np.median(mine / np.array(seconds[name]))), 3)
    if places:
        figures["places_that_agree"] = agreed / places
    return figures


def products(queries: np.ndarray, items: np.ndarray, threads: int) -> None:
    """Every dot product by BLAS, in blocks, nothing kept: what an exact search cannot beat."""
    buffer = np.empty((4096, 1024), np.float32)
    with threadpoolctl.threadpool_limits(threads, "blas"):
        for first in range(0, len(queries), 4096):
            block = queries[first : first + 4096]
            for start in range(0, len(items), 1024):
                part = items[start : start + 1024]
                np.matmul(block, part.T, out=buffer.reshape(-1)[: len(block) * len(part)].reshape(len(block), len(part)))


def end_to_end(arguments: argparse.Namespace, out: str) -> dict:
    """`recommend-all --stage interest` over an untrained encoder of that size: the time does not depend on what it has learnt."""
    rng, users, items = np.random.default_rng(1), arguments.end_to_end, arguments.items
    torch.manual_seed(0)
    config = InterestConfig(dim=arguments.dim, num_layers=2, max_length=50)
    encoder = InterestRetriever.from_encoder(InterestEncoder(items, 2, config), np.ones(items))
    lengths = rng.integers(5, 51, users)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    total = int(lengths.sum())
    flat = [
        pa.array(rng.integers(0, items, total), pa.int32()),
        pa.array(np.ones(total), pa.int8()),
        pa.array(np.arange(total), pa.int64()),
        pa.array(np.full(total, np.nan), pa.float32()),
    ]
    keys = pa.array([row.to_bytes(16, "big") for row in range(users)], pa.binary(16))
    histories = Histories(pa.table([keys, *(pa.ListArray.from_arrays(offsets, values) for values in flat)], schema=HISTORY_SCHEMA), 50)
    table = pa.table({"item_idx": pa.array(range(items), pa.int32()), "item_id": [f"item-{row}" for row in range(items)]})
    mixture = Fusion.of({"interest": 1.0}, {"interest": 1.0})
    bundle = Bundle(table, {"interest": encoder}, {"mixture": mixture.to_dict(), "ranker_weight": 0.0}, histories)
    bundle.write(f"{out}/bundle", manifest={"events": ["other", "view"], "watermark": 0})
    storage.remove(f"{out}/lists")
    settings = BatchConfig(actors=arguments.threads, users_per_part=10_000)
    with cluster.connected():
        return run_batch(f"{out}/bundle", f"{out}/lists", stage="interest", k=arguments.k, settings=settings)["this_run"]


if __name__ == "__main__":
    main()
