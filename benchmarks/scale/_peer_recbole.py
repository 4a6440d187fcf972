"""RecBole's SASRec for `training.py`, in an environment of its own: seconds an epoch from the mean of some steps."""

import json
import os
import sys
import time

import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec
from recbole.utils import init_seed

WARM_UP = 5


def main() -> None:
    src, batch_size, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(2)
    os.makedirs("data/bench", exist_ok=True)
    with open("data/bench/bench.inter", "w") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for user, line in enumerate(open(src)):
            items = line.split()[1:]  # leave-one-out takes the last two away
            file.writelines(f"{user}\t{item}\t{position}\n" for position, item in enumerate(items) if len(items) > 3)
    settings = {
        "data_path": "data",
        "field_separator": "\t",
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "MAX_ITEM_LIST_LENGTH": 50,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_size": 64,
        "inner_size": 64,
        "hidden_dropout_prob": 0.5,
        "attn_dropout_prob": 0.5,
        "loss_type": "CE",
        "train_neg_sample_args": None,
        "train_batch_size": batch_size,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
        "use_gpu": False,
        "gpu_id": "",
        "show_progress": False,
        "state": "ERROR",
    }
    sys.argv = sys.argv[:1]  # RecBole reads it
    config = Config(model="SASRec", dataset="bench", config_dict=settings)
    init_seed(0, True)
    dataset = create_dataset(config)
    train, _, _ = data_preparation(config, dataset)
    model = SASRec(config, train.dataset)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    marks = []
    for interaction in train:
        optimizer.zero_grad()
        model.calculate_loss(interaction).backward()
        optimizer.step()
        marks.append(time.perf_counter())
        if len(marks) == WARM_UP + steps:
            break
    step_s = (marks[-1] - marks[WARM_UP - 1]) / (len(marks) - WARM_UP)
    print(json.dumps({"step_s": step_s, "epoch_s": step_s * len(train), "samples": len(train.dataset)}))


if __name__ == "__main__":
    main()
