"""Peers on the files of the quality benchmark, trained here: the same split, masking and metrics, the same seconds of training.

    raysys bench quality/peers beauty --data FOLDER --out runs/quality --rectools-python PYTHON --recbole-python PYTHON [--seconds 300]

Trains RecTools' SASRec and BERT4Rec, implicit's ALS and item-kNN (through RecTools) and RecBole's SASRec on all but the last two events
of each user, with the settings that the libraries ship, and ranks each user's last event after all the others. `--seconds` is what raysys
took for a seed on the same machine; ALS and item-kNN end by themselves. The peers live in environments of their own (see
benchmarks/scale/training.py). Leaves NAME-peers.json, which report.py shows beside ours.
"""

import argparse
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "scale")]
import _memory  # noqa: E402
from _sets import SETS  # noqa: E402

from raysys import storage  # noqa: E402
from raysys.evaluate import metrics  # noqa: E402

HERE = Path(__file__).parent
PEERS = {
    "RecTools SASRec": ("rectools", "sasrec"),
    "RecTools BERT4Rec": ("rectools", "bert4rec"),
    "implicit ALS": ("rectools", "als"),
    "implicit item-kNN": ("rectools", "item-knn"),
    "RecBole SASRec": ("recbole", "sasrec"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*SETS])
    parser.add_argument("--data", required=True, help="folder of the data sets")
    parser.add_argument("--out", required=True)
    parser.add_argument("--rectools-python", default=None)
    parser.add_argument("--recbole-python", default=None)
    parser.add_argument("--seconds", type=float, default=300, help="of training, for the peers that train by epochs")
    arguments = parser.parse_args()
    pythons = {"rectools": arguments.rectools_python, "recbole": arguments.recbole_python}
    # The sequences; a README beside them is smaller.
    source = max((Path(arguments.data) / SETS[arguments.name].folder).glob("*.txt"), key=lambda path: path.stat().st_size)
    rows = []
    for title, (library, model) in PEERS.items():
        if pythons[library] is None:
            print(f"{title}: left out, no --{library}-python", flush=True)
            continue
        rows.append({"series": title, **measured(pythons[library], HERE / f"_peer_{library}.py", source, model, arguments.seconds)})
        print(f"{title}: ndcg@10 {rows[-1]['ndcg@10']:.4f}, recall@10 {rows[-1]['recall@10']:.4f}, {rows[-1]['seconds']:.0f} s", flush=True)
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": arguments.seconds}
    result = {"name": f"{arguments.name}-peers", "kind": "peers", "data": arguments.name, "rows": rows, "about": about}
    storage.write_json(str(Path(arguments.out) / f"{arguments.name}-peers.json"), result)
    return 0


def measured(python: str, script: Path, source: Path, model: str, seconds: float) -> dict:
    """Train and rank in the peer's environment; metrics by raysys."""
    with tempfile.TemporaryDirectory() as folder:
        ranks_path = Path(folder) / "ranks.npy"
        command = [python, str(script), str(source.absolute()), model, str(seconds), str(ranks_path)]
        usage = _memory.measured(command, hertz=1.0, log=str(Path(folder) / "log"), cwd=folder)
        ranks = np.load(ranks_path)
    figures = metrics.mean_with_intervals(metrics.rank_metrics(ranks, (10,)), np.arange(len(ranks)), resamples=1000, seed=0)
    kept = {name: figures[name] for name in ("ndcg@10", "ndcg@10_interval", "recall@10", "recall@10_interval")}
    return {**kept, "users": len(ranks), "seconds": usage.seconds, "peak_bytes": usage.peak_bytes}


if __name__ == "__main__":
    sys.exit(main())
