"""RecTools' SASRec for `training.py`, in an environment of its own: seconds an epoch from the mean of some steps."""

import json
import logging
import sys
import time
import warnings

import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

WARM_UP = 5


MARKS: list[float] = []
EPOCH = {"steps": 0}


class Clock(Callback):
    """Writes to the module, because RecTools copies its trainer."""

    def on_train_start(self, trainer, module):
        EPOCH["steps"] = len(trainer.train_dataloader)

    def on_train_batch_end(self, trainer, *rest):
        MARKS.append(time.perf_counter())


def main() -> None:
    src, loss, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(2)
    rows = []
    for user, line in enumerate(open(src)):
        items = line.split()[1:-2]
        rows += [(user, item, position) for position, item in enumerate(items)] if len(items) > 1 else []
    frame = pd.DataFrame(rows, columns=[Columns.User, Columns.Item, "position"])
    frame[Columns.Weight] = 1.0
    frame[Columns.Datetime] = pd.Timestamp("2020-01-01") + pd.to_timedelta(frame.pop("position"), unit="D")
    model = SASRecModel(
        n_blocks=2,
        n_heads=2,
        n_factors=64,
        dropout_rate=0.5,
        session_max_len=50,
        loss="softmax" if loss == "softmax" else "sampled_softmax",
        n_negatives=1 if loss == "softmax" else 256,
        batch_size=256,
        get_trainer_func=lambda: Trainer(
            max_steps=WARM_UP + steps,
            accelerator="cpu",
            callbacks=[Clock()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ),
    )
    model.fit(Dataset.construct(frame))
    step_s = (MARKS[-1] - MARKS[WARM_UP - 1]) / (len(MARKS) - WARM_UP)
    print(json.dumps({"step_s": step_s, "epoch_s": step_s * EPOCH["steps"]}))


if __name__ == "__main__":
    main()
