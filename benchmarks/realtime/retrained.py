"""What there is to be had by learning from a stream at all: everything trained anew from scratch, again and again, against the first model.

    raysys bench realtime/retrained --data DATA --out runs/retrained [--share 0.2] [--every 4000] [--events 0]

Both arms answer the same questions from the same live histories, a block of `--every` events at a time: one keeps the first version, the
other has a version of its own for each block, trained with the whole road on every event before it, its new items among them. No learner
of any kind can be expected to do much better on the same models, and none is so slow. What it leaves out is what `realtime/offline`
leaves out. The models are kept in `--out` and used again.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl

sys.path.insert(0, str(Path(__file__).parent))
from offline import Stream, hits_of  # noqa: E402

from raysys import storage  # noqa: E402
from raysys.bundle import Bundle  # noqa: E402
from raysys.online.simulate import K, SimulateConfig, first_model, split  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a data folder, such as `raysys import recbole ML100K` writes")
    parser.add_argument("--out", default="runs/retrained", help="folder of the models and the JSON (default: runs/retrained)")
    parser.add_argument("--share", type=float, default=0.2, help="last share of the events that the first model does not see")
    parser.add_argument("--every", type=int, default=4000, help="events between trainings")
    parser.add_argument("--events", type=int, default=0, help="events replayed at most; 0 for all of them")
    parser.add_argument("--train-epochs", type=int, default=10)
    arguments = parser.parse_args()
    config = SimulateConfig(share=arguments.share, max_events=arguments.events, train_epochs=arguments.train_epochs)
    head, tail, items = split(arguments.data, config)
    later = pl.DataFrame(tail, schema=head.schema)
    rows: list[dict] = []
    differences: list[np.ndarray] = []
    first: tuple[Bundle, Stream] | None = None
    for start in range(0, len(later), arguments.every):
        began = time.perf_counter()
        known = pl.concat([head, later[:start]])
        uri = first_model(known, items, storage.join(arguments.out, f"{arguments.share:g}-{start}"), config)
        seconds = time.perf_counter() - began
        bundle = Bundle.open(uri)
        block = {name: values[start : start + arguments.every] for name, values in tail.items()}
        if first is None:
            first = bundle, Stream(bundle, tail)
        frozen = hits_of(*first, slice(start, start + arguments.every))
        anew = hits_of(bundle, Stream(bundle, block), slice(0, arguments.every))
        differences.append(anew.astype(float) - frozen)
        found = {"events": len(frozen), "frozen": float(frozen.mean()), "retrained": float(anew.mean()), "training_s": seconds}
        rows.append({"series": "retrained from scratch", "first_event": start, **found})
        print(
            "  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in rows[-1].items()),
            flush=True,
        )
    figures = figures_of(rows, np.concatenate(differences))
    result = {
        "name": "retrained",
        "rows": rows,
        "figures": figures,
        "bars": [],
        "about": {"data": arguments.data, "share": f"{arguments.share:g}"},
    }
    storage.write_json(storage.join(arguments.out, "retrained.json"), result)
    for name, value in figures.items():
        print(f"{name}: {value:.4g}")


def figures_of(rows: list[dict], differences: np.ndarray) -> dict[str, float]:
    """Hit rates over all events, and how sure their difference is; the first block is the same model twice and counts too."""
    events = np.array([row["events"] for row in rows])
    rates = {arm: float((events * [row[arm] for row in rows]).sum() / events.sum()) for arm in ("frozen", "retrained")}
    return {
        f"hit-rate@{K}, frozen": rates["frozen"],
        f"hit-rate@{K}, retrained": rates["retrained"],
        "relative gain": rates["retrained"] / rates["frozen"] - 1,
        "standard error of the difference": float(differences.std() / np.sqrt(len(differences))),
    }


if __name__ == "__main__":
    main()
