"""The gain of the learner without HTTP: the end of a data set, a block at a time, through the pipeline and the real learner.

    raysys bench realtime/offline --data DATA --out runs/offline [--share 0.2] [--events 0] [--flip 0.5] [--set lr=2e-3 ...]

Both arms answer the same questions from the same live histories: one keeps the first version, the other's learner
(`raysys.online.learner`, on a log and a registry of its own) has a round after every block. Minutes instead of the hours that
`realtime/replay` takes, because a block is one batch. What it leaves out: items that no version has a row for yet are not
inserted by content, so they are misses in both arms.

Settings are chosen with `--share 0.4 --events 20000` (a first model of 60% of the events, judged on the next 20%); the last 20%,
which `--share 0.2` replays, are for reporting.
"""

import argparse
import time
from dataclasses import fields, replace

import numpy as np

from raysys import config as settings_of
from raysys import storage
from raysys.bundle import Bundle
from raysys.events.embedded_log import EmbeddedLog
from raysys.online.config import OnlineConfig
from raysys.online.feed import flat_sequences
from raysys.online.learner import Learner
from raysys.online.simulate import K, SimulateConfig, first_model, flip_figures, flip_place, split
from raysys.pipeline import Pipeline, available_mask, seen_mask
from raysys.prepare.dataset import Sequences
from raysys.registry import Registry
from raysys.schema import UNKNOWN_ITEM

AT_ONCE = 250
"""Questions scored together."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a data folder, such as `raysys import recbole ML100K` writes")
    parser.add_argument("--out", default="runs/offline", help="folder of the first model and the JSON (default: runs/offline)")
    parser.add_argument("--share", type=float, default=0.2, help="last share of the events that the first model does not see")
    parser.add_argument("--events", type=int, default=0, help="events replayed at most; 0 for all of them")
    parser.add_argument("--block", type=int, default=500, help="events between rounds of the learner")
    parser.add_argument("--flip", type=float, default=0.0, help="place of a flip of tastes in the stream, as a share")
    parser.add_argument("--train-epochs", type=int, default=10)
    parser.add_argument("--name", default="offline", help="of the JSON")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="settings of the learner (OnlineConfig)")
    arguments = parser.parse_args()
    config = SimulateConfig(
        share=arguments.share,
        max_events=arguments.events,
        learn_every=arguments.block,
        flip=arguments.flip,
        window=arguments.block,
        train_epochs=arguments.train_epochs,
    )
    learning = settings_of.load(OnlineConfig, None, arguments.set)
    head, tail, items = split(arguments.data, config)
    # The flip changes only the stream, so the first model is the same with and without.
    bundle = first_model(head, items, storage.join(arguments.out, f"first-{arguments.share:g}-{arguments.train_epochs}"), config)
    started = time.perf_counter()
    flip = flip_place(arguments.data, tail, config)
    result = replayed(bundle, tail, items, storage.join(arguments.out, f"work-{arguments.name}"), config, learning, flip)
    result["seconds"] = time.perf_counter() - started
    result["settings"] = {field.name: getattr(learning, field.name) for field in fields(learning)}
    storage.write_json(storage.join(arguments.out, f"{arguments.name}.json"), result)
    for name, value in result["figures"].items():
        print(f"{name}: {'-' if value is None else f'{value:.4g}'}")


class Stream:
    """The replayed events as positions in the histories of their users, in rows of the catalogue as it grows.

    A new item's row is its place among all new ones in the order of their first events, which is the order in which the service is
    told of them and in which the learner gives rows.
    """

    def __init__(self, bundle: Bundle, tail: dict[str, list]):
        self.index = dict(bundle.item_index)
        for item in tail["item_id"]:
            self.index.setdefault(item, len(self.index))
        users = {user: row for row, user in enumerate(dict.fromkeys(tail["user_id"]))}
        known = [bundle.histories.lookup(user) for user in users]
        empty = (np.zeros(0, np.int32), np.zeros(0, np.int8), np.zeros(0, np.int64))
        before = [empty if found is None else found for found in known]
        lengths = np.array([len(found[0]) for found in before])
        codes = [bundle.event_codes.get(event, 0) for event in tail.get("event", ["view"] * len(tail["item_id"]))]
        rows = np.concatenate([np.repeat(np.arange(len(users)), lengths), [users[user] for user in tail["user_id"]]])
        columns = [np.concatenate([found[place] for found in before]) for place in range(3)]
        items = np.concatenate([columns[0], [self.index[item] for item in tail["item_id"]]])
        events = np.concatenate([columns[1], codes])
        times = np.concatenate([columns[2], np.array(tail["timestamp"], np.int64)])
        order = np.argsort(rows, kind="stable")
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        self.positions = place[lengths.sum() :]
        indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(users)))]).astype(np.int64)
        self.sequences = flat_sequences(items[order], events[order], times[order], indptr)

    def known_to(self, num_items: int) -> Sequences:
        """The histories as a version with so many items sees them."""
        items = np.where(self.sequences.items < num_items, self.sequences.items, UNKNOWN_ITEM)
        return replace(self.sequences, items=items.astype(np.int32))


def hits_of(bundle: Bundle, stream: Stream, block: slice) -> np.ndarray:
    """(E,) bool, whether the item of each event is among the ten that a version answers just before it."""
    pipeline, sequences, positions = Pipeline(bundle), stream.known_to(bundle.items.num_rows), stream.positions[block]
    found = []
    for first in range(0, len(positions), AT_ONCE):
        batch = positions[first : first + AT_ONCE]
        queries = sequences.queries_before(batch)
        allowed = seen_mask(queries, pipeline.num_items) & available_mask(bundle)
        answers, _, _ = pipeline.recommend(queries, K, allowed=allowed)
        found.append((answers == stream.sequences.items[batch][:, None]).any(axis=1))
    return np.concatenate(found)


def replayed(
    bundle_uri: str,
    tail: dict[str, list],
    items: dict[str, dict],
    folder: str,
    config: SimulateConfig,
    learning: OnlineConfig,
    flip: int | None,
) -> dict:
    """Hits of both arms by event, what each round did, and the figures."""
    for name in ("registry", "events"):
        storage.remove(storage.join(folder, name))
    registry, log = Registry(storage.join(folder, "registry")), EmbeddedLog(storage.join(folder, "events"), writable=True)
    registry.publish(bundle_uri)
    first = bundle = Bundle.open(bundle_uri)
    learner, stream = Learner(registry.uri, log.folder, learning), Stream(first, tail)
    hits: dict[str, list[np.ndarray]] = {"off": [], "on": []}
    rounds, told = [], set(first.item_ids)
    for start in range(0, len(stream.positions), config.learn_every):
        block = slice(start, min(start + config.learn_every, len(stream.positions)))
        hits["off"].append(hits_of(first, stream, block))
        hits["on"].append(hits[("off" if bundle is first else "on")][-1] if bundle is first else hits_of(bundle, stream, block))
        records = []
        for at in range(block.start, block.stop):
            item = tail["item_id"][at]
            if item not in told:
                told.add(item)
                records.append({"kind": "item", "item_id": item, "attributes": items.get(item, {}), "replace": True})
            event = {"kind": "event", "user_id": tail["user_id"][at], "item_id": item, "timestamp": float(tail["timestamp"][at])}
            records.append(event | {name: tail[name][at] for name in ("event", "value") if name in tail})
        log.append(records)
        began = time.perf_counter()
        report = learner.round()
        if report["status"] == "published":
            bundle = Bundle.open(registry.bundle_uri(report["version"]))
            assert all(stream.index[item] == row for item, row in bundle.item_index.items())
        rates = {arm: float(found[-1].mean()) for arm, found in hits.items()}
        line = {"at": block.stop, "status": report["status"], "reason": report.get("reason"), "s": time.perf_counter() - began, **rates}
        rounds.append({**line, "figures": report.get("figures")})
        sofar = {arm: float(np.concatenate(found).mean()) for arm, found in hits.items()}
        print(f"{block.stop:6d}  off {rates['off']:.3f} ({sofar['off']:.4f})  on {rates['on']:.3f} ({sofar['on']:.4f})  "
              f"{report['status']} {line['s']:.1f} s {report.get('reason', '')}", flush=True)  # fmt: skip
    arms = {arm: np.concatenate(found) for arm, found in hits.items()}
    figures: dict[str, float | int | None] = {f"hit-rate@{K}, {arm}": float(found.mean()) for arm, found in arms.items()}
    figures["relative gain"] = float(arms["on"].mean() / arms["off"].mean() - 1)
    gain = arms["on"].astype(float) - arms["off"]
    figures["standard error of the difference"] = float(gain.std() / np.sqrt(len(gain)))
    if flip is not None:
        for arm, found in arms.items():
            figures |= {f"{name}, {arm}": value for name, value in flip_figures(found.astype(float), flip, config.window).items()}
    return {"figures": figures, "rounds": rounds, "hits": {arm: found.astype(int).tolist() for arm, found in arms.items()}}


if __name__ == "__main__":
    main()
