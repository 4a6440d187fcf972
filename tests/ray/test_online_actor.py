import numpy as np
import pyarrow as pa
import pytest
import ray

from raysys.bundle import Bundle, Histories
from raysys.events.embedded_log import EmbeddedLog
from raysys.models.covisit import Covisitation
from raysys.models.fusion import Fusion
from raysys.models.interest import InterestConfig, InterestEncoder, InterestRetriever
from raysys.models.popularity import Popularity
from raysys.online.config import OnlineConfig
from raysys.online.feed import flat_sequences
from raysys.online.learner import run_online
from raysys.registry import Registry

N = 12
CONFIG = OnlineConfig(margin=1.0)  # the encoder here is untrained


@pytest.fixture(scope="module")
def cluster():
    context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield context.address_info["gcs_address"]
    ray.shutdown()


def publish_version(folder):
    rows = np.arange(60) % N
    flat = flat_sequences(rows, np.ones(60), np.tile(np.arange(5), 12), np.arange(0, 61, 5))
    encoder = InterestEncoder(N, 2, InterestConfig(dim=8, num_layers=1, num_heads=1, max_length=8, dropout=0.0))
    models = {
        "interest": InterestRetriever.from_encoder(encoder, np.ones(N)),
        "covisit": Covisitation.fit(flat, N),
        "popularity": Popularity.fit(flat, N),
    }
    items = pa.table({"item_idx": pa.array(range(N), pa.int32()), "item_id": [f"i{i}" for i in range(N)], "num_train": np.full(N, 5)})
    fusion = {"mixture": Fusion.of(dict.fromkeys(models, 1.0), dict.fromkeys(models, 1.0)).to_dict(), "ranker_weight": 0.0}
    histories = Histories.build(flat, [f"u{row}" for row in range(12)], max_events=20)
    Bundle(items, models, fusion, histories).write(f"{folder}/trained", manifest={"events": ["other", "view"], "log_offset": None})
    return Registry(f"{folder}/registry"), Registry(f"{folder}/other")


def test_a_round_on_a_cluster_equals_one_in_this_process(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYSYS_USER_KEY", "a key only for tests")
    remote, local = publish_version(str(tmp_path))
    for registry in (remote, local):
        registry.publish(str(tmp_path / "trained"))
    log = EmbeddedLog(str(tmp_path / "events"), writable=True)
    log.append(
        [{"kind": "event", "user_id": f"n{i % 4}", "item_id": f"i{i % N}", "event": "view", "timestamp": 100.0 + i} for i in range(30)]
    )
    arguments = {"once": True, "config": CONFIG}
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    first = run_online(remote.uri, log.folder, **arguments)
    again = run_online(remote.uri, log.folder, **arguments)
    monkeypatch.delenv("RAY_ADDRESS")
    second = run_online(local.uri, log.folder, **arguments)
    assert (first["status"], again["status"], second["status"]) == ("published", "idle", "published")
    assert first["figures"] == second["figures"]
    published, expected = (Bundle.open(registry.bundle_uri(registry.current().version)) for registry in (remote, local))
    for name, model in expected.models.items():
        found = published.models[name].to_arrays()[0]
        for key, array in model.to_arrays()[0].items():
            assert found[key] == pytest.approx(array, rel=1e-5, abs=1e-6), f"{name}.{key}"
