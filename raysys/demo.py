"""The whole road on MovieLens-100k: raw events to an HTTP answer that changes after feedback."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from raysys import cluster, storage
from raysys.errors import ConfigError, RaysysError

RECBOLE = "recbole==1.2.1"
"""This wheel carries MovieLens-100k; it is unpacked without its dependencies and never imported."""
GROUPLENS_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
USER = "222"
"""A user with a long and varied history; any user id of the data would do."""

Rows = list[tuple[str, str]]


def run_demo(data: str | None, folder: str, *, port: int = 8000, keep_serving: bool = False) -> Rows:
    """Run every stage, printing what a newcomer should see.

    Args:
        data: folder with MovieLens-100k, or None to fetch it.
        folder: where everything is written.
        port: HTTP port of the service.
        keep_serving: leave the service up until Ctrl-C.

    Returns:
        The closing table.

    Raises:
        ConfigError: the data cannot be had.
    """
    # Stages import torch and Ray; a wrong --data should be refused before that.
    source = data if data is not None else fetch_movielens(Path(folder) / "download")
    from raysys.adapters import import_dataset
    from raysys.evaluate.run import evaluate
    from raysys.prepare.run import prepare
    from raysys.registry import Registry
    from raysys.serve.launch import running_service
    from raysys.train.config import demo_config
    from raysys.train.run import train

    started = time.monotonic()
    at = {name: f"{folder}/{name}" for name in ("data", "prepared", "bundle", "registry", "events", "state")}
    step(1, "import", f"{source} -> {at['data']}")
    kind = "recbole" if any(Path(source).glob("*.inter")) else "movielens"
    summary = import_dataset(kind, str(source), at["data"])
    print(f"      {summary}")
    with cluster.connected():
        step(2, "prepare", "validate, deduplicate, hold out each user's last two films")
        prepare(at["data"], at["prepared"], split="leave-one-out")
        step(3, "train", "transformer over histories, co-visitation, content, popularity; then the ranker")
        settings, given = demo_config()
        train(at["prepared"], at["bundle"], settings, given=given, seed=0)
    step(4, "evaluate", "every user's last film against all films")
    metrics = evaluate(at["prepared"], at["bundle"], split="test", bootstrap=200)
    storage.write_json(f"{folder}/metrics.json", metrics)
    from raysys.evaluate.report import write_report

    write_report(metrics, f"{folder}/report.html")
    step(5, "publish", at["registry"])
    pointer = Registry(at["registry"]).publish(at["bundle"], unpin=True)
    print(f"      current version {pointer.version}")
    step(6, "serve", f"http://127.0.0.1:{port}")
    # State of an earlier demo run would have this run's feedback already in it.
    for name in ("events", "state"):
        storage.remove(at[name])
    with running_service(registry=at["registry"], events=at["events"], state=at["state"], port=port) as base_url:
        print(f"      ready after {time.monotonic() - started:.0f} s in all; API at {base_url}/docs")
        converse(base_url, at["prepared"])
        if keep_serving:
            print(f"\nserving at {base_url}; Ctrl-C stops it")
            wait_for_interrupt()
    return closing_table(metrics, folder, time.monotonic() - started)


def step(number: int, name: str, text: str) -> None:
    """A heading of the walk."""
    print(f"\n[{number}/6] {name}: {text}", flush=True)


def fetch_movielens(folder: Path) -> Path:
    """MovieLens-100k from the RecBole wheel, else from GroupLens; kept in `folder`.

    Raises:
        ConfigError: neither source can be reached.
    """
    unpacked = folder / "recbole" / "dataset_example" / "ml-100k"
    grouplens = folder / "ml-100k"
    for ready in (unpacked, grouplens):
        if any(ready.glob("*.inter")) or (ready / "u.data").exists():
            return ready
    print(f"getting MovieLens-100k (from the {RECBOLE} wheel)", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    result = subprocess.run([*command, "--target", str(folder), RECBOLE], capture_output=True, text=True, check=False)
    if result.returncode == 0 and any(unpacked.glob("*.inter")):
        return unpacked
    try:
        import io
        import zipfile

        with urllib.request.urlopen(GROUPLENS_URL, timeout=60) as response:
            zipfile.ZipFile(io.BytesIO(response.read())).extractall(folder)
    except OSError as error:
        raise ConfigError(
            f"cannot get MovieLens-100k: pip said {result.stderr.strip()[-200:]!r}, {GROUPLENS_URL} said {error}; "
            "download it yourself and run `make demo DATA=path/to/ml-100k`"
        ) from None
    return grouplens


def converse(base_url: str, prepared_uri: str) -> None:
    """Ask for one user, send feedback, ask again, and show what changed."""
    first = post(base_url, "/v1/recommend", {"user_id": USER, "n": 10, "explain": True, "return_metadata": True})
    print(f"\n      what user {USER} saw last:")
    for title in recent_titles(prepared_uri, USER):
        print(f"        {title}")
    print(f"\n      recommended ({first['strategy']}, version {first['model_version']}):")
    print_answer(first)
    liked = first["items"][2]
    before = {item["item_id"]: item["rank"] for item in first["items"]}
    print(f"\n      feedback: user {USER} watches {title_of(liked)!r} and rates it 5")
    event = {"user_id": USER, "item_id": liked["item_id"], "event": "rating", "value": 5}
    receipt = post(base_url, "/v1/events", {"events": [{**event, "recommendation_id": first["recommendation_id"]}]})
    print(f"      accepted: {receipt['accepted']}")
    second = post(base_url, "/v1/recommend", {"user_id": USER, "n": 10, "explain": True, "return_metadata": True})
    print("\n      the next answer:")
    print_answer(second, before)


def recent_titles(prepared_uri: str, user_id: str, count: int = 5) -> list[str]:
    """Titles of a user's last films before the test part, newest first."""
    from raysys.prepare.dataset import Prepared

    prepared = Prepared.open(prepared_uri)
    titles = prepared.items()["title"].to_pylist()
    user_idx = prepared.users()["user_id"].to_pylist().index(user_id)
    sequences = prepared.sequences().upto("valid")
    row = list(sequences.user_idx).index(user_idx)
    history = sequences.items[sequences.indptr[row] : sequences.indptr[row + 1]]
    return [titles[item] for item in history[::-1][:count]]


def print_answer(answer: dict, before: dict[str, int] | None = None) -> None:
    """One line an item; with `before`, how each moved."""
    for item in answer["items"]:
        chance = "     " if item["probability"] is None else f"{item['probability']:.2f} "
        moved = ""
        if before is not None:
            old = before.get(item["item_id"])
            moved = "new " if old is None else f"{old - item['rank']:+d}  " if old != item["rank"] else "=   "
        reason = "; ".join(reason["text"] for reason in item.get("reasons") or [])
        print(f"        {item['rank']:>2} {moved}p={chance} {title_of(item):<45.45} {reason}")


def title_of(item: dict) -> str:
    """Title of an answered item, its id where it has none."""
    return (item.get("metadata") or {}).get("title") or item["item_id"]


def post(base_url: str, path: str, body: dict) -> dict:
    """POST JSON, get JSON.

    Raises:
        RaysysError: with the service's own message.
    """
    data = json.dumps(body).encode()
    request = urllib.request.Request(base_url + path, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        raise RaysysError(f"POST {path}: HTTP {error.code}: {error.read().decode()[:300]}") from None


def closing_table(metrics: dict, folder: str, seconds: float) -> Rows:
    """Metrics beside the two baselines, and how to go on."""
    rows: Rows = [("", f"{'ndcg@10':>8} {'recall@10':>10}")]
    named = {
        "popularity (baseline)": metrics["sources"].get("popularity"),
        "item-kNN (baseline)": metrics["sources"].get("covisit"),
        "retrieval, fused": metrics["retrieval"],
        "final, ranked": metrics["final"],
    }
    rows += [(name, f"{m['ndcg@10']:8.4f} {m['recall@10']:10.4f}") for name, m in named.items() if m]
    ranker = metrics.get("ranker") or {}
    if ranker.get("auc") is not None:
        rows.append(("ranker", f"AUC {ranker['auc']:.3f}, calibration error {ranker['ece']:.3f} (label: {ranker['label']})"))
    print()
    return [
        *rows,
        ("time", f"{seconds:.0f} s"),
        ("report", f"{folder}/report.html"),
        ("serve it", f"raysys serve --registry {folder}/registry"),
        ("your own data", "docs/your-data.md"),
    ]


def wait_for_interrupt() -> None:
    """Sleep until Ctrl-C."""
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        pass
