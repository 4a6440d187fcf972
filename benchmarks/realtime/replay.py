"""The online loop on a real timeline: gain of learning, recovery from a flip of tastes, hot swaps under load, event to model.

    raysys import recbole ML100K --out DATA
    raysys bench realtime/replay --data DATA --out runs/realtime [--events 0] [--only replay|flip|permutation|swaps|age]

Leaves `replay.json` in the shape that benchmarks/scale/README.md describes, and the plots of the replays beside it. A bar is
judged only on the whole of the last 20% of the data (`--events 0`); a shorter run leaves `met` null. `flip` replays the end of a world
that it makes itself, in which another taste follows each taste from some moment on; `permutation` the data's, in which every item stands
for another one from the middle on, so that nothing learnt about any item is true any more. `age` sends events at a steady
pace while a learner runs as `raysys online` does, with its default interval, and times what they and new items change meanwhile.
Services run one after the other, on this machine, with the learner. With `--only` the file is `replay-PART.json`; one page of all:

    .venv/bin/python benchmarks/scale/report.py runs/realtime --hardware 2-cores --out benchmarks/realtime --title "Real time"
"""

import argparse
import http.client
import itertools
import json
import shutil
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from raysys import storage
from raysys.adapters import import_dataset
from raysys.bundle import Bundle
from raysys.errors import RaysysError
from raysys.online.config import OnlineConfig
from raysys.online.learner import INTERVAL_S, Learner
from raysys.online.simulate import Client, K, SimulateConfig, first_model, simulate, split
from raysys.registry import Registry
from raysys.serve.launch import running_service

REQUESTS, SWAPS, CLIENTS = 5000, 10, 4
WITHIN_EVENTS, WITHIN_S, GAIN = 2000, 60.0, 0.15
FLIPPED = {"users": 1000, "items": 2400, "events": 50_000, "seed": 0, "flip": 0.63}
"""World whose law over its 24 tastes flips within its last 20%, which are replayed."""
AGE_ROUNDS, AGE_PAUSE_S = 4, 0.05
"""Versions waited for, and the pause between events, where the age of what a new version has learnt is measured."""
CHANGED_EVERY, APPEARED_EVERY = 10, 100
"""Every so many events the user's next answer, and a new item's first one, are timed."""
VISIBLE_MS, APPEAR_S = 100.0, 5.0
SHOWN = 50
"""Items asked for when a new one is looked for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="MovieLens-100k as a data folder")
    parser.add_argument("--out", default="runs/realtime", help="folder of the JSON (default: runs/realtime)")
    parser.add_argument("--events", type=int, default=0, help="events replayed at most; 0 for all of the last 20%%")
    parser.add_argument("--learn-every", type=int, default=500)
    parser.add_argument("--window", type=int, default=500)
    parser.add_argument("--train-epochs", type=int, default=10)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--only", choices=["replay", "flip", "permutation", "swaps", "age"], default=None)
    arguments = parser.parse_args()
    config = SimulateConfig(
        max_events=arguments.events, learn_every=arguments.learn_every, window=arguments.window, train_epochs=arguments.train_epochs
    )
    work = storage.join(arguments.out, "replay")
    name = f"replay-{arguments.only}" if arguments.only else "replay"  # of the JSON, and of the picture of what it tells
    head, tail, items = split(arguments.data, config)

    def first() -> str:  # trained once, and not at all where a part needs none
        return first_model(head, items, work, config)

    whole = arguments.events == 0
    rows: list[dict] = []
    figures: dict[str, float | None] = {}
    bars: list[dict] = []
    if arguments.only in (None, "replay"):
        result = simulate(arguments.data, storage.join(work, "plain"), config, model=first())
        rows += rows_of("plain", result)
        figures |= result["figures"]
        bars.append(bar("replay, relative hit-rate@10 of learning", f">= {GAIN}", result["figures"].get("relative gain"), GAIN, whole))
        seconds = [one["oldest_event_s"] for one in result["arms"]["on"]["rounds"] if one["status"] == "published"]
        slowest = max(seconds, default=None)
        figures["longest round of the learner, s"] = max((one["round_s"] for one in result["arms"]["on"]["rounds"]), default=None)
        bars.append(
            bar("oldest event of a round -> answered by the new version, s", f"<= {WITHIN_S:.0f}", slowest, WITHIN_S, whole, most=True)
        )
        shown = result["figures"].get("event answered -> next answer, p99 ms, on")
        bars.append(bar("event answered -> changed recommendation, p99 ms", f"<= {VISIBLE_MS:.0f}", shown, VISIBLE_MS, whole, most=True))
        shutil.copy(Path(work) / "plain" / "replay.png", Path(arguments.out) / f"{name}.png")
    for part in ("flip", "permutation"):
        if arguments.only not in (None, part):
            continue
        if part == "flip":
            world = storage.join(work, "world")
            import_dataset("synthetic", None, world, **FLIPPED)
            result = simulate(world, storage.join(work, part), config)
        else:
            result = simulate(arguments.data, storage.join(work, part), replace(config, flip=0.5), model=first())
        rows += rows_of(part, result)
        figures |= {f"{part}: {name}": value for name, value in result["figures"].items()}
        took = result["figures"].get("events to recovery, on")
        bars.append(bar(f"events until 90% of what the {part} lost is back", f"<= {WITHIN_EVENTS}", took, WITHIN_EVENTS, whole, most=True))
        shutil.copy(Path(work) / part / "replay.png", Path(arguments.out) / f"replay-{part}.png")
    if arguments.only in (None, "swaps"):
        found = swaps(first(), tail, storage.join(work, "swaps"), arguments.requests)
        rows.append({"series": "hot swaps", **found})
        enough = found["requests"] >= REQUESTS and found["swaps"] >= SWAPS
        for kind in ("failures", "mixed"):
            bars.append(bar(f"{REQUESTS} requests across {SWAPS} hot swaps, {kind}", "0", found[kind], 0, enough, most=True))
    if arguments.only in (None, "age"):
        found_ages, age_figures, age_bars = age(first(), tail, items, storage.join(work, "age"))
        rows += found_ages
        figures |= age_figures
        bars += age_bars
    about = {"data": arguments.data, "events": str(arguments.events or "all"), "learn_every": str(arguments.learn_every)}
    storage.write_json(
        storage.join(arguments.out, f"{name}.json"), {"name": name, "rows": rows, "figures": figures, "bars": bars, "about": about}
    )
    for figure, value in figures.items():
        print(f"{figure}: {'-' if value is None else f'{value:.4g}'}")
    for one in bars:
        print(f"{ {True: 'met', False: 'missed', None: 'not judged'}[one['met']] }  {one['what']}: {one['measured']} ({one['bar']})")


def bar(what: str, wanted: str, measured: float | None, bound: float, judged: bool, *, most: bool = False) -> dict:
    """A promise; not judged where the run was too small, missed where there is no figure."""
    met = None if not judged else measured is not None and (measured <= bound if most else measured >= bound)
    return {"what": what, "bar": wanted, "measured": measured, "met": met}


def rows_of(name: str, result: dict) -> list[dict]:
    return [
        {
            "series": f"{name}, learner {arm}",
            "events": len(found["hits"]),
            "seconds": found["seconds"],
            "hits": sum(found["hits"]),
            "upserts": len(found["upserts"]),
            "published": sum(one["status"] == "published" for one in found["rounds"]),
        }
        for arm, found in result["arms"].items()
    ]


def swaps(bundle: str, tail: dict[str, list], folder: str, requests: int) -> dict:
    """Ask without a pause while versions change, some by learning (they differ in their items), and check every answer.

    An answer is mixed when its version was never published, or when it holds an item that this version has no row for
    though it is not a live one: each new item is upserted under a name that tells by which version it is first known.
    """
    places = {name: storage.join(folder, name) for name in ("registry", "events", "state")}
    for place in places.values():
        storage.remove(place)
    registry = Registry(places["registry"])
    registry.publish(bundle)
    rows_by_version: dict[str, set[str]] = {registry.current().version: set(Bundle.open(bundle, only=()).item_ids)}
    answers: list[tuple[str | None, list[dict]]] = []
    answered: set[str] = set()
    failures: Counter[str] = Counter()
    done, lock = threading.Event(), threading.Lock()

    def ask(url: str, first: int) -> None:
        client, at = Client(url), first
        while not done.is_set():
            try:
                status, answer = client.call("POST", "/v1/recommend", {"user_id": tail["user_id"][at % len(tail["user_id"])], "n": 10})
            except (OSError, http.client.HTTPException, json.JSONDecodeError):
                status, answer = 0, {}
            with lock:
                if status != 200 or answer.get("degraded"):
                    failures[f"HTTP {status} {answer.get('degraded_reason')}"] += 1
                else:
                    answers.append((answer["model_version"], answer["items"]))
                    answered.add(answer["model_version"])
                if len(answers) + failures.total() >= requests and len(answered) > SWAPS:
                    done.set()
            at += CLIENTS

    started = time.perf_counter()
    with running_service(**places, port=8077) as url:
        # What is learnt does not matter here, so rounds are as short as they can be and nothing is judged by a few events.
        learner = Learner(places["registry"], places["events"], OnlineConfig(epochs=0, margin=1.0, holdout_share=0.0, anchor_users=20))
        threads = [threading.Thread(target=ask, args=(url, n)) for n in range(CLIENTS)]
        for thread in threads:
            thread.start()
        teller = Client(url)
        at = 0
        try:
            while len(rows_by_version) <= SWAPS:
                item = f"swap-{len(rows_by_version)}"
                teller.post("/v1/items", {"items": [{"item_id": item, "title": f"A Film About Number {at}"}]})
                for _ in range(20):
                    teller.post(
                        "/v1/events", {"events": [{"user_id": tail["user_id"][at], "item_id": item, "event": "rating", "value": 5}]}
                    )
                    at = (at + 1) % len(tail["user_id"])
                report = learner.round()
                print(f"{time.perf_counter() - started:6.1f} s  {report['status']} {report.get('reason', '')}", flush=True)
                if report["status"] == "published":
                    known = Bundle.open(registry.bundle_uri(report["version"]), only=()).item_ids
                    rows_by_version[report["version"]] = set(known)
            for thread in threads:
                thread.join()
        finally:
            done.set()
    return {
        "requests": len(answers) + failures.total(),
        "swaps": len({version for version, _ in answers}) - 1,
        "failures": failures.total(),
        "why": ", ".join(f"{count} x {why}" for why, count in failures.items()) or "-",
        "mixed": sum(is_mixed(version, items, rows_by_version) for version, items in answers),
        "seconds": time.perf_counter() - started,
    }


def age(bundle: str, tail: dict[str, list], items: dict[str, dict], folder: str) -> tuple[list[dict], dict[str, float], list[dict]]:
    """How old what is answered from is, at a steady pace of events and with a learner as `raysys online` runs it.

    Returns:
        A row a version: seconds from the oldest event that it learnt to its publication and to the first answer of it. Figures, and the
        bars of those seconds, of an event's effect on the next answer, and of a new item's first appearance in one.
    """
    places = {name: storage.join(folder, name) for name in ("registry", "events", "state")}
    for place in places.values():
        storage.remove(place)
    Registry(places["registry"]).publish(bundle)
    learner, reports, done = Learner(places["registry"], places["events"], OnlineConfig()), [], threading.Event()

    def learn() -> None:
        while not done.wait(INTERVAL_S):
            report = learner.round()
            reports.append({**report, "ended": time.time()})
            print(f"{report['status']}: {report['events']} events, {report.get('seconds', 0)} s {report.get('reason', '')}", flush=True)

    answered: dict[str, float] = {}
    changed_ms: list[float] = []
    appeared_s: list[float] = []
    with running_service(**places, port=8077) as url:
        client, thread = Client(url), threading.Thread(target=learn)
        thread.start()
        try:
            for at in itertools.count():
                user, item = (tail[name][at % len(tail["user_id"])] for name in ("user_id", "item_id"))
                client.post("/v1/events", {"events": [{"user_id": user, "item_id": item, "event": "rating", "value": 5}]})
                answered.setdefault(client.post("/v1/recommend", {"user_id": user, "n": 1})["model_version"], time.time())
                if at % CHANGED_EVERY == 0:
                    changed_ms.append(until_changed_ms(client, user))
                if at % APPEARED_EVERY == 0:
                    appeared_s.append(until_recommended_s(client, f"age-{at}", item, items[item]))
                if sum(one.get("version") in answered for one in reports if one["status"] == "published") >= AGE_ROUNDS:
                    break
                if len(reports) > 3 * AGE_ROUNDS:
                    raise RaysysError(f"{AGE_ROUNDS} versions expected of {len(reports)} rounds, found {len(answered) - 1} in answers")
                time.sleep(AGE_PAUSE_S)
        finally:
            done.set()
            thread.join()
    rows = [
        {
            "series": "age of what is learnt",
            "new_events": one["events"],
            "round_s": one["seconds"],
            "oldest_event_to_published_s": one["oldest_event_s"],
            "oldest_event_to_answer_s": one["oldest_event_s"] + answered[one["version"]] - one["ended"],
        }
        for one in reports
        if one["status"] == "published" and one["version"] in answered
    ]
    changed, appeared = float(np.quantile(changed_ms, 0.99)), max(appeared_s)
    oldest = {name: max(one[f"oldest_event_to_{name}_s"] for one in rows) for name in ("published", "answer")}
    figures = {
        "event answered -> changed recommendation beside a learner, p50 ms": float(np.median(changed_ms)),
        "of events": len(changed_ms),
        "item upserted -> recommended, of items": len(appeared_s),
        "rounds refused": sum(one["status"] == "refused" for one in reports),
    }
    bound, each = f"<= {WITHIN_S:.0f}", f"interval {INTERVAL_S:.0f} s, s"
    return (
        rows,
        figures,
        [
            bar(f"oldest event learnt -> published, {each}", bound, oldest["published"], WITHIN_S, True, most=True),
            bar(
                f"oldest event learnt -> first answer of the version, {each}",
                bound,
                oldest["answer"],
                WITHIN_S,
                True,
                most=True,
            ),
            bar(
                "event answered -> changed recommendation beside a learner, p99 ms",
                f"<= {VISIBLE_MS:.0f}",
                changed,
                VISIBLE_MS,
                True,
                most=True,
            ),
            bar("item upserted -> recommended, slowest, s", f"<= {APPEAR_S:.0f}", appeared, APPEAR_S, True, most=True),
        ],
    )


def until_changed_ms(client: Client, user: str) -> float:
    """From the answer to an event on a user's first item to an answer without it."""
    best = client.post("/v1/recommend", {"user_id": user, "n": K})["items"][0]["item_id"]
    client.post("/v1/events", {"events": [{"user_id": user, "item_id": best, "event": "rating", "value": 5}]})
    started = time.perf_counter()
    while best in [one["item_id"] for one in client.post("/v1/recommend", {"user_id": user, "n": K})["items"]]:
        pass
    return (time.perf_counter() - started) * 1000


def until_recommended_s(client: Client, item: str, chosen: str, like: dict) -> float:
    """From the answer to an upsert to an answer that recommends the item, to somebody of whom only a choice with its attributes is known.

    A user with more of a past may have fifteen items that fit better. The item is deleted then, so that the next one does not compete
    with it.
    """
    client.post("/v1/items", {"items": [{"item_id": item, **like}]})
    started = time.perf_counter()
    while item not in [one["item_id"] for one in client.post("/v1/recommend", {"history": [chosen], "n": SHOWN})["items"]]:
        if time.perf_counter() - started > 6 * APPEAR_S:
            break  # a miss that counts as long as was waited
        time.sleep(0.02)
    passed = time.perf_counter() - started
    client.call("DELETE", f"/v1/items/{item}")
    return passed


def is_mixed(version: str | None, items: list[dict], rows_by_version: dict[str, set[str]]) -> bool:
    """Whether an answer names models for an item that its version does not have; live items name `new` or `content` alone."""
    if version not in rows_by_version or len({one["item_id"] for one in items}) != len(items):
        return True
    return any(one["item_id"] not in rows_by_version[version] and set(one["sources"]) - {"new", "content"} for one in items)


if __name__ == "__main__":
    main()
