import dataclasses
import time

import numpy as np
import pyarrow as pa
import pytest
import torch

from raysys import storage
from raysys.bundle import Bundle, Histories
from raysys.errors import BundleError, ConfigError, StateError
from raysys.events.embedded_log import EmbeddedLog
from raysys.events.identity import user_key
from raysys.models.covisit import Covisitation
from raysys.models.fusion import Fusion
from raysys.models.interest import InterestConfig, InterestEncoder, InterestRetriever
from raysys.models.popularity import Popularity
from raysys.online.change import has_fallen, reached
from raysys.online.config import OnlineConfig
from raysys.online.feed import flat_sequences, read_fresh
from raysys.online.gate import verdict
from raysys.online.improve import improve
from raysys.online.learner import Learner, run_online
from raysys.registry import Registry
from raysys.train.batches import InMemory
from raysys.train.encoder import EncoderTrainConfig, train_encoder

N = 40
"""Planted truth of the training data: item i is followed by i + 2; later users jump from i to i + STEP instead."""
STEP = 13
CONFIG = OnlineConfig(anchor_users=40, replay_users=60, batch_size=32, lr=1e-3)
ALONE = dataclasses.replace(CONFIG, recent_half_life_days=0, mixture_prior=0)
"""Without the parts that make up for an encoder that was spoilt."""


def walks(num_users, step, length, rng):
    starts = rng.integers(0, N, num_users)
    return (starts[:, None] + step * np.arange(length)) % N


@pytest.fixture(scope="module")
def trained():
    torch.set_num_threads(1)  # a tiny model; more threads only wait for each other
    rng = np.random.default_rng(0)
    items = walks(120, 2, 8, rng)
    flat = flat_sequences(items.ravel(), np.ones(items.size), np.tile(np.arange(8), 120), np.arange(0, items.size + 1, 8))
    encoder = InterestEncoder(N, 2, InterestConfig(dim=16, num_layers=1, num_heads=1, max_length=10, dropout=0.0))
    train_encoder(encoder, InMemory(flat), EncoderTrainConfig(epochs=15, batch_size=32, lr=1e-2, warmup_steps=5), seed=0)
    models = {
        "interest": InterestRetriever.from_encoder(encoder, np.bincount(flat.items, minlength=N)),
        "covisit": Covisitation.fit(flat, N),
        "popularity": Popularity.fit(flat, N),
    }
    fusion = {
        "mixture": Fusion.of({"interest": 0.5, "covisit": 0.45, "popularity": 0.05}, dict.fromkeys(models, 1.0)).to_dict(),
        "ranker_weight": 0.0,
    }
    return flat, models, fusion


@pytest.fixture
def world(trained, tmp_path, monkeypatch):
    """A registry with the trained version, and an empty log."""
    monkeypatch.setenv("RAYSYS_USER_KEY", "a key only for tests")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    flat, models, fusion = trained
    table = pa.table({"item_idx": pa.array(range(N), pa.int32()), "item_id": [f"i{i}" for i in range(N)]})
    table = table.append_column("num_train", pa.array(np.bincount(flat.items, minlength=N)))
    histories = Histories.build(flat, [f"u{row}" for row in range(len(flat))], max_events=20)
    manifest = {"events": ["other", "view"], "log_offset": None, "watermark": 7, "metrics": {"ndcg@10": 0.5}}
    Bundle(table, models, fusion, histories).write(str(tmp_path / "trained"), manifest=manifest)
    registry = Registry(tmp_path / "registry")
    registry.publish(str(tmp_path / "trained"))
    return registry, EmbeddedLog(str(tmp_path / "events"), writable=True)


def learner_of(world, config=CONFIG, **options):
    registry, log = world
    return Learner(registry.uri, log.folder, config, **options)


def events_of(items, first_user, *, step_s=100, first_time=1e6):
    """Records of users that walk along the rows of `items`."""
    records = [
        {
            "kind": "event",
            "user_id": f"n{first_user + row}",
            "item_id": f"i{item}",
            "event": "view",
            "timestamp": first_time + step_s * column + row,
        }
        for column in range(items.shape[1])
        for row, item in enumerate(items[:, column])
    ]
    return records


def current(world):
    registry, _ = world
    return Bundle.open(registry.bundle_uri(registry.current().version))


def arrays_of(bundle):
    return {f"{name}.{key}": array for name, model in bundle.models.items() for key, array in model.to_arrays()[0].items()}


def test_new_behaviour_is_learnt_and_published(world):
    registry, log = world
    before = current(world)
    rng = np.random.default_rng(1)
    log.append(events_of(walks(60, STEP, 6, rng), 0))
    learner = learner_of(world)
    first = learner.round()
    assert first["status"] == "published" and first["events"] == 360
    gate = first["figures"]["gate"]
    assert gate["new"]["updated"]["ndcg@10"] > gate["new"]["serving"]["ndcg@10"] + 0.1
    assert gate["anchor"]["updated"]["ndcg@10"] > gate["anchor"]["serving"]["ndcg@10"] - CONFIG.margin
    log.append(events_of(walks(60, STEP, 6, rng), 100))
    second = learner.round()
    assert second["figures"]["prequential"]["ndcg@10"] > first["figures"]["prequential"]["ndcg@10"] + 0.1

    after = current(world)
    assert after.version == second["version"] == registry.current().version
    assert after.manifest["lineage"] == {"trained": before.version, "parent": first["version"], "rounds": 2, "events": 720}
    assert after.manifest["watermark"] > 1e6 and after.manifest["metrics"]["ndcg@10"] == 0.5
    assert after.items["num_train"].to_numpy().sum() == before.items["num_train"].to_numpy().sum() + 720
    assert len(after.histories.lookup("n0")[0]) == 6 and len(after.histories.lookup("u0")[0]) == 8
    assert learner_of(world).round()["status"] == "idle", "a new learner starts at the published offset"


def test_counts_equal_those_of_one_fit_on_everything(world, trained):
    _, log = world
    flat = trained[0]
    new = walks(30, STEP, 5, np.random.default_rng(2))
    for part, first_user in ((new[:10], 0), (new[10:], 10)):
        log.append(events_of(part, first_user))
        assert learner_of(world).round()["status"] == "published"
    items = np.concatenate([flat.items, new.ravel()])
    indptr = np.concatenate([flat.indptr, flat.indptr[-1] + np.arange(5, new.size + 1, 5)])
    refit = Covisitation.fit(flat_sequences(items, np.ones(len(items)), np.zeros(len(items)), indptr), N)
    queries = flat_sequences(new.ravel(), np.ones(new.size), np.zeros(new.size), np.arange(0, new.size + 1, 5)).queries()
    assert current(world).models["covisit"].scores(queries) == pytest.approx(refit.scores(queries), rel=1e-4, abs=1e-5)


def test_nothing_new_publishes_nothing(world):
    registry, log = world
    pointer = registry.current()
    learner = learner_of(world)
    assert learner.round()["status"] == "idle"
    log.append([{"kind": "impression", "user_id": "u1", "items": ["i1"], "at": 1.0}, {"kind": "item", "item_id": "z", "attributes": {}}])
    assert learner.round() == {"status": "idle", "version": pointer.version, "events": 0, "records": 2, "skipped": 0}
    assert learner.round()["records"] == 0, "they are not read again"
    assert registry.current() == pointer


def test_it_waits_for_enough_events(world):
    _, log = world
    learner = learner_of(world, dataclasses.replace(CONFIG, min_events=8))
    log.append(events_of(walks(2, STEP, 3, np.random.default_rng(0)), 0))
    assert learner.round()["status"] == "waiting"
    log.append(events_of(walks(1, STEP, 2, np.random.default_rng(0)), 2))
    report = learner.round()
    assert (report["status"], report["events"]) == ("published", 8)


def test_a_single_event_is_enough(world):
    _, log = world
    log.append(events_of(np.array([[3]]), 0))
    assert learner_of(world).round()["status"] == "published"
    assert current(world).histories.lookup("n0")[0].tolist() == [3]


def test_a_pinned_registry_is_left_alone_until_unpin(world):
    registry, log = world
    learner = learner_of(world)
    trained_version = registry.current().version
    log.append(events_of(walks(5, STEP, 3, np.random.default_rng(0)), 0))
    learner.round()
    pinned = registry.rollback()
    log.append(events_of(walks(5, STEP, 3, np.random.default_rng(1)), 10))
    assert learner.round() == {"status": "pinned", "version": trained_version, "events": 0}
    assert registry.current() == pinned
    registry.publish(registry.bundle_uri(trained_version), unpin=True)
    report = learner.round()
    assert (report["status"], report["events"]) == ("published", 30), "it starts again from the version that was pinned"


def test_a_worse_update_is_refused_once_and_tried_again_with_more_events(world, monkeypatch):
    registry, log = world
    pointer = registry.current()

    def ruined(encoder, *arguments, **options):
        generator = torch.Generator().manual_seed(0)
        for parameter in encoder.parameters():
            parameter.data.normal_(generator=generator)

    monkeypatch.setattr("raysys.online.update.train_encoder", ruined)
    learner = learner_of(world, ALONE)
    log.append(events_of(walks(20, 2, 4, np.random.default_rng(0)), 0))
    report = learner.round()
    assert report["status"] == "refused" and "the margin is 0.02" in report["reason"]
    assert learner.round()["status"] == "waiting"
    log.append(events_of(walks(20, 2, 4, np.random.default_rng(1)), 20))
    assert learner.round()["status"] == "refused"
    assert registry.current() == pointer


def test_each_gate_stops_what_the_others_let_pass(world, monkeypatch):
    """A ruined encoder under one gate after the other; with all of them open it would be published."""
    _, log = world

    def ruined(encoder, *arguments, **options):
        generator = torch.Generator().manual_seed(0)
        for parameter in encoder.parameters():
            parameter.data.normal_(generator=generator)

    monkeypatch.setattr("raysys.online.update.train_encoder", ruined)
    log.append(events_of(walks(20, STEP, 4, np.random.default_rng(0)), 0))
    open_gates = {"margin": 2.0, "max_log_loss_rise": 1e9, "max_drift": 1.0}
    for gate, bound, words in (
        ("margin", 0.02, "the margin is"),
        ("max_log_loss_rise", 0.1, "calibration"),
        ("max_drift", 0.1, "score drift"),
    ):
        report = learner_of(world, dataclasses.replace(ALONE, **{**open_gates, gate: bound})).round()
        assert report["status"] == "refused" and words in report["reason"]
    assert learner_of(world, dataclasses.replace(CONFIG, **open_gates)).round()["status"] == "published"


def test_the_mixture_follows_what_has_changed(world, tmp_path):
    """The encoder stays as it is here: what wins is weight that leaves it for the sources that count."""
    registry, log = world
    still, copy = dataclasses.replace(ALONE, epochs=0, margin=2.0), Registry(tmp_path / "copy")
    copy.publish(registry.bundle_uri(registry.current().version))
    rng, found = np.random.default_rng(5), {}
    for part in range(3):
        log.append(events_of(walks(40, STEP, 6, rng), 100 * part, first_time=1e6 + 1e4 * part))
        for place, config in ((registry, dataclasses.replace(CONFIG, epochs=0, mixture_prior=20, margin=2.0)), (copy, still)):
            report = Learner(place.uri, log.folder, config).round()
            assert report["status"] == "published", report.get("reason")
            found[place.uri] = report["figures"]["prequential"]["ndcg@10"]
    mixed, unmixed = current(world), current((copy, log))
    assert "recent" not in unmixed.models and unmixed.fusion == mixed.fusion | {"mixture": unmixed.fusion["mixture"]}
    before, after = unmixed.fusion["mixture"]["weights"], mixed.fusion["mixture"]["weights"]
    assert after["recent"] > 0 and after["interest"] < before["interest"] - 0.2, (before, after)
    assert found[registry.uri] > found[copy.uri] + 0.05, "on events that neither had learnt"


def test_a_proven_change_starts_the_counts_anew_once(world):
    _, log = world
    config = dataclasses.replace(CONFIG, epochs=0)
    for part, step in enumerate((2, STEP, STEP)):
        log.append(events_of(walks(40, step, 6, np.random.default_rng(part)), 100 * part, first_time=1e6 + 1e4 * part))
        report = learner_of(world, config).round()
        assert report["status"] == "published" and report["figures"].get("anew") == (["covisit"] if part == 1 else None), report["figures"]
    assert report["figures"]["change"] == {"since": 1_010_000, "events": 480}
    newest = [walks(40, STEP, 6, np.random.default_rng(part)) for part in (1, 2)]
    expected = np.bincount(np.concatenate(newest).ravel(), minlength=N)
    for name in ("recent", "covisit"):
        occurrences = current(world).models[name].to_arrays()[0]["occurrences"]
        assert occurrences == pytest.approx(expected, rel=0.03), name
    assert current(world).models["popularity"].counts.sum() > expected.sum() + 900, "what is popular has not changed"


def test_a_loss_counts_beyond_its_standard_error():
    rng = np.random.default_rng(0)
    bundle = Bundle(pa.table({"item_id": ["a"]}), {}, {}, Histories(pa.table({"user_key": []}), 1))

    def said(loss, num_events):
        losses = np.tile(loss + rng.permutation(np.repeat([-0.2, 0.2], num_events // 2))[:, None], 2)  # an error of .2 / sqrt(events)
        return verdict(bundle, {"new": (losses, np.zeros_like(losses))}, OnlineConfig(margin=0.02), {})

    assert said(0.035, 100) == "" and "new slice fell by 0.0450, the margin is 0.02" in said(0.045, 100)
    assert "new slice fell by 0.0350" in said(0.035, 1000)


def test_a_fall_is_told_from_a_bad_spell():
    hits = np.repeat([1.0, 0.0], [6, 94])
    assert has_fallen(0.3, hits, 0.5), "6% and twice 2.6% are less than half of 30%"
    assert not has_fallen(0.2, hits, 0.5) and not has_fallen(None, hits, 0.5)
    assert not has_fallen(0.3, np.zeros(5), 0.5) and has_fallen(0.3, np.zeros(100), 0.5), "five misses prove nothing"
    assert (
        reached(None, hits) == pytest.approx(0.06)
        and reached(0.3, hits) == pytest.approx(0.27)
        and reached(0.05, hits) == pytest.approx(0.06)
    )


def test_users_without_news_do_not_hold_up_a_proven_change(world, monkeypatch):
    """Old users lose their encoder; that is held against an update until the serving version has stopped to predict what happens."""
    _, log = world

    def ruined(encoder, *arguments, **options):
        generator = torch.Generator().manual_seed(0)
        for parameter in encoder.parameters():
            parameter.data.normal_(generator=generator)

    log.append(events_of(walks(30, 2, 6, np.random.default_rng(0)), 0))
    first = learner_of(world, ALONE).round()
    assert first["status"] == "published" and first["figures"]["level"] > 0.8 and first["figures"]["change"] is None
    monkeypatch.setattr("raysys.online.update.train_encoder", ruined)
    log.append(events_of(walks(30, STEP, 6, np.random.default_rng(1)), 100, first_time=2e6))
    held = learner_of(world, dataclasses.replace(ALONE, proven_fall=1.0)).round()
    assert held["status"] == "refused" and "anchor" in held["reason"]
    followed = learner_of(world, ALONE).round()
    assert followed["status"] == "published" and followed["figures"]["change"]["events"] == 180 and followed["figures"]["level"] > 0.7


def test_values_that_are_not_finite_are_refused(world):
    registry, log = world
    log.append(events_of(walks(20, STEP, 4, np.random.default_rng(0)), 0))
    bundle = current(world)
    fresh = read_fresh(EmbeddedLog(log.folder), bundle, None, max_events=1000)
    bundle.models["interest"].encoder.items.weight.data[3] = float("nan")
    result = improve(bundle, fresh, CONFIG, 0)
    assert not result.passed and result.models == {} and "interest has values that are not finite" in result.reason


def test_a_crash_before_the_pointer_moves_counts_every_event_once(world, monkeypatch):
    registry, log = world
    log.append(events_of(walks(20, STEP, 4, np.random.default_rng(0)), 0))

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "_move", killed)
        with pytest.raises(KeyboardInterrupt):
            learner_of(world).round()
    before = current(world)
    assert learner_of(world).round()["status"] == "published"
    after = current(world)
    assert after.items["num_train"].to_numpy().sum() == before.items["num_train"].to_numpy().sum() + 80
    assert learner_of(world).round()["status"] == "idle"


def test_the_same_events_give_the_same_models(world, tmp_path):
    registry, log = world
    log.append(events_of(walks(20, STEP, 4, np.random.default_rng(0)), 0))
    copy = Registry(tmp_path / "copy")
    copy.publish(registry.bundle_uri(registry.current().version))
    learner_of(world).round()
    Learner(copy.uri, log.folder, CONFIG).round()
    first, second = arrays_of(current(world)), arrays_of(current((copy, log)))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_a_publish_of_somebody_else_is_not_undone(world, tmp_path):
    registry, log = world
    log.append(events_of(walks(20, STEP, 4, np.random.default_rng(0)), 0))
    other = current(world)
    other.write(str(tmp_path / "other"), manifest={"events": other.events, "log_offset": None})

    def overtaken(*arguments):
        registry.publish(str(tmp_path / "other"))
        return improve(*arguments)

    learner = learner_of(world, step=overtaken)
    assert learner.round()["status"] == "superseded"
    assert registry.current().version == other.version
    learner.step = improve
    assert learner.round()["status"] == "published"
    assert current(world).manifest["lineage"]["parent"] == other.version


def test_an_erased_user_leaves_the_next_version(world):
    _, log = world
    log.append([{"kind": "erase", "user_key": user_key("u3").hex(), "at": 1.0}])
    assert learner_of(world).round()["status"] == "published"
    assert current(world).histories.lookup("u3") is None and current(world).histories.lookup("u4") is not None
    assert learner_of(world).round()["status"] == "idle"


def test_an_erasure_counts_also_when_retention_has_dropped_its_record(world):
    _, log = world
    log.append([{"kind": "erase", "user_key": user_key("u3").hex(), "at": time.time() + 10}])
    log.close()
    for segment in log.segments():
        log.drop(segment)
    assert learner_of(world).round()["status"] == "published"
    assert current(world).histories.lookup("u3") is None and current(world).histories.lookup("u4") is not None


def test_another_user_key_is_refused(world, monkeypatch):
    monkeypatch.setenv("RAYSYS_USER_KEY", "another key for tests")
    with pytest.raises(ConfigError, match="written with user key"):
        learner_of(world).round()


def test_run_online_once(world, tmp_path, capsys):
    registry, log = world
    log.append(events_of(walks(20, STEP, 4, np.random.default_rng(0)), 0))
    report = run_online(registry.uri, log.folder, once=True, config=CONFIG)
    assert report["status"] == "published" and report["version"] == registry.current().version
    assert f"published: version {report['version']}, 80 events" in capsys.readouterr().out


def test_no_model_is_a_state_and_not_an_error(tmp_path):
    report = run_online(str(tmp_path / "empty"), str(tmp_path / "events"), once=True)
    assert report["status"] == "no model"


def test_one_learner_a_log(world):
    registry, log = world
    with log.exclusive("learner"), pytest.raises(StateError, match="alone at learner"):
        run_online(registry.uri, log.folder, once=True)
    assert run_online(registry.uri, log.folder, once=True)["status"] == "idle"


def test_a_refusal_by_the_registry_itself_is_not_hidden(world, monkeypatch):
    _, log = world
    log.append(events_of(np.array([[3]]), 0))

    def full(*arguments, **options):
        raise BundleError("disk full")

    monkeypatch.setattr(Registry, "publish", full)
    with pytest.raises(BundleError, match="disk full"):
        learner_of(world).round()


def test_the_online_section_of_the_manifest_is_json(world):
    registry, log = world
    log.append(events_of(walks(20, STEP, 4, np.random.default_rng(0)), 0))
    learner_of(world).round()
    manifest = storage.read_json(storage.join(registry.bundle_uri(registry.current().version), "manifest.json"))
    assert manifest["metrics"]["online"]["prequential"]["events"] == 80
