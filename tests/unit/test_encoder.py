"""Batches and training of the interest encoder, on histories that walk round a ring: item i is followed by i + 1."""

import dataclasses
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.models.interest import InterestConfig, InterestEncoder, InterestRetriever
from raysys.prepare.dataset import Sequences
from raysys.queries import Queries
from raysys.train.batches import batches, num_windows, windows
from raysys.train.encoder import EncoderTrainConfig, _Trainee, train_encoder

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
    return encoder, train_encoder(encoder, _ring(), training, seed=seed, **kwargs)


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
        assert len(start) == num_windows(sequences, max_length)


def test_targets_are_the_next_items_and_ranks_share_every_batch():
    sequences = _ring()

    def epoch(rank, world_size):
        return list(
            batches(sequences, max_length=6, batch_size=32, padding=N, rng=np.random.default_rng(3), rank=rank, world_size=world_size)
        )

    whole, parts = epoch(0, 1), [epoch(rank, 3) for rank in range(3)]
    assert sum(batch.num_targets for batch in whole) == (np.diff(sequences.indptr) - 1).sum()
    for number, batch in enumerate(whole):
        real = batch.targets >= 0
        assert real.sum() == batch.num_targets
        assert ((batch.items[real] + 1) % N == batch.targets[real]).all()
        assert (batch.items[~real] == N).all()
        shared = [part[number] for part in parts]
        assert {piece.num_targets for piece in shared} == {batch.num_targets}
        together = np.concatenate([piece.targets[piece.targets >= 0] for piece in shared])
        assert sorted(together) == sorted(batch.targets[real])


@pytest.mark.parametrize(
    "training, shape",
    [
        (TRAINING, SHAPE),
        (dataclasses.replace(TRAINING, loss="sampled", num_negatives=64), SHAPE),
        (dataclasses.replace(TRAINING, ema=0.9), dataclasses.replace(SHAPE, temperature=0.1)),
    ],
    ids=["softmax", "sampled", "average-and-cosine"],
)
def test_learns_which_item_follows(training, shape):
    encoder, result = _train(training, shape=shape)
    retriever = InterestRetriever.from_encoder(encoder, np.ones(N))
    histories = [[(item + step) % N for step in range(4)] for item in range(N)]
    best = retriever.scores(Queries.from_lists(histories)).argmax(axis=1)
    assert (best == (np.arange(N) + 4) % N).mean() > 0.9
    losses = [entry["loss"] for entry in result.history]
    assert losses[-1] < 0.5 * losses[0]


def test_same_seed_same_weights():
    first, again, other = _train()[0], _train()[0], _train(seed=1)[0]
    torch.testing.assert_close(_weights(first), _weights(again), rtol=0, atol=0)
    assert (_weights(first) - _weights(other)).abs().max() > 1e-3


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_resumed_training_ends_where_an_unbroken_one_does(ema, tmp_path):
    training = dataclasses.replace(TRAINING, epochs=5, ema=ema)
    figures = iter([0.1, 0.5, 0.2, 0.3, 0.4])
    whole, whole_result = _train(training, validate=lambda encoder: next(figures))

    class Killed(Exception):
        pass

    def save(state):
        torch.save(state, tmp_path / "state.pt")
        if len(state["history"]) == 3:
            raise Killed

    figures = iter([0.1, 0.5, 0.2, 0.3, 0.4])
    with pytest.raises(Killed):
        _train(training, validate=lambda encoder: next(figures), on_epoch=save)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed, result = _train(training, validate=lambda encoder: next(figures), resume=state)
    assert (result.best_epoch, result.best_validation) == (whole_result.best_epoch, whole_result.best_validation) == (2, 0.5)
    assert [entry["epoch"] for entry in result.history] == [1, 2, 3, 4, 5]
    torch.testing.assert_close(_weights(resumed), _weights(whole), rtol=0, atol=0)


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


def test_gradients_of_two_ranks_average_to_those_of_one():
    trainee = _Trainee(_encoder(dataclasses.replace(SHAPE, dropout=0.0)))

    def gradients(rank, world_size):
        rng = np.random.default_rng(0)
        batch = next(batches(_ring(), max_length=6, batch_size=33, padding=N, rng=rng, rank=rank, world_size=world_size))
        total = trainee(*(torch.from_numpy(array) for array in (batch.items, batch.events, batch.targets)), None)
        trainee.zero_grad()
        (total * (world_size / batch.num_targets)).backward()
        return torch.cat([parameter.grad.flatten() for parameter in trainee.parameters()])

    torch.testing.assert_close((gradients(0, 2) + gradients(1, 2)) / 2, gradients(0, 1), rtol=1e-2, atol=1e-4)


def _rank(rank, port, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    training = dataclasses.replace(TRAINING, epochs=2, batch_size=149)  # the last batch leaves nothing for one of the ranks
    encoder, result = _train(
        training,
        shape=dataclasses.replace(SHAPE, dropout=0.0, max_length=20),
        rank=rank,
        world_size=2,
        wrap=torch.nn.parallel.DistributedDataParallel,
        validate=lambda encoder: float(rank),
    )
    torch.save((_weights(encoder), result.best_validation), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, str(tmp_path)), nprocs=2)
    training = dataclasses.replace(TRAINING, epochs=2, batch_size=149)
    alone, _ = _train(training, shape=dataclasses.replace(SHAPE, dropout=0.0, max_length=20), validate=lambda encoder: 0.0)
    for rank in range(2):
        weights, figure = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert figure == 0.0  # rank 0 decides for all
        torch.testing.assert_close(weights, _weights(alone), rtol=1e-2, atol=1e-3)
