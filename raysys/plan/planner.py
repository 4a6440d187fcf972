"""`raysys plan`: every figure with its unit, its formula and what was assumed. The arithmetic is in training.py and serving.py."""

from dataclasses import asdict, dataclass

from raysys import config
from raysys.plan import counts
from raysys.plan.serving import SCALE_OUT, history_bytes, plan_batch, plan_prepare, plan_serving
from raysys.plan.training import NETWORK_EFFICIENCY, USABLE, plan_training
from raysys.plan.workload import Constants, NodeType, Workload

HERE = "seconds measured on the calibration's machine"
SHARES = "shares of peak measured on CPU cores, taken over to this worker"


@dataclass(frozen=True)
class Figure:
    """One line of a plan. value is None where it cannot be had, and `assumption` says why."""

    section: str
    name: str
    value: float | str | None
    unit: str
    formula: str
    assumption: str = ""


def plan(work: Workload, node: NodeType, cpu_node: NodeType, constants: Constants) -> dict:
    """All figures.

    Args:
        work: data, model, traffic.
        node: trains and writes the lists for all users.
        cpu_node: prepares and serves.
        constants: as measured.

    Returns:
        `workload`, `nodes`, `constants` and `figures` (list of `Figure` as dicts), ready for JSON.

    Raises:
        ConfigError: no number of nodes does what is asked.
    """
    figures = [
        *_prepare(work, cpu_node, constants),
        *_train(work, node, constants),
        *_batch(work, node, constants),
        *_serve(work, cpu_node, constants),
    ]
    return {
        "workload": {**config.to_dict(work), "history": work.mean_history},
        "nodes": {"train": config.to_dict(node), "prepare": config.to_dict(cpu_node)},
        "constants": {name: value for name, value in config.to_dict(constants).items() if name != "checks"},
        "figures": [asdict(figure) for figure in figures],
    }


def _prepare(work: Workload, node: NodeType, constants: Constants) -> list[Figure]:
    spread, s = plan_prepare(work, node, constants), "prepare"
    return [
        Figure(s, "nodes", spread.nodes, node.name, "least with hours <= prepare_hours"),
        Figure(
            s,
            "hours",
            spread.hours,
            "h",
            "max(events * core-seconds / cores, bytes / network) / nodes + fixed",
            f"{HERE}; {SCALE_OUT:g} of linear speed-up; {NETWORK_EFFICIENCY:g} of the network",
        ),
        Figure(s, "raw data", work.events * constants.raw_bytes_event, "bytes", "events * bytes an event", "Parquet of synthetic data"),
        Figure(s, "prepared set", work.events * constants.prepared_bytes_event, "bytes", "events * bytes an event", "the same"),
    ]


def _train(work: Workload, node: NodeType, constants: Constants) -> list[Figure]:
    chosen, s = plan_training(work, node, constants), "train"
    figures = [
        Figure(s, "nodes", chosen.nodes, node.name, "least whose memory holds the model, with hours <= epoch_hours"),
        Figure(s, "workers", chosen.workers, node.accelerator or "nodes", "nodes * accelerators"),
        Figure(
            s,
            "item table",
            "row-wise sharded" if chosen.sharded else "replicated",
            "",
            f"sharded where its states exceed half of {USABLE:g} of a worker's memory",
        ),
        Figure(s, "hours an epoch", chosen.hours, "h", "steps * (fixed + encoder + loss + table + input + network)", "nothing overlaps"),
        Figure(s, "steps an epoch", chosen.steps, "", "windows / (batch_size * workers)", "histories cut into windows of max_length"),
    ]
    why = {
        "fixed": ("measured a step on CPU", "launches of kernels take as long"),
        "encoder": ("3 * positions * layers * ((8 + 4f) D^2 + 2 L D) / (peak * share)", SHARES),
        "loss": ("3 * positions * 2 D columns / (peak * share)", SHARES),
        "table": ("rows touched * D * 4 bytes * passes / (bandwidth * share)", SHARES),
        "input": (
            "B L * bytes of the prepared set an event / (network * efficiency)",
            "storage keeps up, and CPUs decode and pad for free",
        ),
        "network": ("bytes / (link * efficiency)", f"{NETWORK_EFFICIENCY:g} of the link, assumed"),
    }
    figures += [Figure(s, f"step, {name}", value, "s", *why[name]) for name, value in chosen.seconds.items()]
    shard = "per shard" if chosen.sharded else "per worker"
    for name, value in chosen.memory.items():
        what = f"memory {shard}, {name}" if name.startswith("table") else f"memory per worker, {name}"
        figures.append(Figure(s, what, value, "bytes", _MEMORY.get(name, "rows * D * bytes of its type")))
    figures.append(Figure(s, "memory per worker", chosen.memory_bytes, "bytes", "their sum", f"at most {USABLE:g} of a worker's"))
    figures += [
        Figure(s, f"network a step, {name}", value, "bytes", _NETWORK[name], "per worker, sent") for name, value in chosen.network.items()
    ]
    return figures


_MEMORY = {
    "blocks, all states": "parameters * 6 * 4 bytes: weights, gradients, two moments, running average, best",
    "activations": "B * L * layers * (12 + 3f) D * bytes",
    "logits": "full: 256 * shard rows * 2 * 2; sampled: B * L * (S + 1) * 4 * 2",
    "table optimizer state": "AdamW: 2 * rows * D * 4; row-wise Adagrad: rows * 4",
    "table gradients": "dense: rows * D * 4; sparse: touched rows only",
}
_NETWORK = {
    "blocks, all-reduce": "2 (W - 1) / W * parameters * 4",
    "table gradient, all-reduce": "2 (W - 1) / W * N D * 4",
    "table rows, all-to-all": "2 * rows of the batch * D * bytes * (W - 1) / W",
    "states, all-gather and back": "2 * (W - 1) * B L D * bytes",
}


def _batch(work: Workload, node: NodeType, constants: Constants) -> list[Figure]:
    spread, s = plan_batch(work, node, constants), "batch inference"
    return [
        Figure(s, "nodes", spread.nodes, node.name, "least with hours <= batch_hours"),
        Figure(
            s, "hours", spread.hours, "h", "users * (2 N D / speed + fixed) / nodes", f"{SHARES}; exact, float32; {SCALE_OUT:g} of linear"
        ),
    ]


def _serve(work: Workload, node: NodeType, constants: Constants) -> list[Figure]:
    figures: list[Figure] = []
    for name, dense in (("serve, exact scores", True), ("serve, approximate index", False)):
        found = plan_serving(work, node, constants, dense=dense)
        assumed = HERE if dense else "not built in raysys: the search itself is taken as free, so this is a lower bound"
        late = f"{constants.tail:.2g} * {found.service_s * 1e3:.3g} ms exceeds p99_ms = {work.p99_ms:g}; the catalogue is too large for it"
        if found.replicas is None:
            nodes_why = late
        else:
            nodes_why = assumed if found.nodes is not None else f"a replica does not fit into {USABLE:g} of the node's memory"
        figures += [
            Figure(name, "a request", found.service_s * 1e3, "ms", "fixed + N D 4 bytes / bandwidth", assumed),
            Figure(
                name,
                "replicas",
                found.replicas,
                "",
                "qps * service / u, u = 1 - tail * service / p99",
                late if found.replicas is None else assumed,
            ),
            Figure(name, "nodes", found.nodes, node.name, f"replicas / a node's, {constants.cores} vCPUs each", nodes_why),
            Figure(name, "vectors of a replica", found.memory_bytes, "bytes", "N D 4" if dense else "N (D + 8), 8-bit codes and ids"),
        ]
    stored = f"users * ({counts.KEY_BYTES} + {counts.HISTORY_BYTES} * min(history, {counts.HISTORY_EVENTS}))"
    return [*figures, Figure("serve", "histories of a bundle", history_bytes(work), "bytes", stored, "held by every ingress replica")]


def shown(figure: dict) -> str:
    """A value as a person reads it."""
    value, unit = figure["value"], figure["unit"]
    if value is None:
        return f"none: {figure['assumption']}"
    if isinstance(value, str):
        return value
    if unit == "bytes":
        for name, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
            if value >= size:
                return f"{value / size:.3g} {name}"
        return f"{value / 1e3:.3g} kB"
    if unit == "s":
        return f"{value * 1e3:.3g} ms"
    number = f"{value:,.0f}" if float(value).is_integer() or value >= 1000 else f"{value:.3g}"
    return f"{number} {unit}".rstrip()


def rows(result: dict) -> list[tuple[str, str]]:
    """The closing table of the command."""
    return [(f"{figure['section']}: {figure['name']}", shown(figure)) for figure in result["figures"]]


def markdown(results: dict[str, dict]) -> str:
    """A Markdown table, a row a figure and a column a plan; figures that a plan lacks stay empty.

    Args:
        results: heading of the column -> what `plan` returned.
    """
    names = list(dict.fromkeys(label for result in results.values() for label, _ in rows(result)))
    cells = {heading: dict(rows(result)) for heading, result in results.items()}
    lines = [f"| | {' | '.join(results)} |", f"|---|{'---|' * len(results)}"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells[heading].get(name, '') for heading in results)} |" for name in names)])
