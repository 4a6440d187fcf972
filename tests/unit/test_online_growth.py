"""New items get rows without training; what the old rows say does not change."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from raysys.bundle import Bundle, Histories
from raysys.events.embedded_log import EmbeddedLog
from raysys.features.text import TextEncoder
from raysys.models.base import Candidates
from raysys.models.content import ContentNeighbours
from raysys.models.covisit import Covisitation
from raysys.models.dot_product import DotProduct, DotProductConfig
from raysys.models.fusion import Fusion
from raysys.models.interest import InterestConfig, InterestEncoder, InterestRetriever
from raysys.models.popularity import Popularity
from raysys.models.ranker import Ranker, RankerConfig, RankerNetwork
from raysys.online.config import OnlineConfig
from raysys.online.feed import flat_sequences
from raysys.online.growth import grown
from raysys.online.learner import Learner
from raysys.pipeline import recommend_user
from raysys.queries import Queries
from raysys.registry import Registry

TITLES = ["space war", "space ships and aliens", "galaxy space battle", "love story", "romantic wedding love", "a kiss of love"]
N = len(TITLES)
NEW = {"spacey": {"title": "aliens in a space war"}, "mute": {}}


def padded(rows):
    return torch.from_numpy(np.concatenate([rows, np.zeros((1, rows.shape[1]), np.float32)]))


@pytest.fixture
def bundle(monkeypatch):
    monkeypatch.setenv("RAYSYS_USER_KEY", "a key only for tests")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    torch.manual_seed(0)
    flat = flat_sequences(np.array([0, 1, 2, 3, 4, 5] * 4), np.ones(24), np.arange(24), np.arange(0, 25, 3))
    encoder = InterestEncoder(N, 2, InterestConfig(dim=8, num_layers=1, num_heads=1, max_length=6, dropout=0.0))
    content = ContentNeighbours.fit(TextEncoder().encode(TITLES))
    vectors = encoder.item_vectors().detach().numpy()
    network = RankerNetwork(padded(vectors), padded(content.item_vectors), torch.zeros(N + 1), 2, RankerConfig())
    models = {
        "interest": InterestRetriever.from_encoder(encoder, np.ones(N)),
        "covisit": Covisitation.fit(flat, N),
        "popularity": Popularity.fit(flat, N),
        "content": content,
        "dot_product": DotProduct.fit(flat, N, DotProductConfig(dim=4, steps=3)),
        "ranker": Ranker(network, ("interest", "covisit"), calibration=(1.0, 0.0)),
    }
    weights = {"interest": 0.4, "covisit": 0.3, "content": 0.2, "popularity": 0.1}
    fusion = {"mixture": Fusion.of(weights, dict.fromkeys(weights, 1.0)).to_dict(), "ranker_weight": 0.0}
    items = pa.table(
        {"item_idx": pa.array(range(N), pa.int32()), "item_id": [f"i{i}" for i in range(N)], "title": TITLES, "year": range(1980, 1980 + N)}
    )
    items = items.append_column("num_train", pa.array([4] * N))
    histories = Histories.build(flat, [f"u{row}" for row in range(8)], max_events=10)
    return Bundle(items, models, fusion, histories, {"events": ["other", "view"], "log_offset": None})


QUERY = Queries(np.array([0, 1], np.int32), np.ones(2, np.int8), np.arange(2), np.full(2, np.nan), np.array([0, 2]), np.array([2]))


def test_old_rows_say_what_they_said(bundle):
    bigger = grown(bundle, NEW)
    assert bigger.items["item_id"].to_pylist() == [*bundle.item_ids, "spacey", "mute"]
    assert bigger.items["item_idx"].to_pylist() == list(range(N + 2))
    for name, model in bundle.models.items():
        if name != "ranker":
            scores = bigger.models[name].scores(QUERY)
            assert scores.shape == (1, N + 2) and scores[:, :N] == pytest.approx(model.scores(QUERY), abs=1e-5), name
    some = Candidates(np.array([[2, 3]], np.int32), np.zeros((1, 2), np.float32), np.zeros((1, 2, 2), np.float32), ("interest", "covisit"))
    before, after = (one.models["ranker"].score(QUERY, some) for one in (bundle, bigger))
    assert after[0] == pytest.approx(before[0], abs=1e-5) and after[1] == pytest.approx(before[1], abs=1e-5)


def test_a_new_row_starts_at_its_neighbours_by_content(bundle):
    bigger = grown(bundle, NEW)
    vectors = bigger.models["interest"].item_vectors
    similar = vectors[:N] @ vectors[N]
    assert similar[:3].mean() > similar[3:].mean() + 0.2, "space among space"
    assert bigger.models["interest"].warm.tolist() == [True] * (N + 1) + [False], "nothing is known of the item without text"
    assert np.any(bigger.models["content"].item_vectors[N]) and not np.any(bigger.models["content"].item_vectors[N + 1])


def test_nothing_new_is_the_same_bundle(bundle):
    assert grown(bundle, {}) is bundle


def test_an_attribute_of_another_type_is_left_to_the_state(bundle):
    table = grown(bundle, {"odd": {"title": "odd one", "year": "soon", "colour": "red"}}).items
    assert table["title"].to_pylist()[-1] == "odd one" and table["year"].to_pylist()[-2:] == [1985, None]
    assert table.schema.equals(bundle.items.schema)


def event(user, item, time):
    return {"kind": "event", "user_id": user, "item_id": item, "event": "view", "timestamp": float(time)}


def test_items_and_users_of_the_log_are_in_the_next_version(bundle, tmp_path):
    bundle.write(str(tmp_path / "bundle"), manifest={"events": ["other", "view"], "log_offset": None})
    registry = Registry(tmp_path / "registry")
    registry.publish(str(tmp_path / "bundle"))
    log = EmbeddedLog(str(tmp_path / "events"), writable=True)
    open_gates = OnlineConfig(margin=2.0, max_log_loss_rise=100.0, max_drift=1.0)
    learner = Learner(registry.uri, log.folder, open_gates)
    log.append([{"kind": "item", "item_id": name, "attributes": values, "replace": True} for name, values in NEW.items()])
    assert learner.round()["status"] == "idle", "rows come with the next events"
    log.append([{"kind": "item", "item_id": "gone", "attributes": {}}, {"kind": "item_delete", "item_id": "gone"}])
    log.append([event(f"new{n}", item, 100 + n) for n in range(6) for item in ("i0", "mute", "spacey")] + [event("new0", "gone", 200)])
    report = learner.round()
    assert (report["status"], report["events"], report["skipped"]) == ("published", 18, 1)
    after = Bundle.open(registry.bundle_uri(report["version"]))
    assert after.item_ids[N:] == ["spacey", "mute"] and after.manifest["new_items"] == 2
    assert after.items["num_train"].to_pylist()[N:] == [6, 6]
    assert after.models["interest"].warm.all()
    assert after.models["ranker"].network.popularity.expm1().tolist() == pytest.approx([6, 0, 0, 0, 0, 0, 6, 6, 0], abs=1e-4)
    assert after.models["covisit"].scores(QUERY)[0, N:].min() > 0, "counted after i0"
    assert recommend_user(after, "new3", 3).strategy == "personalized"
    assert learner.round()["status"] == "idle" and Learner(registry.uri, log.folder, open_gates).round()["status"] == "idle"
    log.append([event("late", "mute", 300)])
    assert learner.round()["status"] == "published" and Bundle.open(registry.bundle_uri(registry.current().version)).items.num_rows == N + 2
