"""Replay the end of a data set through the HTTP service: ask, compare with what the user did next, send the event.

Two arms, one after the other, each a service of its own on an empty log and
state: `off`, with live history, state and item upserts; `on`, the same and the
learner. The learner's round runs after every `learn_every` events and the
replay waits until the service answers with the new version, so that the result
does not depend on how fast the machine is. Items that the service does not know
are upserted when somebody first chooses them, with their attributes.
"""

import http.client
import json
import random
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import polars as pl

from raysys import cluster, storage
from raysys.errors import ConfigError, RaysysError, SchemaError
from raysys.online.config import OnlineConfig
from raysys.online.learner import Learner
from raysys.registry import Registry

K = 10
SWAP_TIMEOUT_S = 60.0
PROBE_EVERY = 20
"""Every so many events the user is asked for again at once, to see whether the answer has changed."""
WITHIN = 2000
"""Events after a flip of tastes at which it is asked what has been won back."""
RECOVERED = 0.9
"""Share of the lost hit rate that counts as recovered."""


@dataclass(frozen=True)
class SimulateConfig:
    """What is replayed, and how."""

    share: float = 0.2
    """Last share of the events, by time; what comes before trains the first model."""
    max_events: int = 0
    """Events replayed at most; 0 replays all."""
    learn_every: int = 500
    """Events between rounds of the learner."""
    window: int = 1000
    """Events of a moving hit rate in plot and recovery."""
    flip: float = 0.0
    """Place in the stream, as a share, from which every item stands for another one (a fixed permutation); 0 for none.
    A flip that the data themselves have (`raysys import synthetic --flip`) is found in their truth.json."""
    arms: tuple[str, ...] = ("off", "on")
    """Which arms run."""
    port: int = 8077
    """HTTP port of a service that is started here."""
    learner: OnlineConfig = field(default_factory=OnlineConfig)
    """Of the arm that learns."""
    train_epochs: int = 10
    """Epochs of the first model's encoder at most."""
    seed: int = 0
    """Of training and of the permutation."""

    def __post_init__(self) -> None:
        for name in ("share", "flip"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected a share in [0, 1), got {getattr(self, name)}")
        if self.learn_every < 1 or self.window < 1:
            raise ConfigError(f"learn_every and window: expected at least 1, got {self.learn_every} and {self.window}")
        if not self.arms or set(self.arms) - {"off", "on"}:
            raise ConfigError(f"arms: expected off and/or on, got {', '.join(self.arms) or 'none'}")


class Client:
    """One kept connection to the service."""

    def __init__(self, url: str):
        self.host = urllib.parse.urlsplit(url).netloc
        self._connection = http.client.HTTPConnection(self.host, timeout=60)

    def call(self, method: str, path: str, body: dict | None = None) -> tuple[int, dict]:
        """Status and parsed answer."""
        data = None if body is None else json.dumps(body)
        try:
            self._connection.request(method, path, data, {"Content-Type": "application/json"})
            answer = self._connection.getresponse()
        except (http.client.HTTPException, ConnectionError):  # the server may close an idle connection at any time
            self._connection.close()
            self._connection.request(method, path, data, {"Content-Type": "application/json"})
            answer = self._connection.getresponse()
        return answer.status, json.loads(answer.read())

    def post(self, path: str, body: dict) -> dict:
        """POST that must succeed.

        Raises:
            RaysysError: with the service's own message.
        """
        status, answer = self.call("POST", path, body)
        if status != 200:
            raise RaysysError(f"POST {path}: HTTP {status}: {json.dumps(answer)[:300]}")
        return answer


def simulate(data: str, out: str, config: SimulateConfig, *, url: str | None = None, model: str | None = None) -> dict:
    """Replay a data set's end.

    Args:
        data: folder of the data contract.
        out: folder of `replay.json` and `replay.png`.
        config: settings.
        url: a running service; one arm, named `service`, and whether a learner runs is its owner's affair.
        model: a bundle to start from; trained on the start of the data when None. Not with `url`.

    Returns:
        What `replay.json` holds: settings, per arm its hits and rounds, and the figures of `compared`.

    Raises:
        SchemaError: the data cannot be split.
        RaysysError: the service refused what it was told.
    """
    head, tail, items = split(data, config)
    if url is not None:
        arms = {"service": replay(url, tail, items, lambda: None, config)}
    else:
        bundle = model or first_model(head, items, out, config)
        arms = {}
        for arm in config.arms:
            arms[arm] = run_arm(arm, bundle, tail, items, storage.join(out, arm), config)
            storage.write_json(storage.join(out, f"{arm}.json"), arms[arm])  # an hour of replay must not be lost with the next arm
    result = {
        "settings": asdict(config),
        "events": len(tail["item_id"]),
        "trained_on": len(head),
        "arms": arms,
        "flip": flip_place(data, tail, config),
        "figures": compared(arms, tail, set(head["user_id"]), flip_place(data, tail, config), config.window),
    }
    storage.write_json(storage.join(out, "replay.json"), result)
    plot(result, storage.join(out, "replay.png"))
    return result


def split(data: str, config: SimulateConfig) -> tuple[pl.DataFrame, dict[str, list], dict[str, dict[str, Any]]]:
    """(head, columns of the tail, attributes by item id); by time, the order of the file where times are equal."""
    path = storage.join(data, "interactions.parquet")
    frame = pl.from_arrow(storage.read_table(path if storage.exists(path) else storage.join(data, "interactions")))
    assert isinstance(frame, pl.DataFrame)
    frame = frame.sort("timestamp", maintain_order=True).with_columns(pl.col("user_id", "item_id").cast(pl.String))
    cut = int(len(frame) * (1 - config.share))
    head, rest = frame[:cut], frame[cut:]
    rest = rest[: config.max_events] if config.max_events else rest
    if not len(head) or not len(rest):
        raise SchemaError(f"{data}: expected events before and after the cut at {1 - config.share:.0%}, found {len(frame)} in all")
    tail = {name: rest[name].to_list() for name in rest.columns}
    if config.flip:
        names = sorted(set(frame["item_id"]))
        roles = names.copy()
        random.Random(config.seed).shuffle(roles)
        other = dict(zip(names, roles, strict=True))
        start = int(config.flip * len(rest))
        tail["item_id"] = [item if at < start else other[item] for at, item in enumerate(tail["item_id"])]
    items: dict[str, dict[str, Any]] = {}
    table = storage.join(data, "items.parquet")
    if storage.exists(table):
        for row in storage.read_table(table).to_pylist():
            items[str(row["item_id"])] = {name: value for name, value in row.items() if name != "item_id" and _tellable(value)}
    return head, tail, items


def flip_place(data: str, tail: dict[str, list], config: SimulateConfig) -> int | None:
    """Event of the stream at which tastes flip: the planted one, or that of the data themselves; None where there is none."""
    if config.flip:
        return int(config.flip * len(tail["item_id"]))
    truth = storage.join(data, "truth.json")
    time = storage.read_json(truth).get("flip_time") if storage.exists(truth) else None
    if time is None:
        return None
    place = int(np.searchsorted(np.array(tail["timestamp"], np.float64), time))
    return place if 0 < place < len(tail["timestamp"]) else None


def _tellable(value: Any) -> bool:
    """Whether the service takes such an attribute."""
    return isinstance(value, (str, int, float, bool)) or (
        isinstance(value, list) and all(isinstance(one, (str, int, float)) for one in value)
    )


def first_model(head: pl.DataFrame, items: dict[str, dict[str, Any]], out: str, config: SimulateConfig) -> str:
    """Train a bundle on the start of the data, with only the items that occur in it; an earlier one in `out` is used again."""
    import dataclasses

    from raysys.prepare.config import PrepareConfig
    from raysys.prepare.run import prepare
    from raysys.train.config import demo_config
    from raysys.train.run import train

    data, prepared, bundle = (storage.join(out, name) for name in ("data", "prepared", "bundle"))
    if storage.exists(storage.join(bundle, "manifest.json")):
        return bundle
    storage.write_table(storage.join(data, "interactions.parquet"), head.to_arrow())
    known = sorted(set(head["item_id"]))
    table = pl.DataFrame([{"item_id": item, **items.get(item, {})} for item in known], infer_schema_length=None)
    storage.write_table(storage.join(data, "items.parquet"), table.to_arrow())
    settings, given = demo_config()
    settings = dataclasses.replace(settings, encoder=dataclasses.replace(settings.encoder, epochs=config.train_epochs))
    with cluster.connected():
        # Test events would be missing in the histories that serving starts from, so there are next to none.
        prepare(data, prepared, split="time", config=PrepareConfig(test_fraction=1e-4), progress=False)
        train(prepared, bundle, settings, given=given, fit="train+valid", seed=config.seed)
    return bundle


def run_arm(arm: str, bundle: str, tail: dict[str, list], items: dict[str, dict], folder: str, config: SimulateConfig) -> dict:
    """One replay on a service of its own."""
    from raysys.serve.launch import running_service

    places = {name: storage.join(folder, name) for name in ("registry", "events", "state")}
    for place in places.values():
        storage.remove(place)
    registry = Registry(places["registry"])
    registry.publish(bundle)
    learner = Learner(places["registry"], places["events"], config.learner) if arm == "on" else None
    with running_service(registry=places["registry"], events=places["events"], state=places["state"], port=config.port) as url:
        return replay(url, tail, items, (lambda: None) if learner is None else learner.round, config)


def replay(url: str, tail: dict[str, list], items: dict[str, dict], learn: Callable[[], dict | None], config: SimulateConfig) -> dict:
    """Send the events one by one, asking before each.

    Returns:
        `hits`: 0 or 1 an event; `rounds`: what the learner did, at which event, and the seconds from the oldest event of the
        round to the new version in an answer; `upserts`: event number of each item upsert; `visible`: of some events, milliseconds
        from their acknowledgement to an answer, and whether it was another one than before; `seconds`.
    """
    client, started = Client(url), time.perf_counter()
    known: set[str] = set()
    hits, rounds, upserts, visible = [], [], [], []
    versions: dict[str, int] = {}
    oldest = time.perf_counter()
    for at, (user, item) in enumerate(zip(tail["user_id"], tail["item_id"], strict=True)):
        if item not in known:
            known.add(item)
            if client.call("GET", f"/v1/items/{urllib.parse.quote(item, safe='')}")[0] == 404:
                client.post("/v1/items", {"items": [{"item_id": item, **items.get(item, {})}]})
                upserts.append(at)
        answer = client.post("/v1/recommend", {"user_id": user, "n": K})
        versions[answer["model_version"]] = versions.get(answer["model_version"], 0) + 1
        shown = [one["item_id"] for one in answer["items"]]
        hits.append(int(item in shown))
        event = {"user_id": user, "item_id": item, "timestamp": float(tail["timestamp"][at])}
        for name in ("event", "value"):
            if name in tail and tail[name][at] is not None:
                event[name] = tail[name][at]
        if client.post("/v1/events", {"events": [event]})["accepted"] != 1:
            raise RaysysError(f"event {at} was not accepted by {url}")
        if at % PROBE_EVERY == 0:
            begun = time.perf_counter()
            again = client.post("/v1/recommend", {"user_id": user, "n": K})
            changed = shown != [one["item_id"] for one in again["items"]]
            visible.append({"ms": round((time.perf_counter() - begun) * 1000, 2), "changed": changed})
        if (at + 1) % config.learn_every == 0:
            begun = time.perf_counter()
            report = learn()
            if report is not None:
                if report["status"] == "published":
                    _wait_for(client, report["version"])
                learnt = {"at": at + 1, "status": report["status"], "events": report.get("events"), "reason": report.get("reason")}
                now = time.perf_counter()
                rounds.append({**learnt, "round_s": now - begun, "oldest_event_s": now - oldest})
            oldest = time.perf_counter()
    told = {"rounds": rounds, "upserts": upserts, "visible": visible, "versions": versions}
    return {"hits": hits, **told, "seconds": time.perf_counter() - started}


def _wait_for(client: Client, version: str) -> None:
    """Until answers come from a version; every replica has swapped when several in a row do."""
    deadline = time.monotonic() + SWAP_TIMEOUT_S
    in_a_row = 0
    while in_a_row < 5:
        if time.monotonic() > deadline:
            raise RaysysError(f"the service does not answer with version {version} within {SWAP_TIMEOUT_S:.0f} s")
        found = client.post("/v1/recommend", {"n": 1})["model_version"]
        in_a_row = in_a_row + 1 if found == version else 0
        if found != version:
            time.sleep(0.1)


def compared(
    arms: dict[str, dict], tail: dict[str, list], trained_users: set[str], flip: int | None, window: int
) -> dict[str, float | int | None]:
    """Hit rates of the arms, also for users that appear on the way; the relative gain; the events until recovery from the flip."""
    figures: dict[str, float | int | None] = {}
    new = np.array([user not in trained_users for user in tail["user_id"]])
    figures["share of events by new users"] = float(new.mean())
    for arm, found in arms.items():
        hits = np.array(found["hits"])
        figures[f"hit-rate@{K}, {arm}"] = float(hits.mean())
        figures[f"hit-rate@{K}, {arm}, new users"] = float(hits[new].mean()) if new.any() else None
        if found["visible"]:
            figures[f"event answered -> next answer, p99 ms, {arm}"] = float(np.quantile([one["ms"] for one in found["visible"]], 0.99))
            figures[f"next answers that are others, {arm}"] = float(np.mean([one["changed"] for one in found["visible"]]))
        if flip is not None:
            figures |= {f"{name}, {arm}": value for name, value in flip_figures(hits, flip, window).items()}
    off, on = (figures.get(f"hit-rate@{K}, {arm}") for arm in ("off", "on"))
    if off and on is not None:
        figures["relative gain"] = on / off - 1
    return figures


def flip_figures(hits: np.ndarray, flip: int, window: int) -> dict[str, float | int | None]:
    """What a flip cost and how it was made good, of one arm.

    The share is that of the hit rate lost (between the `window` events before the flip and those after it) which the `window` events that
    begin WITHIN events after the flip have back: one place fixed beforehand, where `recovery` takes the first good window.
    """
    before, after, later = (hits[max(0, start) : start + window] for start in (flip - window, flip, flip + WITHIN))
    lost = float(before.mean() - after.mean())
    share = None if lost <= 0 or len(later) < window else float((later.mean() - after.mean()) / lost)
    return {
        "hit rate before the flip": float(before.mean()),
        "hit rate after the flip": float(after.mean()),
        f"lost hit rate won back after {WITHIN} events": share,
        "events to recovery": recovery(hits, flip, window),
    }


def recovery(hits: np.ndarray, flip: int, window: int) -> int | None:
    """Events after the flip until a window that starts there has won back 90% of what the first window after the flip lost.

    None when it never does, or when nothing was lost.
    """
    window = min(window, flip, (len(hits) - flip) // 2)
    if window < 1:
        return None
    before, after = hits[flip - window : flip].mean(), hits[flip : flip + window].mean()
    if after >= before:
        return None
    sums = np.concatenate([[0], np.cumsum(hits[flip:])])
    rates = (sums[window:] - sums[:-window]) / window
    good = np.flatnonzero(rates >= after + RECOVERED * (before - after))
    return int(good[0]) if len(good) else None


def plot(result: dict, path: str) -> None:
    """Moving hit rate of each arm, with the learner's versions as ticks."""
    import io

    from matplotlib.figure import Figure

    window = min(result["settings"]["window"], max(1, result["events"] // 2))
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for arm, found in result["arms"].items():
        sums = np.concatenate([[0], np.cumsum(found["hits"])])
        rates = (sums[window:] - sums[:-window]) / window
        axes.plot(np.arange(len(rates)) + window, rates, label=f"learner {arm}" if arm != "service" else arm)
        for one in found["rounds"]:
            if one["status"] == "published":
                axes.axvline(one["at"], color="#e4e8ec", linewidth=0.8, zorder=0)
    if result["flip"] is not None:
        axes.axvline(result["flip"], color="#c8871e", linestyle="--", label="taste flip")
    axes.set(xlabel="events replayed", ylabel=f"hit rate@{K}, last {window} events", ylim=(0, None))
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    storage.write_bytes(path, buffer.getvalue())


def summary_rows(result: dict) -> list[tuple[str, str]]:
    """The closing table of the command."""
    rows = [("events replayed", f"{result['events']:,}")]
    rows += [(name, "-" if value is None else f"{value:.4g}") for name, value in result["figures"].items()]
    for arm, found in result["arms"].items():
        published = sum(one["status"] == "published" for one in found["rounds"])
        rows.append(
            (
                arm,
                f"{found['seconds']:.0f} s, {len(found['upserts'])} items upserted, {published} of {len(found['rounds'])} rounds published",
            )
        )
    return rows
