"""Quality of the whole pipeline, on one data set or on all: import, prepare, then train and evaluate one seed after the other.

    raysys bench quality/run all --data FOLDER --out runs/quality --seeds 0 1 2
    raysys bench quality/run beauty --data FOLDER --out runs/quality [--config FILE] [--fit train+valid]

FOLDER holds the data sets under the names of _sets.py. Every step is the command that a user would run, with the default settings
unless --config says otherwise. Settings were chosen on validation; the test part is read once a seed, here. What is finished is
not done again: started a second time, the benchmark goes on where it was. Leaves NAME.json in --out; report.py makes a page of it.
"""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _commands import commit, raysys  # noqa: E402
from _sets import SETS  # noqa: E402

from raysys import storage  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*SETS, "all"])
    parser.add_argument("--data", required=True, help="folder of the data sets")
    parser.add_argument("--out", required=True, help="folder of bundles and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--config", default=None, help="train settings; the defaults when absent")
    parser.add_argument("--fit", choices=["train", "train+valid"], default="train", help="train+valid is another protocol, and labelled so")
    arguments = parser.parse_args()
    for name in SETS if arguments.name == "all" else [arguments.name]:
        run(name, arguments)
    return 0


def run(name: str, arguments: argparse.Namespace) -> None:
    """One data set, all seeds; writes its JSON after each seed."""
    label = name + ("-" + Path(arguments.config).stem if arguments.config else "") + ("-refit" if arguments.fit == "train+valid" else "")
    folder = Path(arguments.out).absolute() / label
    folder.mkdir(parents=True, exist_ok=True)
    data, prepared = folder.parent / f"{name}-data", folder.parent / f"{name}-prepared"
    if not (prepared / "manifest.json").exists():
        raysys(["import", "sequences", str(Path(arguments.data) / SETS[name].folder), "--out", str(data)], folder / "import.log")
        raysys(["prepare", "--data", str(data), "--out", str(prepared), "--split", "leave-one-out"], folder / "prepare.log")
    runs = []
    for seed in arguments.seeds:
        runs.append(one_seed(folder, prepared, seed, arguments))
        result = as_told(name, label, runs, arguments)
        storage.write_json(str(folder.parent / f"{label}.json"), result)
        final = runs[-1]["metrics"]["final"]
        print(
            f"{label} seed {seed}: ndcg@10 {final['ndcg@10']:.4f}, recall@10 {final['recall@10']:.4f}, {runs[-1]['seconds'] / 60:.1f} min",
            flush=True,
        )


def one_seed(folder: Path, prepared: Path, seed: int, arguments: argparse.Namespace) -> dict:
    """Train and evaluate, or what an earlier call left."""
    done, bundle = folder / f"seed-{seed}.json", folder / f"bundle-{seed}"
    if done.exists():
        return storage.read_json(str(done))
    seconds = peak = None
    if not (bundle / "manifest.json").exists():
        command = ["train", "--prepared", str(prepared), "--out", str(bundle), "--seed", str(seed), "--fit", arguments.fit]
        if arguments.config:
            command += ["--config", str(Path(arguments.config).absolute())]
        usage = raysys(command, folder / f"train-{seed}.log")
        seconds, peak = usage.seconds, usage.peak_bytes
    metrics = folder / f"metrics-{seed}.json"
    command = ["evaluate", "--prepared", str(prepared), "--model", str(bundle), "--split", "test", "--out", str(metrics)]
    raysys(command, folder / f"evaluate-{seed}.log")
    manifest = storage.read_json(str(bundle / "manifest.json"))
    result = {
        "seed": seed,
        # A training that was interrupted counts whole only in the manifest of the call that ended it.
        "seconds": seconds or manifest["seconds"],
        "peak_bytes": peak,
        "metrics": storage.read_json(str(metrics)),
        "validation": manifest["metrics"]["validation"],
        "settings": {part: manifest["config"][part] for part in ("interest", "encoder")},
    }
    storage.write_json(str(done), result)
    return result


def as_told(name: str, label: str, runs: list[dict], arguments: argparse.Namespace) -> dict:
    """Everything the report needs, JSON-ready."""
    known = SETS[name]
    finals = [run["metrics"]["final"] for run in runs]
    mean = {key: sum(final[key] for final in finals) / len(finals) for key in ("recall@10", "ndcg@10")}
    minutes = max(run["seconds"] for run in runs) / 60
    return {
        "name": label,
        "data": name,
        "config": arguments.config or "defaults",
        "fit": arguments.fit,
        "runs": runs,
        "bars": [
            {"what": "recall@10", "bar": known.recall, "measured": mean["recall@10"], "met": mean["recall@10"] >= known.recall},
            {"what": "ndcg@10", "bar": known.ndcg, "measured": mean["ndcg@10"], "met": mean["ndcg@10"] >= known.ndcg},
            {"what": "minutes of training, longest seed", "bar": known.minutes, "measured": minutes, "met": minutes <= known.minutes},
        ],
        "about": {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()},
    }


if __name__ == "__main__":
    sys.exit(main())
