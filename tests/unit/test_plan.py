"""`raysys plan`: counts by hand, monotone answers, and one clear line for what cannot be."""

import dataclasses
import json

import pytest
import torch

from raysys.cli import main
from raysys.errors import ConfigError
from raysys.models.interest import InterestConfig, InterestEncoder
from raysys.plan import counts
from raysys.plan.serving import plan_batch, plan_prepare, plan_serving
from raysys.plan.training import plan_training, training_on
from raysys.plan.workload import Constants, NodeType, Workload, load_nodes, node_type, parse_count

NODE = NodeType(
    "toy.2gpu",
    cpus=8,
    memory_bytes=64e9,
    network_bytes_s=2e9,
    source="a test",
    accelerators=2,
    accelerator="toy",
    accelerator_bytes=10e9,
    accelerator_flops=100e12,
    accelerator_bytes_s=1000e9,
    link_bytes_s=50e9,
)
CPU = NodeType("toy.cpu", cpus=8, memory_bytes=64e9, network_bytes_s=1e9, source="a test")
CONSTANTS = Constants(
    date="2026-01-01",
    commit="none",
    machine="a test",
    cores=2,
    gemm_flops=100e9,
    loss_gemm_flops=200e9,
    stream_bytes_s=20e9,
    prepare_s=10.0,
    prepare_s_event=1e-6,
    raw_bytes_event=10.0,
    prepared_bytes_event=8.0,
    step_s=1e-3,
    encoder_s_flop=1 / 50e9,  # half of the peak
    loss_s_flop=1 / 100e9,  # half of the peak
    sampled_s_flop=1 / 100e9,  # half of the peak
    table_s_byte=1 / 10e9,  # half of the bandwidth
    batch_s_user=1e-4,
    batch_s_flop=1 / 25e9,  # a quarter of the peak
    request_s=2e-3,
    request_s_byte=1 / 10e9,
    tail=2.0,
    checks=[],
)
WORK = Workload(users=1_000_000, items=100_000, events=21_000_000, dim=64, layers=2, max_length=50, dtype="bfloat16", epoch_hours=10)


def test_flops_of_the_encoder_are_those_of_its_matrices():
    """f = 1, D = 64: 12 D^2 = 49,152 flops x 2 per multiply-add / 2, and torch's own counter agrees on a real encoder."""
    assert counts.encoder_flops(64, 1, 0, 1) == 12 * 64**2
    from torch.utils.flop_counter import FlopCounterMode

    encoder = InterestEncoder(100, 2, InterestConfig(dim=32, num_layers=3, ffn_multiplier=2, dropout=0.0)).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        encoder(*(torch.ones(5, 20, dtype=torch.long) for _ in range(4)))
    products = counter.get_total_flops() - 3 * 2 * 2 * 5 * 20 * 20 * 32  # without attention, which the counter takes as not causal
    assert products == 5 * 20 * counts.encoder_flops(32, 3, 0, 2)


def test_parameters_are_those_of_the_encoder():
    config = InterestConfig(dim=32, num_layers=3, ffn_multiplier=2, max_length=40)
    encoder = InterestEncoder(100, 2, config)
    found = sum(parameter.numel() for parameter in encoder.parameters()) - encoder.items.weight.numel()
    assert counts.block_parameters(32, 3, 40, 2) == pytest.approx(found, abs=2 * 32)  # the last norm is left out


def test_windows_and_positions():
    """A million users of 21 events: 20 targets each, in one window; 101 events are two windows of 50."""
    assert counts.epoch_of(10, 21, 50) == counts.Epoch(10, 200)
    assert counts.epoch_of(10, 101, 50) == counts.Epoch(20, 1000)


def test_bytes_by_hand():
    """N = 1000, D = 64 in float32 under AdamW: 256,000 bytes of parameters, as much gradient, twice as much state."""
    state = counts.table_state_bytes(1000, 64, "float32", "adamw", dense_gradient=True, rows=10)
    assert state == {"parameters": 256_000, "running average and best": 512_000, "gradients": 256_000, "optimizer state": 512_000}
    sparse = counts.table_state_bytes(1000, 64, "bfloat16", "rowwise-adagrad", dense_gradient=False, rows=10)
    assert sparse == {"parameters": 128_000, "running average and best": 256_000, "gradients": 2560, "optimizer state": 4000}
    assert counts.all_reduce_bytes(100, 4) == 150 and counts.all_reduce_bytes(100, 1) == 0
    assert counts.all_to_all_bytes(10, 64, 4, "float32") == 2 * 10 * 64 * 4 * 3 / 4


def test_seconds_of_a_step_by_hand():
    """One worker on CPU: 256 windows of 20 positions; loss over 1025 columns at 8 / 2 x 100 Gflop/s."""
    plan = training_on(WORK, CPU, CONSTANTS, 1)
    assert plan.steps == 1_000_000 / 256 and not plan.sharded
    assert plan.seconds["loss"] == pytest.approx(3 * 256 * 20 * 2 * 64 * 1025 / 400e9)
    assert plan.seconds["encoder"] == pytest.approx(3 * 256 * 20 * 2 * (12 * 64**2 + 2 * 20 * 64) / 200e9)
    assert plan.seconds["table"] == pytest.approx(100_000 * 64 * 20 * 4 / 40e9)
    assert plan.seconds["input"] == pytest.approx(256 * 20 * 8 / 0.7e9)
    assert plan.seconds["network"] == 0 and plan.seconds["fixed"] == 1e-3
    assert plan.hours == pytest.approx(plan.steps * sum(plan.seconds.values()) / 3600)


def test_a_worker_on_an_accelerator_has_the_measured_share_of_its_peak():
    plan = training_on(WORK, NODE, CONSTANTS, 1)
    assert plan.workers == 2
    assert plan.seconds["loss"] == pytest.approx(3 * 256 * 20 * 2 * 64 * 1025 / 50e12)
    assert plan.seconds["table"] == pytest.approx(100_000 * 64 * 20 * 4 / 500e9)
    assert plan.network["table gradient, all-reduce"] == 100_000 * 64 * 4
    assert plan.seconds["network"] == pytest.approx(sum(plan.network.values()) / (50e9 * 0.7))
    exact = training_on(dataclasses.replace(WORK, dtype="float32"), NODE, CONSTANTS, 1)
    assert exact.seconds["encoder"] == pytest.approx(2 * plan.seconds["encoder"])


def test_a_table_larger_than_a_worker_is_sharded_over_enough_of_them():
    """400M rows x 64 in GB: 51.2 of bfloat16, twice that for average and best, 102.4 gradient, 204.8 AdamW; over workers of 8 usable."""
    work = dataclasses.replace(WORK, items=400_000_000, epoch_hours=1000)
    plan = plan_training(work, NODE, CONSTANTS)
    table = sum(size for name, size in plan.memory.items() if name.startswith("table"))
    assert plan.sharded and table * plan.workers == pytest.approx(460.8e9)
    assert plan.memory_bytes <= 8e9 < training_on(work, NODE, CONSTANTS, plan.nodes - 1).memory_bytes


def test_a_shorter_epoch_takes_more_nodes_and_an_impossible_one_says_so():
    few = plan_training(dataclasses.replace(WORK, epoch_hours=0.01), NODE, CONSTANTS)
    more = plan_training(dataclasses.replace(WORK, epoch_hours=0.001), NODE, CONSTANTS)
    assert few.nodes < more.nodes and few.hours <= 0.01 and more.hours <= 0.001
    with pytest.raises(ConfigError, match=r"toy.2gpu: an epoch within 1e-09 h is out of reach; the shortest is"):
        plan_training(dataclasses.replace(WORK, epoch_hours=1e-9), NODE, CONSTANTS)
    with pytest.raises(ConfigError, match="expected at most 8 GB a worker"):
        plan_training(dataclasses.replace(WORK, batch_size=10_000_000), NODE, CONSTANTS)


def test_prepare_and_batch_by_hand():
    """10^9 events x 2 core-microseconds on 6.4 useful cores: 312.5 s on one node; within 120 s (110 after the start) on three."""
    work = dataclasses.replace(WORK, events=10**9, prepare_hours=1.0)
    assert plan_prepare(work, CPU, CONSTANTS).hours == pytest.approx(322.5 / 3600)
    assert plan_prepare(dataclasses.replace(work, prepare_hours=120 / 3600), CPU, CONSTANTS).nodes == 3
    flops = 2 * 64 * 100_000
    assert plan_batch(WORK, CPU, CONSTANTS).hours == pytest.approx(1e6 * (1e-4 + flops / 25e9) * 2 / 8 / 0.8 / 3600)


def test_replicas_by_hand():
    """25.6 MB at 10 GB/s and 2 ms: 4.56 ms; tail 2, p99 50 ms: u = 0.8176; 1000 requests a second need 5.58 replicas."""
    work = dataclasses.replace(WORK, qps=1000)
    plan = plan_serving(work, CPU, CONSTANTS, dense=True)
    assert plan.service_s == pytest.approx(4.56e-3) and plan.utilisation == pytest.approx(0.8176)
    assert (plan.replicas, plan.nodes, plan.memory_bytes) == (6, 2, 25.6e6)
    late = plan_serving(dataclasses.replace(work, items=100_000_000), CPU, CONSTANTS, dense=True)
    assert late.replicas is None and late.nodes is None
    index = plan_serving(dataclasses.replace(work, items=100_000_000), CPU, CONSTANTS, dense=False)
    assert index.replicas == 3 and index.memory_bytes == 72 * 100_000_000


@pytest.mark.parametrize("text, number", [("10B", 10**10), ("1.5M", 1_500_000), ("20k", 20_000), ("7", 7), ("1_000", 1000)])
def test_numbers_as_people_write_them(text, number):
    assert parse_count(text) == number


@pytest.mark.parametrize("text", ["", "B", "ten", "-5", "0", "nan", "inf", "1e999"])
def test_what_is_no_number(text):
    with pytest.raises(ConfigError, match="expected a positive number such as"):
        parse_count(text)


def test_node_types_are_complete_and_the_nearest_name_is_told():
    nodes = load_nodes()
    assert {"p5.48xlarge", "g5.48xlarge", "m6i.32xlarge"} <= set(nodes)
    assert all(node.source for node in nodes.values())
    with pytest.raises(ConfigError, match="did you mean 'p5.48xlarge'"):
        node_type(nodes, "p5.48xlrge")


def test_a_wrong_node_table(tmp_path):
    path = tmp_path / "nodes.yaml"
    path.write_text("mine:\n  cpus: 4\n  memory_bytes: 1.0e9\n  network_bytes_s: 1.0e9\n  source: me\n  accelerators: 1\n")
    with pytest.raises(ConfigError, match="mine: expected accelerator_bytes above 0"):
        load_nodes(str(path))


ARGUMENTS = ["plan", "--users", "1M", "--items", "100k", "--events", "20M", "--node", "p5.48xlarge"]


def test_the_command_writes_every_figure_with_its_formula(tmp_path, capsys):
    assert main([*ARGUMENTS, "g5.48xlarge", "--out", str(tmp_path / "plan.json")]) == 0
    plans = json.loads((tmp_path / "plan.json").read_text())
    assert list(plans) == ["p5.48xlarge", "g5.48xlarge"]
    assert len(plans["p5.48xlarge"]["figures"]) > 25
    assert [figure["name"] for plan in plans.values() for figure in plan["figures"] if not figure["formula"]] == []
    assert "train: hours an epoch" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([*ARGUMENTS[:-1], "p5.48xl"], "did you mean 'p5.48xlarge'"),
        ([*ARGUMENTS, "--set", "los=full"], "unknown setting 'los'; did you mean 'loss'?"),
        ([*ARGUMENTS, "--set", "loss=full"], "loss: expected one of 'softmax', 'sampled', got 'full'"),
        ([*ARGUMENTS, "--set", "qps=-1"], "qps: expected more than 0"),
        ([*ARGUMENTS, "--users", "21M"], "events: expected at least one a user"),
        ([*ARGUMENTS, "--items", "many"], "expected a positive number such as"),
        ([*ARGUMENTS, "--constants", "nowhere.json"], "expected the constants that benchmarks/scale/calibrate.py writes"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
