"""The road on several nodes, with nothing shared but an S3 server: a node dies, and the result is what it is undisturbed.

Three Ray nodes, the head without CPUs for tasks, two with one CPU and one logical GPU. Every node has a home of its own,
so what one of them leaves in its cache another cannot find; the key of user hashes is given to all, as docs/serving.md says.
Data, prepared sets, checkpoints, bundles, lists and the registry are on S3 alone.
A killed node is replaced, as an autoscaler would do it.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from raysys import storage
from raysys.adapters import import_dataset
from raysys.batch.config import BatchConfig
from raysys.batch.run import PartWriter, part_table, run_batch
from raysys.batch.users import users_of_bundle
from raysys.bundle import Bundle
from raysys.evaluate.run import evaluate
from raysys.events.identity import user_key
from raysys.pipeline import recommend_user
from raysys.prepare.config import PrepareConfig
from raysys.prepare.dataset import Prepared
from raysys.prepare.run import prepare
from raysys.registry import Registry
from raysys.train.config import load_train_config
from raysys.train.run import train
from raysys.tune.run import tune
from tests import planted
from tests.service import apart_config, replica_pids
from tests.traffic import Traffic

SETTINGS = [
    "interest={dim: 16, num_layers: 1, max_length: 16, dropout: 0.1}",
    "encoder={epochs: 6, batch_size: 32, lr: 5e-3, warmup_steps: 5, validate_every: 1}",
    "ranker.epochs=1",
    "dot_product.steps=20",
    "refit_epochs=2",
    "num_candidates=30",
    "sources=[interest, covisit, popularity]",
]
TWO_NODES = ["scaling={workers: 2, use_gpu: true, cpus_per_worker: 1}"]
NOTICED = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
"""A dead node is known as dead after three seconds instead of Ray's fifteen; a slow one has ten seconds to answer, as ever."""
ROOT = Path(__file__).parents[2]


class Nodes:
    """A head and two workers; `kill_when` kills a worker node once something has happened, and brings another."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        self.cluster = Cluster(
            initialize_head=True,
            shutdown_at_exit=False,  # its signal handlers can be set in the main thread only, and a thread adds nodes; stop() cleans up
            head_node_args={"num_cpus": 0, "include_dashboard": False, "env_vars": self.home(), "_system_config": NOTICED},
        )
        ray.init(address=self.cluster.address, log_to_driver=False)
        self.workers = [self.add(), self.add()]

    def home(self) -> dict[str, str]:
        self.count += 1
        return {"RAYSYS_HOME": str(self.folder / f"node-{self.count}")}

    def add(self):
        return self.cluster.add_node(num_cpus=1, num_gpus=1, env_vars=self.home())

    def with_replica_of(self, name: str):
        """The worker node that holds a replica, by the home that its processes were given."""
        homes = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in replica_pids(name)]
        return next(
            node for node in self.workers if any(f"RAYSYS_HOME={node._ray_params.env_vars['RAYSYS_HOME']}".encode() in h for h in homes)
        )

    def kill_when(self, happened: Callable[[], bool], *, timeout_s: float = 120.0) -> "Killing":
        return Killing(self, happened, timeout_s)

    def stop(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


class Killing(threading.Thread):
    """As a context: the block must live through the death of a node, and the death must have taken place in it."""

    def __init__(self, nodes: Nodes, happened: Callable[[], bool], timeout_s: float):
        super().__init__(daemon=True)
        self.nodes, self.happened, self.deadline, self.killed_at = nodes, happened, time.monotonic() + timeout_s, 0.0

    def run(self) -> None:
        while time.monotonic() < self.deadline:
            if self.happened():
                self.nodes.cluster.remove_node(self.nodes.workers.pop(0), allow_graceful=False)
                killed_at = time.monotonic()
                self.nodes.workers.append(self.nodes.add())
                self.killed_at = killed_at
                return
            time.sleep(0.05)

    def __enter__(self) -> "Killing":
        self.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        ended = time.monotonic()
        if kind is None:
            self.join(timeout=30)
            assert 0 < self.killed_at < ended, "the work was over before a node died"


@pytest.fixture(scope="module")
def s3():
    """Options of a URI on an S3 server of this test; bucket `shared`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-c", f"from moto.server import main; main(['-p', '{port}'])"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    endpoint = f"127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        given = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_EC2_METADATA_DISABLED": "true"}
        for name, value in {**given, "RAYSYS_USER_KEY": "the same on every node"}.items():
            patch.setenv(name, value)
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://{endpoint}/moto-api/", timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        urllib.request.urlopen(urllib.request.Request(f"http://{endpoint}/shared", method="PUT"), timeout=5).close()
        yield f"endpoint_override={endpoint}&scheme=http&region=us-east-1"
    server.terminate()
    server.wait(10)


@pytest.fixture(scope="module")
def at(s3) -> Callable[[str], str]:
    """URI of a name on the shared store."""
    return lambda name: f"s3://shared/{name}?{s3}"


@pytest.fixture(scope="module")
def nodes(s3, tmp_path_factory):
    started = Nodes(tmp_path_factory.mktemp("nodes"))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def data(at) -> str:
    import_dataset("synthetic", None, at("data"), users=400, items=80, events=6000, seed=3)
    return at("data")


@pytest.fixture(scope="module")
def prepared(nodes, data, at) -> str:
    prepare(data, at("prepared"), split="leave-one-out", config=PrepareConfig(partitions=2), progress=False)
    return at("prepared")


@pytest.fixture(scope="module")
def bundle(prepared, at) -> str:
    """What two workers on two nodes learn undisturbed."""
    settings, given = load_train_config(None, [*SETTINGS, *TWO_NODES])
    train(prepared, at("bundle-0"), settings, given=given, seed=1, quiet=True)
    return at("bundle-0")


def item_vectors(uri: str) -> np.ndarray:
    return Bundle.open(uri).models["interest"].item_vectors


def test_prepare_on_a_shared_store(nodes, data, prepared, at):
    """Two partitions on two nodes read and write S3 and nothing else; one partition on one node gives the same set."""
    alone = prepare(data, at("prepared-1"), config=PrepareConfig(partitions=1), progress=False)
    manifest = storage.read_json(storage.join(prepared, "manifest.json"))
    assert manifest["fingerprint"] == alone["fingerprint"] and manifest["counts"]["train"] > 4000
    assert not [name for name in storage.list_dir(at("")) if ".tmp-" in name or ".old-" in name]


def test_a_node_dies_during_batch_inference(nodes, at):
    """A worker on each of two nodes; what the dead one had under way is computed again, every file is as a worker here writes it."""
    uri, settings = at("planted"), BatchConfig(users_per_part=2)
    planted.build_bundle().write(uri, manifest=planted.manifest())
    users, threads = users_of_bundle(Bundle.open(uri), settings.users_per_part), torch.get_num_threads()
    here = PartWriter(uri, at("lists-0"), "final", 10, users.key, None, settings)
    for part in users.parts:
        here(part_table(part))
    torch.set_num_threads(threads)
    with nodes.kill_when(lambda: len(storage.list_dir(at("lists-1"))) > 10):
        manifest = run_batch(uri, at("lists-1"), k=10, settings=settings, say=lambda line: None)
    assert manifest["files"] == {name: storage.sha256(storage.join(at("lists-0"), name)) for name in storage.list_dir(at("lists-0"))}
    assert len(manifest["files"]) == manifest["this_run"]["parts"] == planted.NUM_USERS / 2


@pytest.mark.slow
def test_a_node_dies_during_prepare(nodes, at):
    import_dataset("synthetic", None, at("more"), users=8000, items=1000, events=200_000, seed=4)
    settings = PrepareConfig(partitions=8)
    undisturbed = prepare(at("more"), at("more-0"), config=settings, progress=False)
    started = time.monotonic()
    with nodes.kill_when(lambda: time.monotonic() - started > 1.5):
        disturbed = prepare(at("more"), at("more-1"), config=settings, progress=False)
    assert disturbed["fingerprint"] == undisturbed["fingerprint"]
    assert sorted(storage.list_files(at("more-1"))) == sorted(storage.list_files(at("more-0")))


@pytest.mark.slow
def test_a_node_dies_during_training(nodes, prepared, bundle, at):
    """Both nodes offer a GPU that torch cannot use: two workers meet over Gloo, each on a node of its own."""
    settings, given = load_train_config(None, [*SETTINGS, *TWO_NODES])

    def has_checkpoint() -> bool:
        return any(name.endswith("state.json") for name in storage.list_files(at("bundle-1.work")))

    with nodes.kill_when(has_checkpoint):
        disturbed = train(prepared, at("bundle-1"), settings, given=given, seed=1, quiet=True)
    assert disturbed["metrics"]["validation"] == pytest.approx(Bundle.open(bundle).manifest["metrics"]["validation"], abs=1e-6)
    np.testing.assert_allclose(item_vectors(at("bundle-1")), item_vectors(bundle), atol=1e-6)
    assert not storage.exists(at("bundle-1.work"))


@pytest.mark.slow
def test_a_node_dies_during_a_search(nodes, prepared, at):
    """Two trials at a time, four in all: when the first one has ended, others are under way on both nodes."""
    overrides = [*SETTINGS, "encoder.epochs=12", "scaling={use_gpu: true, cpus_per_worker: 1}"]
    tune(prepared, at("tuned-0"), config_uri=None, overrides=overrides, samples=4, seed=0)
    with nodes.kill_when(lambda: bool(storage.list_dir(at("tuned-1/trials")))):
        tune(prepared, at("tuned-1"), config_uri=None, overrides=overrides, samples=4, seed=0)
    undisturbed, disturbed = (storage.read_json(storage.join(at(name), "trials.json")) for name in ("tuned-0", "tuned-1"))
    assert [trial["error"] for trial in disturbed["trials"]] == [None] * 4
    # ASHA decides by who comes first, so what a trial came to is compared for the epochs that both ran.
    for first, second in zip(undisturbed["trials"], disturbed["trials"], strict=True):
        both = min(len(first["loss"]), len(second["loss"]))
        assert both > 0 and first["loss"][:both] == pytest.approx(second["loss"][:both], abs=1e-5)


@contextlib.contextmanager
def serving(nodes: Nodes, registry: str) -> Iterator[str]:
    """`serve run serve_config.yaml` on the running cluster, as a base URL; log and state are folders of the head node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = apart_config()  # so that other nodes score
    values["http_options"]["port"] = port
    values["applications"][0]["args"] |= {"registry": registry, **{name: str(nodes.folder / "head" / name) for name in ("events", "state")}}
    path, log = nodes.folder / "serve_config.json", nodes.folder / "serve.log"
    path.write_text(json.dumps(values))
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.serve.scripts", "run", str(path)],
        env={**os.environ, "RAY_ADDRESS": nodes.cluster.address},
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
    )
    try:
        deadline = time.monotonic() + 120
        while (answer := ready(f"http://127.0.0.1:{port}")) != "ready":
            assert process.poll() is None and time.monotonic() < deadline, f"{answer}; {log.read_text()[-3000:]}"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)  # Serve is shut down, the cluster stays
        try:
            process.wait(60)
        finally:
            process.kill()


def ready(base_url: str) -> str:
    try:
        return call(f"{base_url}/health/ready")["status"]
    except urllib.error.HTTPError as error:
        return error.read().decode()
    except OSError as error:
        return str(error)


def call(url: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.loads(response.read())


@pytest.mark.slow
def test_the_whole_road(nodes, prepared, bundle, at):
    """Import, prepare and training are fixtures. What the nodes answer, over HTTP and in files, is what the pipeline answers here."""
    figures = evaluate(prepared, bundle, split="test", bootstrap=0)
    assert figures["final"]["recall@10"] > 1.5 * 10 / 80, "better than a random order of the catalogue"
    version = Registry(at("registry")).publish(bundle).version
    run_batch(bundle, at("everybody"), k=10, settings=BatchConfig(users_per_part=100), say=lambda line: None)
    names = [name for name in storage.list_dir(at("everybody")) if name.startswith("part-")]
    rows = [row for name in names for row in storage.read_table(storage.join(at("everybody"), name)).to_pylist()]
    lists = {row["user_key"]: row["item_id"] for row in rows}
    here, users = Bundle.open(bundle), Prepared.open(prepared).users()["user_id"].to_pylist()[:30]
    expected = {user: [here.item_ids[row] for row in recommend_user(here, user, 10).items] for user in users}
    assert len(names) == 4 and {user: lists[user_key(user)] for user in users} == expected

    with serving(nodes, at("registry")) as base_url:
        answers = {user: call(f"{base_url}/v1/recommend", {"user_id": user, "n": 10}) for user in users}
        assert {user: [item["item_id"] for item in answer["items"]] for user, answer in answers.items()} == expected
        assert {(answer["model_version"], answer["degraded"]) for answer in answers.values()} == {(version, False)}
        event = {"user_id": users[0], "item_id": expected[users[0]][0], "event": "view"}
        assert call(f"{base_url}/v1/events", event)["accepted"] == 1
        next_answer = call(f"{base_url}/v1/recommend", {"user_id": users[0], "n": 10})
        assert event["item_id"] not in [item["item_id"] for item in next_answer["items"]]
    # The head answers, other nodes score: each has fetched the version into a cache of its own.
    homes = {path.parents[2].name for path in nodes.folder.glob("node-*/cache/bundles/*")}
    assert "node-1" in homes and len(homes) >= 2


@pytest.mark.slow
def test_a_node_with_model_replicas_dies_under_load(nodes, tmp_path, at):
    """Answers of the moment are degraded, none is missing; the replicas come up again on the other node or on the new one."""
    planted.build_bundle().write(str(tmp_path / "bundle"), manifest=planted.manifest())  # under the key of these nodes
    Registry(at("registry-2")).publish(str(tmp_path / "bundle"))
    with serving(nodes, at("registry-2")) as base_url, Traffic(base_url, clients=2) as traffic:
        traffic.wait_until_sound()
        victim, killed = nodes.with_replica_of("Retrieval"), time.monotonic()
        nodes.workers.remove(victim)
        nodes.cluster.remove_node(victim, allow_graceful=False)
        traffic.wait_until(lambda seen: any(one.degraded for one in seen), since=killed)
        nodes.workers.append(nodes.add())
        traffic.wait_until_sound(timeout_s=120)
    assert traffic.statuses() == {200}
    assert {one.reason.partition(" (")[0] for one in traffic.seen if one.degraded} <= {"retrieval failed", "ranking failed"}
