"""RecTools' models for `peers.py`, in an environment of its own: trains within a budget, then ranks each user's last item.

Arguments: one-line-a-user file, model, seconds of training, result (.npy of a rank a user, 0 where the target is not in the list).
Settings are the library's defaults, which are what its authors publish with; the seed is fixed.
"""

import logging
import sys
import time
import warnings
from datetime import timedelta

import numpy as np
import pandas as pd
import torch
from implicit.als import AlternatingLeastSquares
from implicit.nearest_neighbours import TFIDFRecommender
from pytorch_lightning import Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset, Interactions
from rectools.models import BERT4RecModel, ImplicitALSWrapperModel, ImplicitItemKNNWrapperModel, SASRecModel

K = 100


def main() -> None:
    src, name, seconds, out = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4]
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(2)
    seed_everything(0)
    histories = [line.split()[1:] for line in open(src)]
    model = model_of(name, seconds)
    started = time.perf_counter()
    learnt = Dataset.construct(frame_of(histories, leave=2))
    model.fit(learnt)
    print(f"trained for {time.perf_counter() - started:.0f} s", file=sys.stderr)
    # Asked after the last but one event, too; under the ids that the model has learnt, which do not know items first seen there.
    asked = frame_of(histories, leave=1)
    asked = asked[asked[Columns.Item].isin(learnt.item_id_map.external_ids)]
    known = Dataset(learnt.user_id_map, learnt.item_id_map, Interactions.from_raw(asked, learnt.user_id_map, learnt.item_id_map))
    users = np.arange(len(histories))
    found = model.recommend(users=users, dataset=known, k=K, filter_viewed=True, on_unsupported_targets="ignore")
    targets = found[Columns.User].map(dict(enumerate(history[-1] for history in histories)))
    hits = found[found[Columns.Item] == targets]
    ranks = np.zeros(len(histories), np.int64)
    ranks[hits[Columns.User].to_numpy()] = hits[Columns.Rank].to_numpy()
    np.save(out, ranks)


def frame_of(histories: list[list[str]], leave: int) -> pd.DataFrame:
    """All but the last `leave` events of each user; the order in place of time."""
    rows = [(user, item, place) for user, items in enumerate(histories) for place, item in enumerate(items[:-leave])]
    frame = pd.DataFrame(rows, columns=[Columns.User, Columns.Item, "place"])
    frame[Columns.Weight] = 1.0
    frame[Columns.Datetime] = pd.Timestamp("2020-01-01") + pd.to_timedelta(frame.pop("place"), unit="D")
    return frame


def model_of(name: str, seconds: float):
    def trainer() -> Trainer:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        return Trainer(max_epochs=1000, max_time=timedelta(seconds=seconds), accelerator="cpu", **quiet)

    if name == "sasrec":
        return SASRecModel(get_trainer_func=trainer)
    if name == "bert4rec":
        return BERT4RecModel(get_trainer_func=trainer)
    if name == "als":
        return ImplicitALSWrapperModel(AlternatingLeastSquares(num_threads=2, random_state=0))
    return ImplicitItemKNNWrapperModel(TFIDFRecommender(K=K))


if __name__ == "__main__":
    main()
