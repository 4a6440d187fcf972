"""Does `encoder.compile` pay here? The same training with and without torch.compile, in turns, on synthetic histories.

    .venv/bin/python benchmarks/scale/compiled.py --out runs/scale --loss sampled --steps 120

2 layers, d=64, 2 heads, length 50, dropout .5, batch 256, two threads. Histories are geometric in length (mean 12), so batches have
many shapes; blocks are compiled for all of them at once. What the compiler takes at the start counts: the report says after how many
steps it is earned back, if ever.
"""

import argparse
import os
import time

import numpy as np
import torch

from raysys import storage
from raysys.models.interest import InterestConfig, InterestEncoder
from raysys.prepare.dataset import Sequences
from raysys.train.batches import InMemory
from raysys.train.encoder import EncoderTrainConfig, train_encoder

SHAPE = InterestConfig(dim=64, num_layers=2, num_heads=2, max_length=50, dropout=0.5)
BATCH = 256


class Enough(Exception):
    """As many steps were taken as were asked for."""


def histories(users: int, items: int, seed: int = 0) -> Sequences:
    """Lengths geometric with mean 12, at least 2, at most 50; items uniform: their values do not matter for the time."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.geometric(1 / 12, users), 2, 50)
    E = int(lengths.sum())
    flat = (np.ones(E, np.int8), np.arange(E), np.full(E, np.nan, np.float32), np.ones(E, bool), np.zeros(E, np.int8))
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Sequences(np.arange(users, dtype=np.int32), indptr, rng.integers(0, items, E).astype(np.int32), *flat)


def timed(data: Sequences, items: int, loss: str, compiled: bool, steps: int) -> tuple[float, float]:
    """Seconds of the first tenth of the steps, in which the compiler works, and seconds a step after them."""
    torch._dynamo.reset()
    encoder = InterestEncoder(items, 2, SHAPE)
    marks = [time.perf_counter()]

    def on_step(figures: dict, step: int) -> None:
        marks.append(time.perf_counter())
        if step >= steps:
            raise Enough

    config = EncoderTrainConfig(epochs=1000, batch_size=BATCH, loss=loss, num_negatives=256, compile=compiled)  # type: ignore[arg-type]
    try:
        train_encoder(encoder, InMemory(data), config, seed=0, on_step=on_step)
    except Enough:
        pass
    first = steps // 10
    return marks[first] - marks[0], (marks[-1] - marks[first]) / (steps - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/scale")
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--loss", choices=["softmax", "sampled"], default="sampled")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    data = histories(arguments.users, arguments.items)
    measured: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for _ in range(arguments.rounds):
        for compiled, found in measured.items():
            found.append(timed(data, arguments.items, arguments.loss, compiled, arguments.steps))
            print(
                f"compile {str(compiled).lower():<6} first steps {found[-1][0]:6.1f} s, then {found[-1][1] * 1000:6.1f} ms a step",
                flush=True,
            )
    start, step = ({key: float(np.median([pair[at] for pair in found])) for key, found in measured.items()} for at in (0, 1))
    gain = step[False] - step[True]
    earned = (start[True] - start[False]) / gain if gain > 0 else None
    rows = [
        {"series": f"compile {str(key).lower()}", "items": arguments.items, "first_s": start[key], "seconds": step[key], "runs": len(found)}
        for key, found in measured.items()
    ]
    figures = {"steps without over with": step[False] / step[True], "steps until it is earned back": earned}
    storage.write_json(
        storage.join(arguments.out, "compiled.json"),
        {"name": "compiled", "rows": rows, "figures": figures, "bars": [], "about": {"loss": arguments.loss}},
    )
    print(f"a step without over with {figures['steps without over with']:.2f}; earned back after {earned and round(earned)} steps")


if __name__ == "__main__":
    main()
