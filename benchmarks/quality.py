"""Quality of the whole pipeline on a sequence data set: import, prepare, train, evaluate; one seed after the other.

    raysys bench quality --src Beauty.txt --config configs/amazon-5core.yaml --seeds 0 1 2 --dir runs/beauty

Leave-one-out, masked, all items ranked. Settings were chosen on validation; the test part is read once a seed, here.
"""

import argparse
import time

import numpy as np

from raysys import cluster, storage
from raysys.adapters import import_dataset
from raysys.evaluate.run import evaluate
from raysys.prepare.run import prepare
from raysys.train.config import load_train_config
from raysys.train.run import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src", required=True, help="one-line-a-user sequence file")
    parser.add_argument("--config", default=None, help="train settings; the defaults when absent")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--dir", required=True)
    parser.add_argument("--fit", choices=["train", "train+valid"], default="train")
    arguments = parser.parse_args()
    folder = storage.resolve(arguments.dir)[1]
    import_dataset("sequences", storage.resolve(arguments.src)[1], f"{folder}/data")
    settings, given = load_train_config(arguments.config, [])
    rows = []
    for seed in arguments.seeds:
        started = time.monotonic()
        with cluster.connected():
            prepare(f"{folder}/data", f"{folder}/prepared", split="leave-one-out")
            bundle = f"{folder}/bundle-{seed}"
            train(f"{folder}/prepared", bundle, settings, given=given, seed=seed, fit=arguments.fit)
        minutes = (time.monotonic() - started) / 60
        metrics = evaluate(f"{folder}/prepared", bundle, split="test", seed=seed)
        storage.write_json(f"{folder}/metrics-{seed}.json", metrics)
        rows.append((seed, metrics, minutes, (time.monotonic() - started) / 60))
    print(f"\n{'seed':<6}{'stage':<18}{'ndcg@10':>9}{'recall@10':>11}   minutes (prepare + train, all)")
    for seed, metrics, minutes, whole in rows:
        for stage in ("final", "retrieval"):
            low, high = metrics[stage]["ndcg@10_interval"]
            print(
                f"{seed:<6}{stage:<18}{metrics[stage]['ndcg@10']:>9.4f}{metrics[stage]['recall@10']:>11.4f}"
                f"   {minutes:.1f}, {whole:.1f}; ndcg 95% interval {low:.4f} to {high:.4f}"
            )
        for name, source in metrics["sources"].items():
            print(f"{'':<6}{name:<18}{source['ndcg@10']:>9.4f}{source['recall@10']:>11.4f}   weight {source['fusion_weight']:.3f}")
        unmasked = metrics["unmasked"]["final"]
        print(f"{'':<6}{'final, unmasked':<18}{unmasked['ndcg@10']:>9.4f}{unmasked['recall@10']:>11.4f}")
    final = np.array([[metrics["final"]["ndcg@10"], metrics["final"]["recall@10"]] for _, metrics, _, _ in rows])
    print(f"{'mean':<6}{'final':<18}{final[:, 0].mean():>9.4f}{final[:, 1].mean():>11.4f}   over {len(rows)} seeds")


if __name__ == "__main__":
    main()
