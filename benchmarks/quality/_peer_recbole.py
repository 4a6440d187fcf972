"""RecBole's SASRec for `peers.py`, in an environment of its own; arguments and result as for `_peer_rectools.py`.

Settings are the library's defaults with the cross-entropy loss, which is what its authors publish with.
"""

import os
import sys
import time

import numpy as np
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec
from recbole.utils import init_seed


def main() -> None:
    src, _, seconds, out = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(2)
    os.makedirs("data/peer", exist_ok=True)
    histories = [line.split()[1:] for line in open(src)]
    with open("data/peer/peer.inter", "w") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for user, items in enumerate(histories):
            file.writelines(f"{user}\t{item}\t{place}\n" for place, item in enumerate(items))
    settings = {
        "data_path": "data",
        "field_separator": "\t",
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "loss_type": "CE",
        "train_neg_sample_args": None,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
        "use_gpu": False,
        "gpu_id": "",
        "show_progress": False,
        "state": "ERROR",
    }
    sys.argv = sys.argv[:1]  # RecBole reads it
    config = Config(model="SASRec", dataset="peer", config_dict=settings)
    init_seed(0, True)
    dataset = create_dataset(config)
    train, _, test = data_preparation(config, dataset)
    model = SASRec(config, train.dataset)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["learning_rate"])
    deadline = time.perf_counter() + seconds
    model.train()
    while time.perf_counter() < deadline:
        for interaction in train:
            optimizer.zero_grad()
            model.calculate_loss(interaction).backward()
            optimizer.step()
            if time.perf_counter() >= deadline:
                break
    model.eval()
    ranks = np.zeros(len(histories), np.int64)
    with torch.no_grad():
        for interaction, *_ in test:
            scores = model.full_sort_predict(interaction).view(len(interaction), -1)
            scores.scatter_(1, interaction["item_id_list"], float("-inf"))  # what the user has had; 0 pads
            target = scores.gather(1, interaction["item_id"][:, None])
            users = dataset.id2token("user_id", interaction["user_id"].numpy()).astype(np.int64)
            ranks[users] = 1 + (scores > target).sum(dim=1).numpy()
    np.save(out, ranks)


if __name__ == "__main__":
    main()
