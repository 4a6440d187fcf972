"""Two processes against one: the same losses, weights and checkpoints, with the item table whole or cut by rows."""

import dataclasses
import json
import os
import socket

import numpy as np
import pytest
import torch

from raysys.errors import SchemaError
from raysys.models.interest import InterestConfig, InterestEncoder, initial_rows
from raysys.train.batches import InMemory
from raysys.train.checkpoint import read_rows, read_state, write_rows, write_state
from raysys.train.encoder import EncoderTrainConfig, TrainState, train_encoder
from raysys.train.parallel import Parallel
from raysys.train.table import ShardedTable, gathered
from tests.unit.test_encoder import N, _ring

SHAPE = InterestConfig(dim=16, num_layers=1, num_heads=1, max_length=20, dropout=0.0, ffn_multiplier=1, temperature=0.1)
# The last batch of an epoch has one window, which leaves nothing for one of two ranks.
TRAINING = EncoderTrainConfig(epochs=2, batch_size=149, lr=1e-2, warmup_steps=2, ema=0.9, validate_every=1, precision="float32")
SAMPLED = dataclasses.replace(TRAINING, loss="sampled", num_negatives=8, batch_size=32)
CASES = {
    "ddp": (TRAINING, {}),
    "ddp-sampled": (SAMPLED, {}),
    "rows": (TRAINING, {"shard_items": True}),
    "rows-accumulated": (dataclasses.replace(TRAINING, accumulate=2), {"shard_items": True}),
    "rows-sampled": (SAMPLED, {"shard_items": True}),
    "rows-sampled-adagrad": (dataclasses.replace(SAMPLED, table_optimizer="rowwise_adagrad"), {"shard_items": True}),
    "rows-sampled-lazy": (dataclasses.replace(SAMPLED, table_optimizer="lazy_adamw"), {"shard_items": True}),
    "fsdp-rows": (TRAINING, {"shard_items": True, "strategy": "fsdp"}),
}
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
"""Float additions in another order, through AdamW: what sets apart N ranks with B/N sequences from one with B."""


def encoder_of(parallel):
    torch.manual_seed(0)
    table = (lambda seed: ShardedTable(N, SHAPE.dim, seed, parallel)) if parallel.shard_items and parallel.world_size > 1 else None
    return InterestEncoder(N, 2, SHAPE, table)


def train(training, parallel, *, checkpoint=None, resume=None, stop_at=None):
    """Losses, and the whole table and the transformer (None off rank 0); a checkpoint is written after step `stop_at`."""

    class Stopped(Exception):
        pass

    def save(state):
        if state.progress["step"] == stop_at:
            if parallel.rank == 0:
                write_state(checkpoint, state.progress, state.dense)
            if parallel.rank == 0 or parallel.shard_items:
                write_rows(checkpoint, state.rows, state.first, state.stop)
            raise Stopped

    encoder = encoder_of(parallel)
    saved = None
    if resume is not None:
        first, stop = parallel.rows(N)
        saved = TrainState(*read_state(resume), read_rows(resume, first, stop), first, stop)
    options = {"parallel": parallel, "seed": 0, "on_checkpoint": save, "validate": lambda encoder: float(parallel.rank)}
    try:
        result = train_encoder(encoder, InMemory(_ring()), training, resume=saved, **options)
    except Stopped:
        if parallel.world_size > 1:
            torch.distributed.barrier()
        return None
    table = gathered(encoder.items.weight.detach(), N, parallel)
    dense = {name: tensor for name, tensor in encoder.state_dict().items() if name != "items.weight"}
    dense = {name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in dense.items()}
    assert result.best_validation == 0.0, "rank 0 decides for all"
    return [entry["loss"] for entry in result.history], None if table is None else table[:N], dense


def two_ranks(rank, port, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name, (training, options) in CASES.items():
        parallel = Parallel(rank, 2, **options)
        found = train(training, parallel)
        if rank == 0:
            torch.save(found, f"{folder}/{name}.pt")
        if "rows" in name:  # 1 -> 2 -> 1: goes on from one worker, and leaves a checkpoint for one worker
            often = dataclasses.replace(training, checkpoint_steps=1)
            train(often, parallel, resume=f"{folder}/{name}-of-1", checkpoint=f"{folder}/{name}-of-2", stop_at=3)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ranks"))
    for name, (training, options) in CASES.items():
        if "rows" in name:
            often = dataclasses.replace(training, checkpoint_steps=1)
            alone = Parallel(**options)
            train(often, alone, checkpoint=f"{folder}/{name}-of-1", stop_at=1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(two_ranks, (port, folder), nprocs=2)
    return folder


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-3)
    torch.testing.assert_close(found[1], expected[1], **CLOSE)
    for name, tensor in expected[2].items():
        torch.testing.assert_close(found[2][name], tensor, **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_with_half_a_batch_train_as_one(folder, name):
    found = torch.load(f"{folder}/{name}.pt", weights_only=True)
    expected = train(CASES[name][0], Parallel())
    assert expected[0][1] < expected[0][0], "it learns at all"
    assert_same(found, expected)


@pytest.mark.parametrize("name", [name for name in CASES if "rows" in name])
def test_one_two_one_workers_go_on_where_the_others_stopped(folder, name):
    files = sorted(file for file in os.listdir(f"{folder}/{name}-of-2") if file.startswith("rows-"))
    assert len(files) == 2, "each of the two wrote its rows"
    expected = train(CASES[name][0], Parallel())
    assert_same(train(CASES[name][0], Parallel(), resume=f"{folder}/{name}-of-2"), expected)


def test_rows_start_the_same_however_they_are_cut():
    whole = initial_rows(0, 20_000, 3, seed=5)
    parts = [initial_rows(*Parallel(rank, 3, shard_items=True).rows(20_000), 3, seed=5) for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole) and whole.std() == pytest.approx(0.02, rel=0.1)


def test_missing_rows_are_named(tmp_path):
    write_rows(str(tmp_path), {"items": torch.arange(8.0).reshape(4, 2)}, 0, 4)
    write_rows(str(tmp_path), {"items": torch.arange(8.0, 12.0).reshape(2, 2)}, 4, 6)
    assert read_rows(str(tmp_path), 3, 5)["items"].tolist() == [[6.0, 7.0], [8.0, 9.0]]
    with pytest.raises(SchemaError, match="expected rows 3 to 9 of the item table, found 3"):
        read_rows(str(tmp_path), 3, 9)
    write_state(str(tmp_path), {"step": 3}, {"a": torch.ones(2)})
    assert json.dumps(read_state(str(tmp_path))[0]) == '{"step": 3}'
    assert np.array_equal(read_state(str(tmp_path))[1]["a"], [1, 1])
