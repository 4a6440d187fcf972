"""The ranker's probabilities on MovieLens-100k, split by time, beside DIN, DCN-v2 and gradient-boosted trees.

    raysys bench quality/ranker --data FOLDER --out runs/quality --seeds 0 1 2

FOLDER has MovieLens-100k in RecBole's files under `ml100k`. 80/10/10 by the time of events; a test event is asked with the user's
history up to then, its label is rating >= 4. Trains a bundle with the default settings, one a seed, as a user would; the training
leaves the examples that the ranker learns from and is stopped on, and the peers learn from and are stopped on the same
(`_ranker_peers.py`). Test features, and our probabilities, are those of the bundle, as `raysys evaluate` computes them. What is
finished is not done again. Leaves ml100k-ranker.json in --out.
"""

import argparse
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from safetensors.numpy import load as load_arrays

sys.path.insert(0, str(Path(__file__).parent))
from _commands import commit, raysys  # noqa: E402
from _ranker_peers import PEERS, chosen  # noqa: E402

from raysys import storage  # noqa: E402
from raysys.bundle import Bundle  # noqa: E402
from raysys.evaluate import metrics  # noqa: E402
from raysys.evaluate.run import MAX_HISTORY, matched_sequences  # noqa: E402
from raysys.models.base import Candidates  # noqa: E402
from raysys.models.judge import Examples  # noqa: E402
from raysys.pipeline import Pipeline  # noqa: E402
from raysys.prepare.dataset import Prepared, Sequences  # noqa: E402
from raysys.schema import UNKNOWN_ITEM  # noqa: E402
from raysys.train.calibration import platt  # noqa: E402
from raysys.train.judge import Judged  # noqa: E402

NAME = "ml100k-ranker"
OURS = "raysys"
MAX_ECE = 0.02
RESAMPLES = 1000
AT_ONCE = 256


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the data sets")
    parser.add_argument("--out", required=True, help="folder of bundles and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    folder = Path(arguments.out).absolute() / NAME
    folder.mkdir(parents=True, exist_ok=True)
    data, prepared = folder / "data", folder / "prepared"
    if not (prepared / "manifest.json").exists():
        raysys(["import", "recbole", str(Path(arguments.data) / "ml100k"), "--out", str(data)], folder / "import.log")
        raysys(["prepare", "--data", str(data), "--out", str(prepared), "--split", "time"], folder / "prepare.log")
    runs = []
    for seed in arguments.seeds:
        runs.append(one_seed(folder, prepared, seed))
        storage.write_json(str(folder.parent / f"{NAME}.json"), as_told(runs))
        print(f"seed {seed}: " + ", ".join(f"{who} {figures['auc']:.4f}" for who, figures in runs[-1]["who"].items()), flush=True)
    return 0


def one_seed(folder: Path, prepared: Path, seed: int) -> dict:
    """Train, let the peers learn; or what an earlier call left."""
    done, bundle_at, examples_at = folder / f"seed-{seed}.json", folder / f"bundle-{seed}", folder / f"examples-{seed}"
    if done.exists():
        return storage.read_json(str(done))
    if not (bundle_at / "manifest.json").exists():
        command = ["train", "--prepared", str(prepared), "--out", str(bundle_at), "--seed", str(seed)]
        raysys([*command, "--set", f"judge.examples={examples_at}"], folder / f"train-{seed}.log")
    bundle = Bundle.open(str(bundle_at))
    sequences = matched_sequences(Prepared.open(str(prepared)), bundle)
    learnt, watched = (
        Judged.from_arrays(load_arrays((examples_at / f"{name}.safetensors").read_bytes())) for name in ("learnt", "watched")
    )
    test, valid = Asked.of(bundle, sequences, "test"), Asked.of(bundle, sequences, "valid")
    logits, seconds = {OURS: np.log(test.ours / (1 - test.ours))}, {}
    about: dict = {OURS: {"setting": "defaults"}}
    calibrated = {OURS: test.ours}
    for name in PEERS:
        started = time.monotonic()
        peer = chosen(name, bundle.models["ranker"].judge.tables, learnt, watched, [test.examples, valid.examples], seed=seed)
        seconds[name] = round(time.monotonic() - started, 1)
        logits[name], of_valid = peer["logits"]
        slope, intercept = platt(of_valid, valid.liked) or (1.0, 0.0)
        calibrated[name] = 1 / (1 + np.exp(-(slope * logits[name] + intercept)))
        about[name] = {"setting": peer["setting"], "watched_auc": peer["watched_auc"], "seconds": seconds[name]}
    intervals = paired_intervals(logits, test.liked, test.users, seed=seed)
    who = {name: {**figures(calibrated[name], test.liked), **intervals[name], **about[name]} for name in logits}
    result = {
        "seed": seed,
        "seconds": bundle.manifest["seconds"],
        "learnt": len(learnt),
        "watched": len(watched),
        "examples": len(test.liked),
        "users": len(np.unique(test.users)),
        "base_rate": float(test.liked.mean()),
        "who": who,
    }
    storage.write_json(str(done), result)
    return result


class Asked:
    """Events of a part, as the served bundle sees them before they happen.

    Attributes:
        examples: for the peers. ours: (Q,) probabilities of the bundle. liked: (Q,) bool. users: (Q,) int.
    """

    def __init__(self, examples: Examples, ours: np.ndarray, liked: np.ndarray, users: np.ndarray):
        self.examples, self.ours, self.liked, self.users = examples, ours, liked, users

    @classmethod
    def of(cls, bundle: Bundle, sequences: Sequences, part: str) -> "Asked":
        """All events with a known item and with a history: those that the bundle gives a probability."""
        pipeline, judge = Pipeline(bundle), bundle.models["ranker"].judge
        positions = sequences.target_positions(part)
        positions = positions[sequences.items[positions] != UNKNOWN_ITEM]
        parts, said = [], []
        for first in range(0, len(positions), AT_ONCE):
            batch = positions[first : first + AT_ONCE]
            queries, items = sequences.queries_before(batch, max_events=MAX_HISTORY), sequences.items[batch][:, None]
            candidates: Candidates = pipeline.candidates_of(queries, items)
            parts.append(judge.examples(queries, items, candidates))
            said.append(pipeline.rank(queries, candidates)[1][:, 0])
        ours = np.concatenate(said).astype(np.float64)
        given = np.flatnonzero(np.isfinite(ours))
        return cls(Examples.stack(parts).take(given), ours[given], sequences.positive[positions][given], sequences.rows[positions][given])


def figures(probabilities: np.ndarray, liked: np.ndarray) -> dict:
    """As `raysys evaluate` computes them."""
    return {
        "auc": metrics.auc(probabilities, liked),
        "logloss": metrics.log_loss(probabilities, liked),
        "ece": metrics.calibration_error(metrics.reliability(probabilities, liked)),
    }


def paired_intervals(scores: dict[str, np.ndarray], liked: np.ndarray, users: np.ndarray, *, seed: int) -> dict[str, dict]:
    """95% intervals of each AUC, and of ours less it, over one set of resamples of users."""
    _, group = np.unique(users, return_inverse=True)
    rng = np.random.default_rng(seed)
    count = int(group.max()) + 1
    draws = np.stack([np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(RESAMPLES)])
    aucs = {name: weighted_aucs(values, liked, group, draws) for name, values in scores.items()}

    def interval(values: np.ndarray) -> list[float]:
        return np.quantile(values, [0.025, 0.975]).tolist()

    found = {name: {"auc_interval": interval(values)} for name, values in aucs.items()}
    for name in scores:
        if name != OURS:
            found[name]["behind_interval"] = interval(aucs[OURS] - aucs[name])
    return found


def weighted_aucs(scores: np.ndarray, liked: np.ndarray, group: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """(R,) AUC where each of (R, U) draws says how often a user counts; ties count half."""
    _, place = np.unique(scores, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))
    values = np.empty(len(draws))
    for row, draw in enumerate(draws):
        weight = draw[group[order]].astype(np.float64)
        positive = np.add.reduceat(weight * liked[order], starts)
        negative = np.add.reduceat(weight * ~liked[order], starts)
        below = np.cumsum(negative) - negative / 2
        values[row] = (positive * below).sum() / (positive.sum() * negative.sum())
    return values


def as_told(runs: list[dict]) -> dict:
    """Everything the report needs, JSON-ready."""

    def mean(name: str, key: str) -> float:
        return float(np.mean([run["who"][name][key] for run in runs]))

    ours, ece = mean(OURS, "auc"), mean(OURS, "ece")
    bars = [{"what": f"AUC above {name}", "bar": mean(name, "auc"), "measured": ours, "met": ours > mean(name, "auc")} for name in PEERS]
    bars.append({"what": "calibration error, at most", "bar": MAX_ECE, "measured": ece, "met": ece <= MAX_ECE})
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
    return {"name": NAME, "kind": "ranker", "runs": runs, "bars": bars, "about": about}


if __name__ == "__main__":
    sys.exit(main())
