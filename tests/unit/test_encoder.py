"""Batches and training of the interest encoder, on histories that walk round a ring: item i is followed by i + 1."""

import dataclasses
import json
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.models.interest import InterestConfig, InterestEncoder, InterestRetriever
from raysys.prepare.dataset import Sequences
from raysys.queries import Queries
from raysys.train.batches import Cut, InMemory, cut_pool, num_windows, windows
from raysys.train.encoder import EncoderTrainConfig, EncoderTraining, TrainState, seen_before, train_encoder

N = 20
SHAPE = InterestConfig(dim=16, num_layers=1, num_heads=1, max_length=6, dropout=0.1, ffn_multiplier=1, temperature=0.0)
TRAINING = EncoderTrainConfig(validate_every=1, ema=0.0, weight_decay=0.0, epochs=8, batch_size=32, lr=1e-2, warmup_steps=5)


def _sequences(histories):
    lengths = np.array([len(history) for history in histories])
    items = np.array([item for history in histories for item in history], np.int32)
    E = len(items)
    return Sequences(
        user_idx=np.arange(len(histories), dtype=np.int32),
        indptr=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=items,
        events=np.ones(E, np.int8),
        times=np.arange(E),
        values=np.full(E, np.nan, np.float32),
        positive=np.ones(E, bool),
        split=np.zeros(E, np.int8),
    )


def _ring(num_users=150, seed=0):
    rng = np.random.default_rng(seed)
    return _sequences([((rng.integers(N) + np.arange(rng.integers(2, 15))) % N).tolist() for _ in range(num_users)])


def _encoder(shape=SHAPE):
    torch.manual_seed(0)
    return InterestEncoder(N, 2, shape)


def _weights(encoder):
    return torch.cat([parameter.detach().flatten() for parameter in encoder.parameters()])


def _train(training=TRAINING, *, shape=SHAPE, seed=0, **kwargs):
    encoder = _encoder(shape)
    return encoder, train_encoder(encoder, InMemory(_ring()), training, seed=seed, item_counts=np.ones(N), **kwargs)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=20), st.integers(1, 9), st.integers(0, 5))
@settings(deadline=None, max_examples=100)
def test_windows_hold_every_next_item_once(lengths, max_length, seed):
    sequences = _sequences([list(range(length)) for length in lengths])
    start, stop = windows(sequences, max_length, np.random.default_rng(seed))
    assert ((stop - start >= 2) & (stop - start <= max_length + 1)).all()
    targets = [position for a, b in zip(start, stop) for position in range(a + 1, b)]
    first = set(sequences.indptr[:-1].tolist())
    assert sorted(targets) == [position for position in range(len(sequences.items)) if position not in first]
    if max(lengths) <= max_length:
        assert len(start) == num_windows(np.array(lengths), max_length)


def test_what_a_position_has_seen_by_hand():
    """Two windows of three and of two inputs; the first has no target at its last one. Later inputs are replaced by the first."""
    items = torch.tensor([[4, 5, 6], [7, 8, N]])
    real = torch.tensor([[True, True, False], [True, True, False]])
    seen = seen_before(items, real)
    assert seen(slice(0, 4)).tolist() == [[4, 4, 4], [4, 5, 4], [7, 7, 7], [7, 8, 7]]
    assert seen(slice(1, 2)).tolist() == [[4, 5, 4]]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_targets_are_the_next_items_and_ranks_share_every_batch(accumulate):
    def epoch(rank, world_size):
        rng = np.random.default_rng(3)
        return cut_pool(_ring(), Cut(max_length=6, batch_size=32, rank=rank, world_size=world_size), rng)

    whole, shares = epoch(0, 1), [epoch(rank, 3).compact() for rank in range(3)]
    assert whole.num_targets.sum() == (np.diff(_ring().indptr) - 1).sum()
    for number in range(len(whole)):
        (batch,) = whole.batch(number, N)
        real = batch.targets >= 0
        assert real.sum() == whole.num_targets[number]
        assert ((batch.items[real] + 1) % N == batch.targets[real]).all()
        assert (batch.items[~real] == N).all()
        assert {share.num_targets[number] for share in shares} == {whole.num_targets[number]}
        pieces = [piece for share in shares for piece in share.batch(number, N, accumulate)]
        assert len(pieces) == 3 * accumulate
        assert sorted(np.concatenate([piece.targets[piece.targets >= 0] for piece in pieces])) == sorted(batch.targets[real])


def test_short_histories_are_repeated_in_the_room_that_long_ones_need():
    """Of [0, 1, 2] there are two inputs: in rows of eight one to three copies fit; of [5, 6, ..., 13] one."""
    sequences = _sequences([[0, 1, 2], [5, 6, 7, 8, 9, 10, 11, 12, 13]])
    found = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        pool = cut_pool(sequences, Cut(max_length=8, batch_size=2, repeat_short=True), rng)
        (batch,) = pool.batch(0, N)
        short = int(np.flatnonzero(batch.items[:, 0] == 0)[0])
        copies = pool.copies[short]
        found.add(int(copies))
        items, targets = [0, 1, N] * copies, [1, 2, -1] * copies
        room = [N] * (8 - 3 * copies + 1)
        assert batch.items[short].tolist() == (items[:-1] + room)[: batch.items.shape[1]]
        assert batch.targets[short].tolist() == (targets[:-1] + [-1] * len(room))[: batch.items.shape[1]]
        assert batch.items[1 - short].tolist() == list(range(5, 13))
        assert pool.num_targets.tolist() == [2 * copies + 8] and (batch.targets >= 0).sum() == 2 * copies + 8
        (again,) = pool.compact().batch(0, N)
        np.testing.assert_array_equal(again.items, batch.items)
    assert found == {1, 2, 3}


@pytest.mark.parametrize(
    "training, shape",
    [
        (TRAINING, SHAPE),
        (dataclasses.replace(TRAINING, loss="sampled", num_negatives=64), SHAPE),
        (dataclasses.replace(TRAINING, ema=0.9), dataclasses.replace(SHAPE, temperature=0.1)),
        (TRAINING, dataclasses.replace(SHAPE, gated=True, positions="rotary", exclude_seen=True, time_gaps=True, recency=True)),
        (dataclasses.replace(TRAINING, loss="sampled", num_negatives=64, negatives="mixed"), SHAPE),
        (dataclasses.replace(TRAINING, loss="gbce", num_negatives=8, epochs=20, lr=3e-2), SHAPE),
        (dataclasses.replace(TRAINING, repeat_short=True), dataclasses.replace(SHAPE, max_length=12)),
    ],
    ids=["softmax", "sampled", "average-and-cosine", "unseen-gated-rotary-gaps", "mixed-negatives", "gbce", "repeated"],
)
def test_learns_which_item_follows(training, shape):
    encoder, result = _train(training, shape=shape)
    retriever = InterestRetriever.from_encoder(encoder, np.ones(N))
    histories = [[(item + step) % N for step in range(4)] for item in range(N)]
    best = retriever.scores(Queries.from_lists(histories)).argmax(axis=1)
    assert (best == (np.arange(N) + 4) % N).mean() > 0.9
    losses = [entry["loss"] for entry in result.history]
    assert losses[-1] < 0.5 * losses[0]


def test_what_follows_after_a_pause_is_asked_for_by_the_time_of_asking():
    """At once i is followed by i + 1, after a day by i + 5: only the wait says which."""
    rng = np.random.default_rng(0)
    pauses = [rng.random(10) < 0.5 for _ in range(300)]
    histories = [((rng.integers(N) + np.concatenate([[0], np.cumsum(np.where(pause, 5, 1))])) % N).tolist() for pause in pauses]
    times = np.concatenate([np.concatenate([[0], np.cumsum(np.where(pause, 86_400, 60))]) for pause in pauses])
    encoder = _encoder(dataclasses.replace(SHAPE, recency=True))
    train_encoder(encoder, InMemory(dataclasses.replace(_sequences(histories), times=times)), TRAINING, seed=0)
    retriever = InterestRetriever.from_encoder(encoder, np.ones(N))
    for wait, step in ((60, 1), (86_400, 5)):
        asked = Queries.from_lists([[item] for item in range(N)], times=[[1000]] * N, now=[1000 + wait] * N)
        assert (retriever.scores(asked).argmax(axis=1) == (np.arange(N) + step) % N).mean() > 0.9


def test_same_seed_same_weights():
    first, again, other = _train()[0], _train()[0], _train(seed=1)[0]
    torch.testing.assert_close(_weights(first), _weights(again), rtol=0, atol=0)
    assert (_weights(first) - _weights(other)).abs().max() > 1e-3


class Killed(Exception):
    pass


def _copied(state: TrainState) -> TrainState:
    tensors = ({name: tensor.clone() for name, tensor in part.items()} for part in (state.dense, state.rows))
    return TrainState(json.loads(json.dumps(state.progress)), *tensors, state.first, state.stop)


@pytest.mark.parametrize("table", ["adamw", "lazy_adamw", "rowwise_adagrad"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("at", [3, 8, 17], ids=["in-the-first-epoch", "in-the-second", "in-the-fourth"])
def test_resumed_training_ends_where_an_unbroken_one_does(at, ema, table):
    training = dataclasses.replace(
        TRAINING, epochs=5, ema=ema, checkpoint_steps=1, loss="sampled", num_negatives=8, table_optimizer=table, dropout_epochs=2
    )

    def figure(encoder):
        return float(encoder.items.weight.detach()[:N].abs().sum().sin())

    whole, whole_result = _train(training, validate=figure)
    saved = []

    def save(state):
        saved.append(_copied(state))
        if len(saved) == at:
            raise Killed

    with pytest.raises(Killed):
        _train(training, validate=figure, on_checkpoint=save)
    resumed, result = _train(training, validate=figure, resume=saved[-1])
    assert (result.best_epoch, result.best_validation) == (whole_result.best_epoch, whole_result.best_validation)
    assert [entry["loss"] for entry in result.history] == [entry["loss"] for entry in whole_result.history]
    torch.testing.assert_close(_weights(resumed), _weights(whole), rtol=0, atol=0)


def test_dropout_rises_to_its_value_over_the_first_epochs():
    encoder, seen = _encoder(), []
    training = dataclasses.replace(TRAINING, epochs=4, dropout_epochs=2, patience=9)
    EncoderTraining(encoder, InMemory(_ring()), training, seed=0, on_epoch=lambda entry: seen.append(encoder.blocks[0].dropout.p)).run()
    full = encoder.config.dropout
    assert full > 0 and seen == pytest.approx([full / 3, 2 * full / 3, full, full])
    with pytest.raises(ValueError, match="dropout_epochs"):
        dataclasses.replace(TRAINING, dropout_epochs=-1)


def test_accumulated_gradients_take_the_same_steps():
    still = dataclasses.replace(SHAPE, dropout=0.0)
    expected, result = _train(dataclasses.replace(TRAINING, epochs=3), shape=still)
    found, parts = _train(dataclasses.replace(TRAINING, epochs=3, accumulate=4), shape=still)
    assert [entry["loss"] for entry in parts.history] == pytest.approx([entry["loss"] for entry in result.history], rel=1e-3)
    torch.testing.assert_close(_weights(found), _weights(expected), rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize("table", ["lazy_adamw", "rowwise_adagrad"])
def test_average_of_rows_that_a_step_does_not_touch_is_exact(table):
    """The same training with a dense gradient, which averages every row at every step."""
    training = dataclasses.replace(TRAINING, epochs=2, ema=0.9, loss="sampled", num_negatives=2, batch_size=4, table_optimizer=table)
    lazily, _ = _train(training)
    encoder = _encoder()
    by_hand = EncoderTraining(encoder, InMemory(_ring()), training, seed=0)
    by_hand.average.before_step = lambda rows: None
    after = by_hand.average.after_step
    by_hand.average.after_step = lambda step, rows: after(step, None)
    by_hand.run()
    torch.testing.assert_close(_weights(lazily), _weights(encoder), rtol=1e-4, atol=1e-6)


def test_stops_without_progress_and_keeps_the_best_epoch():
    seen = []

    def validate(encoder):
        seen.append(_weights(encoder).clone())
        return [0.1, 0.3, 0.2, 0.25, 0.9][len(seen) - 1]

    encoder, result = _train(dataclasses.replace(TRAINING, patience=2), validate=validate)
    assert len(result.history) == 4 and result.best_epoch == 2 and result.best_validation == 0.3
    torch.testing.assert_close(_weights(encoder), seen[1], rtol=0, atol=0)


def test_a_deadline_ends_training_after_one_epoch():
    _, result = _train(deadline=time.time() - 1)
    assert len(result.history) == 1 and result.best_epoch == 1
