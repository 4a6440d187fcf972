"""Id dropout: who stands in for whom, and what an encoder that learns with it makes of items that nobody has chosen."""

import dataclasses

import numpy as np
import pytest
import torch

from raysys.models.interest import InterestConfig, InterestEncoder, InterestRetriever
from raysys.models.newcomers import placed
from raysys.queries import Queries
from raysys.train.batches import InMemory
from raysys.train.encoder import EncoderTrainConfig, train_encoder
from raysys.train.id_dropout import StandIns
from tests.histories import sequences

CONTENT = np.array([[1, 0], [0.8, 0.6], [0, 1], [0.6, 0.8], [1, 0], [0, 0]], np.float32)
KNOWN = np.array([True, True, True, True, False, True])


def _encoder(**shape) -> InterestEncoder:
    torch.manual_seed(0)
    return InterestEncoder(6, 2, InterestConfig(dim=8, num_layers=1, num_heads=1, max_length=4, dropout=0.0, **shape))


def test_nobody_stands_in_for_himself_for_an_unknown_item_or_without_content():
    stand_ins = StandIns(CONTENT, KNOWN)
    assert stand_ins.items.tolist() == [0, 1, 2, 3]
    of_first = dict(zip(stand_ins.rows[0].tolist(), stand_ins.weights[0].tolist(), strict=True))
    assert {item for item, weight in of_first.items() if weight > 0} == {1, 3}, "4 is the same but unknown, 2 and 5 share nothing"
    assert of_first[1] == pytest.approx(0.8 / 1.4) and of_first[3] == pytest.approx(0.6 / 1.4)


@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_what_stands_in_is_what_an_unchosen_item_gets(temperature):
    """All items stood in for at once: the same rows as `placed` gives to each of them, were it the only one without events."""
    encoder = _encoder(temperature=temperature)
    table = StandIns(CONTENT, KNOWN).table(encoder, 1.0)
    for item in range(4):
        warm = KNOWN.copy()
        warm[item] = False
        alone = placed(InterestRetriever(encoder, warm), CONTENT).encoder.items.weight[item]
        torch.testing.assert_close(torch.nn.functional.normalize(table[item], dim=0), torch.nn.functional.normalize(alone, dim=0))
    torch.testing.assert_close(table[4:], encoder.items.weight[4:], rtol=0, atol=0)
    torch.testing.assert_close(StandIns(CONTENT, KNOWN).table(encoder, 0.0), encoder.items.weight, rtol=0, atol=0)


def test_gradients_reach_those_who_stand_in():
    encoder = _encoder()
    StandIns(CONTENT, np.array([True, True, False, False, False, False])).table(encoder, 1.0)[0].sum().backward()
    moved = encoder.items.weight.grad.abs().sum(dim=1) > 0
    assert moved.tolist() == [False, True, False, False, False, False, False]


def test_settings_that_cannot_be():
    for wrong in ({"id_dropout": 1.0}, {"id_dropout": 0.1, "loss": "sampled"}):
        with pytest.raises(ValueError, match="id_dropout"):
            EncoderTrainConfig(**wrong)


def test_an_encoder_that_drops_ids_still_learns_and_learns_something_else():
    """A ring of twins: item i is followed by i + 2, and twins 2k and 2k + 1 share their content."""
    rng = np.random.default_rng(0)
    histories = [((rng.integers(20) + 2 * np.arange(rng.integers(2, 10))) % 20).tolist() for _ in range(150)]
    content = np.repeat(np.eye(10, dtype=np.float32), 2, axis=0)
    settings = EncoderTrainConfig(epochs=20, batch_size=32, lr=1e-2, warmup_steps=5, ema=0.0, weight_decay=0.0)
    ranks = {}
    for share in (0.0, 0.3):
        torch.manual_seed(0)
        encoder = InterestEncoder(20, 2, InterestConfig(dim=16, num_layers=1, num_heads=1, max_length=6, dropout=0.1, temperature=0.1))
        train_encoder(
            encoder,
            InMemory(sequences(histories)),
            dataclasses.replace(settings, id_dropout=share),
            seed=0,
            stand_ins=StandIns(content, np.ones(20, bool)),
        )
        scores = InterestRetriever.from_encoder(encoder, np.ones(20)).scores(Queries.from_lists([[item] for item in range(20)]))
        right = (np.arange(20) + 2) % 20
        of_right, of_twin = ((scores > scores[np.arange(20), items][:, None]).sum(axis=1) for items in (right, right ^ 1))
        assert (of_right <= 1).mean() > 0.9
        ranks[share] = of_twin.mean()
    assert ranks[0.3] < ranks[0.0] / 2, "what a twin is followed by says something about the other one"
