"""Compression on the planted world: what each step takes away, what it keeps, and the loss that is not exceeded."""

import dataclasses

import numpy as np
import pytest
import torch

from raysys import cli, storage
from raysys.bundle import Bundle
from raysys.compress.config import CompressConfig
from raysys.compress.distil import distilled
from raysys.compress.run import compress
from raysys.compress.steps import narrowed, pruned, ranking_fewer, shortened, without_unused, without_weak
from raysys.compress.teachers import teacher_of
from raysys.compress.thinned import Thinned
from raysys.errors import ConfigError
from raysys.models.content import projected
from raysys.models.fusion import log_softmax
from raysys.models.interest import InterestConfig, InterestEncoder, InterestRetriever
from raysys.pipeline import Pipeline
from raysys.prepare.dataset import Prepared
from raysys.queries import Queries
from raysys.train.batches import Cut, InMemory
from raysys.train.encoder import EncoderTrainConfig, train_encoder
from tests import planted
from tests.prepared import leave_one_out, write_prepared


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("compress") / "prepared")
    return write_prepared(folder, leave_one_out(planted.sequences()), planted.items_table())


@pytest.fixture(scope="module")
def deep_bundle(tmp_path_factory, planted_bundle, prepared):
    """The planted bundle with an encoder of four layers, and with co-visitation that has lost its weight."""
    bundle = Bundle.open(planted_bundle)
    torch.manual_seed(0)
    encoder = InterestEncoder(bundle.items.num_rows, len(planted.EVENTS), InterestConfig(dim=32, num_layers=4, max_length=16))
    data = Prepared.open(prepared).sequences().train()
    train_encoder(encoder, InMemory(data), EncoderTrainConfig(epochs=8, batch_size=32, lr=5e-3, warmup_steps=5), seed=0)
    models = {**bundle.models, "interest": InterestRetriever(encoder, np.ones(bundle.items.num_rows, bool))}
    mixture = bundle.fusion["mixture"]
    fusion = {**bundle.fusion, "mixture": {**mixture, "weights": {**mixture["weights"], "covisit": 0.0}}}
    ranker_sources = ["interest", "content", "popularity"]
    models.pop("ranker")
    folder = str(tmp_path_factory.mktemp("compress") / "deep")
    manifest = planted.manifest()
    Bundle(bundle.items, models, {**fusion, "ranker_sources": ranker_sources}, bundle.histories).write(folder, manifest=manifest)
    return folder


def test_a_student_of_half_the_layers_keeps_the_stated_loss(deep_bundle, prepared, tmp_path):
    out = str(tmp_path / "small")
    settings = CompressConfig(max_loss=0.05, distil_epochs=6, distil_lr=3e-3, neighbours=[4])
    report = compress(deep_bundle, prepared, out, settings, say=lambda text: None)
    small, original = Bundle.open(out), Bundle.open(deep_bundle)
    steps = {row["step"]: row for row in report["steps"]}
    assert steps["student of 2 layers"]["kept"] and small.models["interest"].encoder.config.num_layers == 2
    assert steps["unused sources dropped"]["kept"] and "covisit" not in small.models and "covisit" in original.models
    assert steps["int8"]["kept"] and small.manifest["packing"]["interest"]
    last = [row for row in report["steps"] if row["kept"]][-1]
    assert last["ndcg@10"] >= 0.95 * steps["original"]["ndcg@10"] > 0.2
    assert last["bytes"] == pytest.approx(sum(entry.stat().st_size for entry in (tmp_path / "small").iterdir()), rel=0.2)
    assert last["smaller"] > 1.5
    assert small.manifest["compression"]["from"] == original.version and small.manifest["events"] == original.events


def test_an_answer_from_fewer_events_is_that_of_a_shorter_history(deep_bundle):
    bundle, histories = Bundle.open(deep_bundle), [list(range(row, row + 14)) for row in range(5)]
    short = shortened(bundle, 0.5)
    assert short.models["interest"].encoder.config.looked_at == 8 and shortened(short, 0.75) is None
    whole, cut = Queries.from_lists(histories), Queries.from_lists([history[-8:] for history in histories])
    np.testing.assert_allclose(short.models["interest"].user_vectors(whole), bundle.models["interest"].user_vectors(cut), atol=1e-5)
    assert np.abs(short.models["interest"].user_vectors(whole) - bundle.models["interest"].user_vectors(whole)).max() > 1e-3
    loaded = type(bundle.models["interest"]).from_arrays(*short.models["interest"].to_arrays())
    assert loaded.encoder.config.looked_at == 8


def test_a_weak_source_is_dropped_and_the_ranker_takes_it_at_its_mean(planted_bundle):
    bundle = Bundle.open(planted_bundle)
    mixture, ranker = bundle.fusion["mixture"], bundle.models["ranker"]
    weights = {name: 0.05 if name == "covisit" else 0.5 for name in mixture["weights"]}
    bundle = dataclasses.replace(bundle, fusion={**bundle.fusion, "mixture": {**mixture, "weights": weights}})
    assert "covisit" in ranker.sources and without_weak(bundle, 0.01) is None
    fewer = without_weak(bundle, 0.1)
    assert "covisit" not in fewer.models and "covisit" not in fewer.fusion["ranker_sources"]
    assert sum(fewer.fusion["mixture"]["weights"].values()) == pytest.approx(1.0)
    queries = Queries.from_lists([list(range(row, row + 9)) for row in range(4)])
    found = Pipeline(bundle).retrieve(queries).candidates
    at, log_probs = found.sources.index("covisit"), found.log_probs.copy()
    log_probs[:, :, at] = float(ranker.network.mean[ranker.sources.index("covisit")])
    expected = ranker.score(queries, dataclasses.replace(found, log_probs=log_probs))
    for given, wanted in zip(fewer.models["ranker"].score(queries, found), expected, strict=True):
        np.testing.assert_allclose(given, wanted, atol=1e-5)
    Pipeline(fewer).recommend(queries, 5)


def test_a_bundle_says_how_many_candidates_are_ranked(planted_bundle, tmp_path):
    bundle = Bundle.open(planted_bundle)
    ranking_fewer(bundle, 30).write(str(tmp_path / "few"), manifest=planted.manifest())
    few, queries = Bundle.open(str(tmp_path / "few")), Queries.from_lists([[1, 2, 3]])
    assert Pipeline(few).retrieve(queries).candidates.items.shape == (1, 30)
    assert Pipeline(bundle).retrieve(queries).candidates.items.shape[1] > 30


def test_content_on_its_principal_axes_keeps_the_cosines_that_it_can(deep_bundle, planted_bundle):
    """Vectors that lie in three dimensions of more lose nothing in three; new items land where the known ones are."""
    bundle = Bundle.open(planted_bundle)
    content, rng = bundle.models["content"], np.random.default_rng(0)
    wide = content.item_vectors.shape[1]
    plane = np.linalg.qr(rng.normal(size=(wide, 3)))[0].astype(np.float32)
    flat = projected(rng.normal(size=(bundle.items.num_rows, 3)).astype(np.float32), plane.T)
    bundle.models["content"] = content.with_vectors(flat)
    small = narrowed(bundle, 3)
    after = small.models["content"]
    assert after.item_vectors.shape == (bundle.items.num_rows, 3) and narrowed(small, 3) is None
    np.testing.assert_allclose(after.item_vectors @ after.item_vectors.T, flat @ flat.T, atol=1e-4)
    raw = rng.normal(size=(4, wide)).astype(np.float32)
    np.testing.assert_allclose(after.transform(raw), projected(content.transform(raw), after.axes), atol=1e-5)
    assert small.models["ranker"].network.content_vectors.shape[1] == 3
    twice = narrowed(small, 2).models["content"]
    np.testing.assert_allclose(twice.transform(raw), projected(after.transform(raw), after.axes.T @ twice.axes), atol=1e-4)
    again = type(after).from_arrays(*after.to_arrays())
    np.testing.assert_allclose(again.transform(raw), after.transform(raw), atol=1e-5)


def test_a_student_is_nearer_to_its_teacher_than_the_layers_it_began_with(deep_bundle, prepared):
    bundle, data, told = Bundle.open(deep_bundle), Prepared.open(prepared), []
    teacher = bundle.models["interest"]
    student = distilled(bundle, data, CompressConfig(distil_epochs=6, distil_lr=3e-3, distil_share=1.0), told.append).models["interest"]
    begun = InterestEncoder(120, len(planted.EVENTS), dataclasses.replace(teacher.encoder.config, num_layers=2))
    begun.load_state_dict({name: value for name, value in teacher.encoder.state_dict().items() if name in begun.state_dict()})
    sequences = data.sequences()
    queries = sequences.queries_before(sequences.target_positions("test"))
    log_probs = {
        name: log_softmax(model.scores(queries))
        for name, model in (("teacher", teacher), ("student", student), ("begun", InterestRetriever(begun, teacher.warm)))
    }

    def divergence(name):
        return (np.exp(log_probs["teacher"]) * (log_probs["teacher"] - log_probs[name])).sum(axis=1).mean()

    assert divergence("student") < 0.5 * divergence("begun")
    assert told and told[0].startswith("student: epoch 1, ndcg@10")


def test_a_student_of_two_teachers_is_nearer_to_their_mean_than_either(deep_bundle, planted_bundle, prepared, tmp_path):
    bundle, data, other = Bundle.open(deep_bundle), Prepared.open(prepared), str(tmp_path / "other")
    torch.manual_seed(1)
    second = InterestEncoder(120, len(planted.EVENTS), dataclasses.replace(bundle.models["interest"].encoder.config, dim=16))
    train_encoder(second, InMemory(data.sequences().train()), EncoderTrainConfig(epochs=2, batch_size=32, lr=5e-3, warmup_steps=5), seed=1)
    models = {**bundle.models, "interest": InterestRetriever(second, np.ones(120, bool))}
    dataclasses.replace(bundle, models=models).write(other, manifest=planted.manifest())
    settings = CompressConfig(teachers=[other], student_layers=1.0, distil_epochs=6, distil_lr=3e-3, distil_share=1.0)
    student = distilled(bundle, data, settings, lambda text: None).models["interest"]
    assert student.encoder.config == bundle.models["interest"].encoder.config  # the price of one
    sequences = data.sequences()
    queries = sequences.queries_before(sequences.target_positions("test"))
    first, second_scores = bundle.models["interest"].scores(queries), models["interest"].scores(queries)
    mean = InterestRetriever(teacher_of(bundle, [other]), np.ones(120, bool)).scores(queries)
    np.testing.assert_allclose(mean, (first + second_scores) / 2, rtol=1e-4, atol=1e-4)
    wanted = log_softmax(mean)

    def divergence(scores):
        return (np.exp(wanted) * (wanted - log_softmax(scores))).sum(axis=1).mean()

    assert divergence(student.scores(queries)) < 0.7 * min(divergence(first), divergence(second_scores))
    with pytest.raises(ConfigError, match="no interest encoder"):
        without = {name: model for name, model in bundle.models.items() if name != "interest"}
        mixture = {"weights": {"covisit": 1.0, "popularity": 0.0001}, "temperatures": bundle.fusion["mixture"]["temperatures"]}
        fusion = {**bundle.fusion, "mixture": mixture}
        dataclasses.replace(bundle, models=without, fusion=fusion).write(str(tmp_path / "none"), manifest=planted.manifest())
        teacher_of(bundle, [str(tmp_path / "none")])
    with pytest.raises(ConfigError, match="interest.max_length 16"):
        longer = InterestEncoder(120, len(planted.EVENTS), dataclasses.replace(second.config, max_length=20))
        models = {**bundle.models, "interest": InterestRetriever(longer, np.ones(120, bool))}
        dataclasses.replace(bundle, models=models).write(str(tmp_path / "longer"), manifest=planted.manifest())
        teacher_of(bundle, [str(tmp_path / "longer")])


def test_thinned_histories_lose_other_events_in_every_epoch():
    data = planted.sequences()

    def pairs(epoch, share):
        (pool,) = Thinned(data, share).pools(Cut(max_length=16, batch_size=32, seed=3), epoch=epoch)
        batches = [batch for index in range(len(pool)) for batch in pool.batch(index, 120)]
        return {(int(a), int(b)) for batch in batches for a, b in zip(batch.items[batch.targets >= 0], batch.targets[batch.targets >= 0])}

    followed = {(int(a), int(b)) for a, b, same in zip(data.items, data.items[1:], data.rows[1:] == data.rows[:-1]) if same}
    assert pairs(1, 0.0) == followed
    assert not pairs(1, 0.4) <= followed, "what stood between them is gone"
    assert pairs(1, 0.4) == pairs(1, 0.4) != pairs(2, 0.4)
    (thin,), (whole,) = (list(Thinned(data, share).pools(Cut(max_length=16, batch_size=32, seed=3), epoch=1)) for share in (0.4, 0.0))
    assert 0.5 < thin.num_targets.sum() / whole.num_targets.sum() < 0.7


def test_a_step_that_costs_too_much_is_left_out(deep_bundle, prepared, tmp_path):
    settings = CompressConfig(steps=["prune", "quantize"], max_loss=0.0, neighbours=[1])
    bundle = Bundle.open(deep_bundle)
    mixture = bundle.fusion["mixture"]
    only = {**bundle.fusion, "mixture": {**mixture, "weights": {"covisit": 1.0, "popularity": 0.0001}}}
    models = {name: bundle.models[name] for name in ("covisit", "popularity")}
    source = str(tmp_path / "source")
    Bundle(bundle.items, models, only, bundle.histories).write(source, manifest=planted.manifest())
    report = compress(source, prepared, str(tmp_path / "out"), settings, say=lambda text: None)
    steps = {row["step"]: row for row in report["steps"]}
    assert not steps["1 entries a row"]["kept"] and steps["1 entries a row"]["ndcg@10_change"] < 0
    found = Bundle.open(str(tmp_path / "out")).models["covisit"].to_arrays()[0]
    assert len(found["indices"]) == len(models["covisit"].to_arrays()[0]["indices"])


def test_pruning_keeps_the_largest_of_each_row(deep_bundle):
    bundle = Bundle.open(deep_bundle)
    before, after = (one.models["covisit"].to_arrays()[0] for one in (bundle, pruned(bundle, 3)))
    for row in range(120):
        old, new = (arrays["counts"][arrays["indptr"][row] : arrays["indptr"][row + 1]] for arrays in (before, after))
        assert sorted(new) == sorted(np.sort(old)[::-1][:3])
    assert without_unused(bundle).fusion["mixture"]["weights"].keys() == {"interest", "content", "popularity"}


def test_wrong_calls_say_what_was_expected(deep_bundle, prepared, tmp_path, capsys):
    with pytest.raises(ConfigError, match="another folder"):
        compress(deep_bundle, prepared, deep_bundle, CompressConfig())
    seen = str(tmp_path / "seen")
    Bundle.open(deep_bundle).write(seen, manifest={**planted.manifest(), "fit": "train+valid"})
    with pytest.raises(ConfigError, match="fitted on train"):
        compress(seen, prepared, str(tmp_path / "out"), CompressConfig())
    with pytest.raises(ValueError, match="unused, weak, distil, shorten, narrow, prune, few, quantize"):
        CompressConfig(steps=["shrink"])
    code = cli.main(["compress", deep_bundle, "--prepared", prepared, "--out", str(tmp_path / "out"), "--max-loss", "much"])
    assert code != 0 and "--max-loss: expected a share" in capsys.readouterr().err
    assert not storage.exists(str(tmp_path / "out"))
