"""Seeds averaged as a teacher, distilled into one student at the price of one: what the teacher gains, and what the student keeps of it.

    raysys bench quality/ensemble beauty --out runs/quality --seeds 0 1 2

Takes the bundles that quality/run left in --out. Teacher: the mean of the encoders' logits. Student: the first seed's encoder, trained
on towards the teacher, on the training part's histories with events left out; `raysys compress --set teachers=[...] --set
student_layers=1` does the same. Teacher and student are put in the place of the first seed's encoder; fusion and ranker stay what they
were. Test part. Leaves NAME-ensemble.json.
"""

import argparse
import dataclasses
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _commands import commit  # noqa: E402
from _sets import SETS  # noqa: E402

from raysys import storage  # noqa: E402
from raysys.bundle import Bundle  # noqa: E402
from raysys.compress.config import CompressConfig  # noqa: E402
from raysys.compress.distil import distilled  # noqa: E402
from raysys.compress.teachers import teacher_of  # noqa: E402
from raysys.evaluate import metrics  # noqa: E402
from raysys.evaluate.run import matched_sequences  # noqa: E402
from raysys.evaluate.stages import Stages  # noqa: E402
from raysys.models.interest import InterestRetriever  # noqa: E402
from raysys.pipeline import Pipeline  # noqa: E402
from raysys.prepare.dataset import Prepared  # noqa: E402

AT_ONCE = 128
STAGES = {"interest": "encoder", "final": "final"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(SETS))
    parser.add_argument("--out", required=True, help="folder of bundles and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=CompressConfig().distil_epochs, help="of the student")
    parser.add_argument("--share", type=float, default=CompressConfig().distil_share, help="weight of the teacher in what it learns")
    parser.add_argument("--thinned", type=float, default=CompressConfig().distil_thinned, help="share of events left out of its histories")
    parser.add_argument("--dropout", type=float, default=CompressConfig().distil_dropout, help="of the student")
    parser.add_argument("--lr", type=float, default=CompressConfig().distil_lr, help="peak learning rate of the student")
    arguments = parser.parse_args()
    folder = Path(arguments.out).absolute()
    uris = [str(folder / arguments.name / f"bundle-{seed}") for seed in arguments.seeds]
    prepared = Prepared.open(str(folder / f"{arguments.name}-prepared"))
    bundles = [Bundle.open(uri) for uri in uris]
    first = bundles[0]
    settings = CompressConfig(
        teachers=uris[1:],
        student_layers=1.0,
        distil_epochs=arguments.epochs,
        distil_share=arguments.share,
        distil_thinned=arguments.thinned,
        distil_lr=arguments.lr,
        distil_dropout=arguments.dropout,
    )
    student = distilled(first, prepared, settings, say=lambda text: print(f"  {text}", flush=True))
    assert student is not None
    teacher = InterestRetriever(teacher_of(first, uris[1:]), first.models["interest"].warm)
    entries = {f"seed {seed}": bundle for seed, bundle in zip(arguments.seeds, bundles, strict=True)}
    entries["teacher, mean of all"] = dataclasses.replace(first, models={**first.models, "interest": teacher})
    entries["student"] = student
    ndcg = {name: asked(prepared, bundle) for name, bundle in entries.items()}
    rows = []
    for name, by_stage in ndcg.items():
        row: dict = {"series": name}
        for stage, label in STAGES.items():
            against = {"difference": by_stage[stage]["ndcg@10"] - next(iter(ndcg.values()))[stage]["ndcg@10"]}
            interval = metrics.mean_with_intervals(against, np.arange(len(against["difference"])), resamples=1000, seed=0)
            row |= {f"{label} {metric}": float(values.mean()) for metric, values in by_stage[stage].items()}
            row[f"{label} less the first"] = interval["difference"]
            row[f"{label} less the first, interval"] = interval.get("difference_interval")
        rows.append(row)
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    about = {"commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds"), "seeds": str(arguments.seeds)}
    how = f"{arguments.share:g} teacher, {arguments.thinned:g} of the events left out, lr {arguments.lr:g}, dropout {arguments.dropout:g}"
    about |= {"student": f"{arguments.epochs} epochs, {how}"}
    result = {"name": f"{arguments.name}-ensemble", "kind": "ensemble", "data": arguments.name, "rows": rows, "about": about}
    storage.write_json(str(folder / f"{arguments.name}-ensemble.json"), result)
    return 0


def asked(prepared: Prepared, bundle: Bundle) -> dict[str, dict[str, np.ndarray]]:
    """stage -> metric -> (Q,) figures of the test events, masked."""
    sequences = matched_sequences(prepared, bundle)
    positions = sequences.target_positions("test")
    queries, targets = sequences.queries_before(positions, max_events=500), sequences.items[positions]
    stages = Stages(Pipeline(bundle), mask=True, list_k=10, seed=0)
    for start in range(0, len(targets), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        stages.add(queries[rows], targets[rows])
    return {stage: metrics.rank_metrics(np.concatenate(stages.ranks[stage]), (10,)) for stage in STAGES}


if __name__ == "__main__":
    sys.exit(main())
