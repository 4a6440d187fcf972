"""Nodes, memory, network and hours of training, from counts, measured efficiencies and a node's datasheet.

Legend: W workers, B sequences a worker and step, L mean inputs a window, N items, D width, S negatives.
"""

from dataclasses import dataclass

from raysys.errors import ConfigError
from raysys.plan import counts
from raysys.plan.workload import Constants, NodeType, Workload

USABLE = 0.8
"""Share of a worker's memory to plan with; the rest is the runtime's, fragments and the unforeseen. Assumed."""
NETWORK_EFFICIENCY = 0.7
"""Share of a link's datasheet figure that collectives reach. Assumed: there is no network in the calibration."""
FLOAT32_PEAK = 0.5
"""Float32 on an accelerator runs as TF32, at half the peak of bfloat16 (datasheets of Ampere, Ada, Hopper)."""
SOFTMAX_CHUNK, SOFTMAX_CHUNK_GPU = 512, 4096
"""Positions whose logits exist at a time, at most (`train/loss.py`, `chunk_of`)."""
MAX_NODES = 4096


@dataclass(frozen=True)
class Speed:
    """What one worker does in a second: flops of the encoder and of the loss, bytes of its memory."""

    encoder: float
    loss: float
    memory: float


def worker_speed(node: NodeType, constants: Constants, dtype: str, loss: str) -> Speed:
    """Peak of an accelerator, or of all vCPUs of a node without one, times the shares of the peak measured here."""
    if node.accelerators:
        peak = node.accelerator_flops
        typed = peak if dtype == "bfloat16" else peak * FLOAT32_PEAK
        return Speed(
            typed * constants.encoder_efficiency,
            peak * (constants.loss_efficiency if loss == "softmax" else constants.sampled_efficiency),
            node.accelerator_bytes_s * constants.table_efficiency,
        )
    scale = node.cpus / constants.cores
    loss_s = constants.loss_s_flop if loss == "softmax" else constants.sampled_s_flop
    return Speed(scale / constants.encoder_s_flop, scale / loss_s, scale / constants.table_s_byte)


@dataclass(frozen=True)
class TrainingPlan:
    """One number of nodes, all figures per worker where not said otherwise."""

    nodes: int
    workers: int
    sharded: bool
    memory: dict[str, float]
    network: dict[str, float]
    seconds: dict[str, float]
    steps: float

    @property
    def memory_bytes(self) -> float:
        """All parts together."""
        return sum(self.memory.values())

    @property
    def hours(self) -> float:
        """Hours an epoch."""
        return self.steps * sum(self.seconds.values()) / 3600


def plan_training(work: Workload, node: NodeType, constants: Constants) -> TrainingPlan:
    """The least number of nodes whose memory holds the model and that keeps `epoch_hours`.

    Raises:
        ConfigError: no number of nodes does.
    """
    best: TrainingPlan | None = None
    limit = USABLE * worker_memory(node)
    count = 1
    while count <= MAX_NODES:
        plan = training_on(work, node, constants, count)
        if plan.memory_bytes <= limit:
            if plan.hours <= work.epoch_hours:
                return plan
            best = plan if best is None or plan.hours < best.hours else best
        count = count + 1 if count < 64 else count + count // 16
    if best is None:
        smallest = training_on(work, node, constants, MAX_NODES).memory_bytes
        raise ConfigError(
            f"{node.name}: expected at most {limit / 1e9:.0f} GB a worker, the model needs {smallest / 1e9:.0f} GB on each of "
            f"{MAX_NODES} nodes; lower the batch size or the width, or choose a node with more memory"
        )
    raise ConfigError(
        f"{node.name}: an epoch within {work.epoch_hours:g} h is out of reach; the shortest is {best.hours:.3g} h on {best.nodes} nodes; "
        "allow more hours or raise the batch size"
    )


def worker_memory(node: NodeType) -> float:
    """Bytes of one worker: an accelerator's, or a whole node's."""
    return node.accelerator_bytes if node.accelerators else node.memory_bytes


def training_on(work: Workload, node: NodeType, constants: Constants, nodes: int) -> TrainingPlan:
    """All figures for a given number of nodes."""
    workers = nodes * max(1, node.accelerators)
    epoch = counts.epoch_of(work.users, work.mean_history, work.max_length)
    positions = work.batch_size * epoch.length
    full = work.loss == "softmax"
    columns = work.items if full else work.negatives + 1
    rows = positions * (1 if full else 2) + (0 if full else work.negatives)
    width = counts.DTYPE_BYTES[work.dtype]
    state = counts.table_state_bytes(
        work.items, work.dim, work.dtype, work.optimizer, dense_gradient=full or work.optimizer == "adamw", rows=rows * workers
    )
    sharded = workers > 1 and sum(state.values()) > 0.5 * USABLE * worker_memory(node)
    share = 1 / workers if sharded else 1.0
    blocks = counts.block_parameters(work.dim, work.layers, work.max_length, work.ffn_multiplier)
    chunk = SOFTMAX_CHUNK_GPU if node.accelerators else SOFTMAX_CHUNK
    logits = chunk * work.items * share * 2 * 2 if full else positions * columns * counts.FLOAT_BYTES * 2
    memory = {f"table {name}": size * share for name, size in state.items()} | {
        "blocks, all states": blocks * 6 * counts.FLOAT_BYTES,
        "activations": counts.activation_bytes(positions, work.dim, work.layers, work.ffn_multiplier, work.dtype),
        "logits": logits,
    }
    table_gradient = work.items * work.dim * counts.FLOAT_BYTES
    network = {"blocks, all-reduce": counts.all_reduce_bytes(blocks * counts.FLOAT_BYTES, workers)}
    if sharded:
        network["table rows, all-to-all"] = counts.all_to_all_bytes(rows, work.dim, workers, work.dtype)
        if full:
            network["states, all-gather and back"] = 2 * (workers - 1) * positions * work.dim * width
    else:
        network["table gradient, all-reduce"] = counts.all_reduce_bytes(table_gradient, workers)
    link = node.link_bytes_s if nodes == 1 and node.accelerators else node.network_bytes_s / max(1, node.accelerators)
    speed = worker_speed(node, constants, work.dtype, work.loss)
    forward = counts.encoder_flops(work.dim, work.layers, epoch.length, work.ffn_multiplier)
    moved = counts.table_bytes_moved(work.items, work.dim, work.optimizer, rows * workers) * share
    seconds = {
        "fixed": constants.step_s,
        "encoder": 3 * positions * forward / speed.encoder,
        "loss": 3 * positions * counts.loss_flops(work.dim, columns) / speed.loss,
        "table": moved / speed.memory,
        "input": positions * constants.prepared_bytes_event / (node.network_bytes_s / max(1, node.accelerators) * NETWORK_EFFICIENCY),
        "network": sum(network.values()) / (link * NETWORK_EFFICIENCY) if workers > 1 else 0.0,
    }
    return TrainingPlan(nodes, workers, sharded, memory, network, seconds, max(1.0, epoch.windows / (work.batch_size * workers)))
