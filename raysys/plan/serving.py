"""Nodes and hours of preparation and batch inference, replicas and memory of serving.

Everything is scaled from seconds that were measured on `constants.cores` cores: a vCPU counts as one of those cores.
"""

import math
from dataclasses import dataclass

from raysys.plan import counts
from raysys.plan.training import FLOAT32_PEAK, NETWORK_EFFICIENCY, USABLE
from raysys.plan.workload import Constants, NodeType, Workload

SCALE_OUT = 0.8
"""Share of linear speed-up that many nodes reach. Assumed: the calibration runs on one."""
INDEX_BYTES = 8
"""Bytes a vector of an approximate index with 8-bit codes beside its D code bytes (FAISS IVF-SQ8: the id)."""


@dataclass(frozen=True)
class Spread:
    """Work spread over nodes."""

    nodes: int
    hours: float


def plan_prepare(work: Workload, node: NodeType, constants: Constants) -> Spread:
    """Least nodes within `prepare_hours`; the slower of cores and network sets the pace."""
    cores = work.events * constants.prepare_s_event * constants.cores / (node.cpus * SCALE_OUT)
    # Read once, shuffled once (written and read), written once.
    moved = work.events * (3 * constants.raw_bytes_event + constants.prepared_bytes_event) / (node.network_bytes_s * NETWORK_EFFICIENCY)
    return _spread(max(cores, moved), work.prepare_hours, constants.prepare_s)


def plan_batch(work: Workload, node: NodeType, constants: Constants) -> Spread:
    """Least nodes that write a list for every user within `batch_hours`, exact scores over the whole catalogue."""
    flops = counts.loss_flops(work.dim, work.items)
    if node.accelerators:
        peak = node.accelerators * node.accelerator_flops * FLOAT32_PEAK * constants.batch_efficiency
        scale = node.cpus / constants.cores  # histories are read and lists written by the CPUs beside
        seconds = work.users * (flops / peak + constants.batch_s_user / scale)
    else:
        seconds = work.users * (constants.batch_s_user + constants.batch_s_flop * flops) * constants.cores / node.cpus
    return _spread(seconds / SCALE_OUT, work.batch_hours, 0.0)


def _spread(seconds: float, hours: float, fixed_s: float) -> Spread:
    nodes = max(1, math.ceil(seconds / max(hours * 3600 - fixed_s, 1.0)))
    return Spread(nodes, (seconds / nodes + fixed_s) / 3600)


@dataclass(frozen=True)
class ServingPlan:
    """Replicas of retrieval and ranking together. replicas and nodes are None where the latency cannot be kept."""

    service_s: float
    utilisation: float
    replicas: int | None
    nodes: int | None
    memory_bytes: float


def plan_serving(work: Workload, node: NodeType, constants: Constants, *, dense: bool) -> ServingPlan:
    """Replicas that keep `p99_ms` at `qps`.

    The mean service time of a request comes from the calibration; waiting multiplies it by 1 / (1 - u) at utilisation u
    (one server, Poisson arrivals), and p99 is `tail` times the mean. So u = 1 - tail * service / p99, and replicas = qps * service / u.

    Args:
        work: what is asked for.
        node: where replicas run, `constants.cores` vCPUs each.
        constants: as measured.
        dense: exact scoring of the catalogue, as raysys does it; else an approximate index whose search costs nothing.
    """
    vectors = work.items * work.dim * counts.FLOAT_BYTES
    service = constants.request_s + (constants.request_s_byte * vectors if dense else 0.0)
    memory = vectors if dense else work.items * (work.dim + INDEX_BYTES)
    utilisation = 1 - constants.tail * service / (work.p99_ms / 1e3)
    if utilisation <= 0:
        return ServingPlan(service, utilisation, None, None, memory)
    replicas = max(1, math.ceil(work.qps * service / utilisation))
    by_memory = int(USABLE * node.memory_bytes // memory)
    a_node = min(node.cpus // constants.cores, by_memory)
    return ServingPlan(service, utilisation, replicas, math.ceil(replicas / a_node) if a_node else None, memory)


def history_bytes(work: Workload) -> float:
    """Bytes of the histories in a bundle."""
    return work.users * (counts.KEY_BYTES + counts.HISTORY_BYTES * min(work.mean_history, counts.HISTORY_EVENTS))
