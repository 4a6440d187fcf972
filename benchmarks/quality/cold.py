"""Cold start: items that the training has not seen, and users of whom next to nothing is known.

    raysys bench quality/cold ml100k --data FOLDER --out runs/quality [--budget 10m] [--seed 0]
    raysys bench quality/cold toys --data FOLDER --out runs/quality --set encoder.id_dropout=0.1

Two trainings. Items: a tenth of the items loses all its events and stays in the catalogue with its text; each user who had one is
asked for the last one, with what the user did before it and the other items know; ranked among all items, and among the hidden
ones. Users: leave-one-out; each user's test event is asked with no more than the last 0, 1, 2, 5 events before it. Items that the user
had are masked throughout, the cut history's too: a stand-in for a new user must not be offered what the real one had already.
Beside the whole pipeline: popularity, and content neighbours alone. Leaves NAME-cold.json in --out,
with the settings in its name where some are given.
"""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl

sys.path.insert(0, str(Path(__file__).parent))
from _commands import commit, raysys  # noqa: E402
from _sets import SETS  # noqa: E402

from raysys import storage  # noqa: E402
from raysys.bundle import Bundle  # noqa: E402
from raysys.evaluate import metrics  # noqa: E402
from raysys.evaluate.run import matched_sequences  # noqa: E402
from raysys.models.base import top_k  # noqa: E402
from raysys.pipeline import Pipeline, seen_mask  # noqa: E402
from raysys.prepare.dataset import Prepared, Sequences  # noqa: E402
from raysys.queries import Queries  # noqa: E402

LENGTHS = (0, 1, 2, 5)
HIDDEN_SHARE = 0.1
KS = (10, 50)
AT_ONCE = 256
SOURCES = {"ml100k": ("recbole", "ml100k"), **{name: ("sequences", known.folder) for name, known in SETS.items()}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(SOURCES))
    parser.add_argument("--data", required=True, help="folder of the data sets")
    parser.add_argument("--out", required=True, help="folder of bundles and results")
    parser.add_argument("--budget", default=None, help="--time-budget of each training; none when absent")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="settings of both trainings; the defaults when absent"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    label = "-".join([arguments.name, "cold", *arguments.set])
    folder = Path(arguments.out).absolute() / label
    folder.mkdir(parents=True, exist_ok=True)
    kind, place = SOURCES[arguments.name]
    if not (folder / "data" / "dataset.json").exists():
        raysys(["import", kind, str(Path(arguments.data) / place), "--out", str(folder / "data")], folder / "import.log")
    hidden = hide_items(folder, arguments.seed)
    whole, rest = (trained(folder, name, arguments) for name in ("data", "data-hidden"))
    result = {
        "name": label,
        "kind": "cold",
        "seed": arguments.seed,
        "budget": arguments.budget,
        "items": of_items(*rest, folder, hidden, arguments.seed),
        "users": of_users(*whole, arguments.seed),
        "about": {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()},
    }
    storage.write_json(str(folder.parent / f"{label}.json"), result)
    for question, found in (("hidden items", result["items"]["who"]), *((f"{n} events", who) for n, who in result["users"]["who"].items())):
        print(question + ": " + ", ".join(f"{who} {figures['ndcg@10']:.4f}" for who, figures in found.items()), flush=True)
    return 0


def hide_items(folder: Path, seed: int) -> list[str]:
    """Write `data-hidden`, the data without the events of a tenth of its items; their ids."""
    events = pl.read_parquet(folder / "data" / "interactions" / "*.parquet")
    listed = pl.read_parquet(folder / "data" / "items.parquet")["item_id"].cast(pl.String)
    ids = events["item_id"].cast(pl.String).unique().sort()
    ids = ids.filter(ids.is_in(listed.implode()))
    hidden = ids.sample(int(HIDDEN_SHARE * len(ids)), seed=seed).sort()
    target = folder / "data-hidden"
    if not (target / "dataset.json").exists():
        (target / "interactions").mkdir(parents=True, exist_ok=True)
        events.filter(~pl.col("item_id").cast(pl.String).is_in(hidden.implode())).write_parquet(target / "interactions" / "part-0.parquet")
        for name in ("items.parquet", "users.parquet", "dataset.json"):
            if (folder / "data" / name).exists():
                (target / name).write_bytes((folder / "data" / name).read_bytes())
    return hidden.to_list()


def trained(folder: Path, name: str, arguments: argparse.Namespace) -> tuple[Prepared, Bundle]:
    """Prepared leave-one-out, and a bundle with the default settings; or what an earlier call left."""
    prepared, bundle = folder / f"{name}-prepared", folder / f"{name}-bundle"
    if not (prepared / "manifest.json").exists():
        raysys(
            ["prepare", "--data", str(folder / name), "--out", str(prepared), "--split", "leave-one-out"], folder / f"prepare-{name}.log"
        )
    if not (bundle / "manifest.json").exists():
        command = ["train", "--prepared", str(prepared), "--out", str(bundle), "--seed", str(arguments.seed)]
        command += [part for setting in arguments.set for part in ("--set", setting)]
        raysys(command + (["--time-budget", arguments.budget] if arguments.budget else []), folder / f"train-{name}.log")
    return Prepared.open(str(prepared)), Bundle.open(str(bundle))


def of_items(prepared: Prepared, bundle: Bundle, folder: Path, hidden: list[str], seed: int) -> dict:
    """The last hidden item of each user, among all items and among the hidden ones."""
    everything = matched_sequences(Prepared.open(str(folder / "data-prepared")), bundle)
    rows = np.array([bundle.item_index[item] for item in hidden])
    is_hidden = np.zeros(bundle.items.num_rows, bool)
    is_hidden[rows] = True
    of_hidden = np.flatnonzero(is_hidden[everything.items] & (everything.items >= 0))
    last = of_hidden[np.flatnonzero(np.diff(everything.rows[of_hidden], append=-1))]
    targets = everything.items[last]
    queries = without(everything.queries_before(last), is_hidden)
    asked = queries.lengths > 0
    queries, targets = queries.take(np.flatnonzero(asked)), targets[asked]
    found = {
        f"{who}, {among}": ranks
        for among, allowed in (("among all", np.ones_like(is_hidden)), ("among hidden", is_hidden))
        for who, ranks in everybody(
            bundle, queries, targets, lambda part, allowed=allowed: allowed & seen_mask(part, len(allowed)), seed
        ).items()
    }
    return {"hidden": len(hidden), "users": len(targets), "who": {who: figures(ranks, seed) for who, ranks in found.items()}}


def of_users(prepared: Prepared, bundle: Bundle, seed: int) -> dict:
    """Each user's test event after the last few events before it."""
    sequences: Sequences = matched_sequences(prepared, bundle)
    positions = sequences.target_positions("test")
    targets, whole = sequences.items[positions], sequences.queries_before(positions)
    who = {}
    for length in LENGTHS:
        cut = sequences.queries_before(positions, max_events=length) if length else nothing_known(whole)
        ranks = everybody(bundle, cut, targets, seen_of(whole, bundle.items.num_rows), seed)
        who[str(length)] = {name: figures(values, seed) for name, values in ranks.items()}
    return {"users": len(targets), "who": who}


def seen_of(whole: Queries, num_items: int):
    """Masks of the whole histories, for slices that are asked for in order."""
    masks = (seen_mask(whole[slice(first, first + AT_ONCE)], num_items) for first in range(0, len(whole), AT_ONCE))
    return lambda _: next(masks)


def everybody(bundle: Bundle, queries: Queries, targets: np.ndarray, allowed, seed: int) -> dict[str, np.ndarray]:
    """Ranks of the targets by the pipeline, popularity and content alone.

    Args:
        bundle: whose models answer.
        queries: B histories. targets: (B,) item rows.
        allowed: part of the queries -> (b, N) bool, called once a part, in order.
        seed: of ties.
    """
    pipeline, rng = Pipeline(bundle), np.random.default_rng(seed)
    alone = {name: bundle.models[name] for name in ("popularity", "content") if name in bundle.models}
    ranks: dict[str, list[np.ndarray]] = {name: [] for name in ("raysys", *alone)}
    for first in range(0, len(queries), AT_ONCE):
        rows = slice(first, first + AT_ONCE)
        part, wanted = queries[rows], targets[rows]
        mask = allowed(part)
        candidates = pipeline.retrieve(part, allowed=mask).candidates
        scores, _ = pipeline.rank(part, candidates)
        answer = np.take_along_axis(candidates.items, top_k(scores, scores.shape[1]), 1)
        ranks["raysys"].append(metrics.list_ranks(answer, wanted))
        for name, model in alone.items():
            ranks[name].append(metrics.target_ranks(model.scores(part), wanted, mask, rng))
    return {name: np.concatenate(parts) for name, parts in ranks.items()}


def without(queries: Queries, left_out: np.ndarray) -> Queries:
    """Histories without some items."""
    keep = ~left_out[queries.items]
    indptr = np.concatenate([[0], np.cumsum(keep)])[queries.indptr].astype(np.int64)
    return Queries(queries.items[keep], queries.events[keep], queries.times[keep], queries.values[keep], indptr, queries.now)


def nothing_known(queries: Queries) -> Queries:
    """The same users without any history."""
    return without(queries, np.ones(int(queries.items.max(initial=0)) + 1, bool))


def figures(ranks: np.ndarray, seed: int) -> dict:
    """Means with 95% intervals over users."""
    return metrics.mean_with_intervals(metrics.rank_metrics(ranks, KS), np.arange(len(ranks)), seed=seed)


if __name__ == "__main__":
    sys.exit(main())
