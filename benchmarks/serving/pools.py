"""Retrieval from pools against scoring every item: how alike the answers are, and what each costs, without HTTP.

    raysys bench serving/pools --items 20000 100000 --out runs/serving [--bundle BUNDLE]

For synthetic catalogues (`_catalogue.py`), or a bundle of yours: share of the first 20 candidates that both have, the largest and the
median difference of their log-probabilities, milliseconds of one request (retrieval alone, and with ranking) on one thread, with a filter
that keeps one item in a thousand too, and the seconds to build and to open the index.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from raysys import storage
from raysys.bundle import Bundle
from raysys.models.base import Candidates
from raysys.pipeline import Pipeline
from raysys.pools.config import PoolConfig

sys.path.insert(0, str(Path(__file__).parent))
from _catalogue import build_bundle  # noqa: E402

FIRST, OVERLAP, DIFFERENCE = 20, 0.95, 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--bundle", nargs="*", default=[], help="bundles to compare on beside the synthetic catalogues")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--size", type=int, default=PoolConfig.size, help="of a source's pool")
    parser.add_argument("--sample", type=int, default=PoolConfig.sample, help="of the normalisers")
    parser.add_argument("--out", default=None, help="folder of pools.json")
    arguments = parser.parse_args()
    rows = []
    for name, open_bundle in worlds(arguments):
        rows += compare(name, open_bundle(), arguments)
    bars = []
    for row in rows:
        if row["series"].startswith("pools"):
            what = f"{row['series']}, {row['items']:,} items"
            bars.append(bar(f"{what}: first {FIRST} as from all items", f">= {OVERLAP}", row["overlap"], row["overlap"] >= OVERLAP))
            bars.append(
                bar(f"{what}: difference of log-probabilities", f"<= {DIFFERENCE}", row["difference"], row["difference"] <= DIFFERENCE)
            )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit, "size": arguments.size, "sample": arguments.sample}
    if arguments.out:
        result = {"name": "pools", "rows": rows, "figures": {}, "bars": bars, "about": about}
        storage.write_json(storage.join(arguments.out, "pools.json"), result)


def bar(what: str, wanted: str, measured: float, met: bool) -> dict:
    return {"what": what, "bar": wanted, "measured": measured, "met": met}


def worlds(arguments: argparse.Namespace) -> list[tuple[str, Callable[[], Bundle]]]:
    synthetic = [("synthetic", lambda items=items: build_bundle(items)) for items in arguments.items]
    return synthetic + [(Path(uri).name, lambda uri=uri: Bundle.open(uri)) for uri in arguments.bundle]


def compare(name: str, bundle: Bundle, arguments: argparse.Namespace) -> list[dict]:
    torch.set_num_threads(1)  # as a replica has
    threadpool_limits(1)
    items, queries = bundle.items.num_rows, bundle.histories.sample(arguments.requests)
    dense, config = Pipeline(bundle), PoolConfig(items_from=1, size=arguments.size, sample=arguments.sample)
    with tempfile.TemporaryDirectory() as folder:
        pooled, build_s = timed(lambda: Pipeline(bundle).pooled(config, folder=folder))
        _, open_s = timed(lambda: Pipeline(bundle).pooled(config, folder=folder))
        narrow = np.arange(items) % 1000 == 7
        found: dict[str, list[Candidates]] = {"dense": [], "pools": []}
        times: dict[str, list[float]] = {f"{side}, {what}": [] for side in found for what in ("retrieve", "recommend", "narrow filter")}
        for at in range(len(queries)):
            query = queries[slice(at, at + 1)]
            blocked = (query.indptr, query.items)
            for side, pipeline in (("dense", dense), ("pools", pooled)):
                retrieved, seconds = timed(lambda: pipeline.retrieve(query, blocked=blocked))  # noqa: B023 - called at once
                found[side].append(retrieved.candidates)
                times[f"{side}, retrieve"].append(seconds)
                times[f"{side}, recommend"].append(timed(lambda: pipeline.recommend(query, FIRST, blocked=blocked))[1])  # noqa: B023
                filtered = timed(lambda: pipeline.retrieve(query, FIRST, allowed=narrow, blocked=blocked))  # noqa: B023
                times[f"{side}, narrow filter"].append(filtered[1])
    differences = np.concatenate([difference(*pair) for pair in zip(found["pools"], found["dense"], strict=True)])
    overlap = float(np.mean([shared(*pair) for pair in zip(found["pools"], found["dense"], strict=True)]))
    rows = []
    for side in found:
        row = {"series": f"{side}, {name}", "items": items}
        for what in ("retrieve", "recommend", "narrow filter"):
            milliseconds = [1000 * seconds for seconds in times[f"{side}, {what}"][10:]]
            row |= {f"{what}_p50_ms": statistics.median(milliseconds), f"{what}_p99_ms": float(np.quantile(milliseconds, 0.99))}
        if side == "pools":
            row |= {"overlap": overlap, "difference": float(differences.max()), "difference_p50": float(np.median(differences))}
            row |= {"build_s": build_s, "open_s": open_s}
        rows.append(row)
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    return rows


def timed(run: Callable):
    started = time.perf_counter()
    return run(), time.perf_counter() - started


def shared(one: Candidates, other: Candidates) -> float:
    """Share of the first candidates of a query that both have."""
    return len(set(one.items[0, :FIRST]) & set(other.items[0, :FIRST])) / FIRST


def difference(one: Candidates, other: Candidates) -> np.ndarray:
    """Absolute differences of the fused log-probabilities of candidates that both have."""
    _, ours, theirs = np.intersect1d(one.items[0], other.items[0], return_indices=True)
    return np.abs(one.fused[0, ours] - other.fused[0, theirs])


if __name__ == "__main__":
    main()
