"""The winner of a sweep against the settings it started from, as whole pipelines, target by target."""

import numpy as np

from raysys import config, storage
from raysys.bundle import Bundle
from raysys.errors import SchemaError
from raysys.evaluate import metrics
from raysys.evaluate.run import MAX_BATCH_SCORES, MAX_HISTORY, matched_sequences
from raysys.evaluate.stages import Stages
from raysys.pipeline import Pipeline
from raysys.prepare.dataset import Prepared
from raysys.train.config import TrainConfig, dotted_names
from raysys.train.run import train

CUT = 10
BATCH = 256


def compare(prepared_uri: str, out: str, *, default: TrainConfig, winner: TrainConfig, seed: int = 0) -> dict:
    """Train both, rank the same test targets with both, and resample users of the differences.

    Args:
        prepared_uri: a prepared set with a test part.
        out: the bundles go to OUT/default and OUT/winner; those that are there are used.
        default: settings the sweep started from.
        winner: settings it found.
        seed: of ties and of the bootstrap.

    Returns:
        NDCG@10 of both (`default`, `winner`), `difference` (winner minus default), `difference_interval` (95%, paired by target,
        users resampled), `users`, `targets`, `split`.

    Raises:
        SchemaError: the set has no test part.
    """
    prepared = Prepared.open(prepared_uri)
    if not prepared.manifest["counts"]["test"]:
        raise SchemaError(f"{prepared_uri}: expected a test part to compare on, found none; prepare with --split leave-one-out or time")
    gains, users = {}, np.zeros(0, np.int64)
    for name, settings in (("default", default), ("winner", winner)):
        bundle = storage.join(out, name)
        if not storage.exists(storage.join(bundle, "manifest.json")):
            print(f"      comparing: training {name}", flush=True)
            # Every name counts as given, so that nothing is filled in from the data again.
            given = frozenset(dotted_names(config.to_dict(settings)))
            train(prepared_uri, bundle, settings, given=given, quiet=True)
        gains[name], users = _gains(prepared, Bundle.open(bundle), seed)
    values = {**gains, "difference": gains["winner"] - gains["default"]}
    return {"split": "test", "targets": len(users), "users": len(np.unique(users)), **metrics.mean_with_intervals(values, users, seed=seed)}


def _gains(prepared: Prepared, bundle: Bundle, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(Q,) NDCG@10 of each test target in the final, masked ranking, and its user."""
    sequences = matched_sequences(prepared, bundle)
    positions = sequences.target_positions("test")
    stages = Stages(Pipeline(bundle), mask=True, list_k=CUT, seed=seed)
    size = max(1, min(BATCH, MAX_BATCH_SCORES // stages.pipeline.num_items))
    for first in range(0, len(positions), size):
        batch = positions[first : first + size]
        stages.add(sequences.queries_before(batch, max_events=MAX_HISTORY), sequences.items[batch])
    ranks = np.concatenate(stages.ranks["final"])
    return metrics.rank_metrics(ranks, [CUT])[f"ndcg@{CUT}"], sequences.rows[positions]
