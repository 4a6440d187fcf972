"""What is planned for (data, model, traffic) and on what (node types, measured constants). Knows no formula.

The constants are written by `benchmarks/scale/calibrate.py`; the node types are datasheet figures.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raysys import config, storage
from raysys.errors import ConfigError

HERE = Path(__file__).parent
NODES, CONSTANTS = str(HERE / "nodes.yaml"), str(HERE / "constants.json")
SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9}


@dataclass(frozen=True)
class Workload:
    """Data, model and traffic."""

    users: int
    """Users with at least one event."""
    items: int
    """N, the catalogue."""
    events: int
    """Interactions to prepare and to learn from."""
    history: float | None = None
    """Mean training events a user; None for events / users."""
    dim: int = 64
    """D, width of item vectors and states."""
    layers: int = 2
    """Transformer blocks."""
    max_length: int = 50
    """T, events of a history that the encoder looks at."""
    ffn_multiplier: int = 1
    """Hidden width of the feed-forward layer, in units of `dim`."""
    loss: Literal["softmax", "sampled"] = "sampled"
    """Cross-entropy over all items or over sampled negatives."""
    negatives: int = 1024
    """S, negatives a step of the sampled loss."""
    batch_size: int = 256
    """B, sequences a step of one worker."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of parameters and activations; gradients of the table and optimizer state are float32."""
    optimizer: Literal["adamw", "rowwise-adagrad", "sgd"] = "adamw"
    """Of the item table; the blocks are always under AdamW."""
    candidates: int = 200
    """Items that retrieval hands to ranking."""
    qps: float = 100.0
    """Requests a second at the peak."""
    p99_ms: float = 50.0
    """Latency that 99% of the requests must keep."""
    epoch_hours: float = 1.0
    """Longest time an epoch may take; decides the number of training nodes."""
    prepare_hours: float = 1.0
    """Longest time preparation may take; decides the number of its nodes."""
    batch_hours: float = 1.0
    """Longest time for a list for every user; decides the number of nodes for it."""

    def __post_init__(self) -> None:
        for name, value in config.to_dict(self).items():
            if isinstance(value, (int, float)) and not value > 0:
                raise ValueError(f"{name}: expected more than 0, got {value}")
        if self.events < self.users:
            raise ValueError(f"events: expected at least one a user, got {self.events:,} events of {self.users:,} users")

    @property
    def mean_history(self) -> float:
        """Events a user that are learnt from."""
        return self.events / self.users if self.history is None else self.history


@dataclass(frozen=True)
class NodeType:
    """One machine by its datasheet; see nodes.yaml for units."""

    name: str
    cpus: int
    memory_bytes: float
    network_bytes_s: float
    source: str
    accelerators: int = 0
    accelerator: str = ""
    accelerator_bytes: float = 0.0
    accelerator_flops: float = 0.0
    accelerator_bytes_s: float = 0.0
    link_bytes_s: float = 0.0

    def __post_init__(self) -> None:
        wanted = ["cpus", "memory_bytes", "network_bytes_s"]
        if self.accelerators:
            wanted += ["accelerator_bytes", "accelerator_flops", "accelerator_bytes_s", "link_bytes_s"]
        missing = [name for name in wanted if not getattr(self, name) > 0]
        if missing or self.accelerators < 0:
            raise ValueError(f"expected {missing[0] if missing else 'accelerators'} above 0")


@dataclass(frozen=True)
class Constants:
    """What `benchmarks/scale/calibrate.py` measured and fitted; seconds are of all `cores` of that machine together.

    Training, one step: `step_s + encoder_s_flop * flops + (loss_s_flop or sampled_s_flop) * flops + table_s_byte * bytes`.
    """

    date: str
    commit: str
    machine: str
    cores: int
    """Cores that the measured programs used."""
    gemm_flops: float
    """Float32 matrix product of that machine, flop/s: the peak that efficiencies are shares of."""
    loss_gemm_flops: float
    """The same in the type in which the loss computes its logits there."""
    stream_bytes_s: float
    """Memory bandwidth of that machine, copying, bytes read plus bytes written."""
    prepare_s: float
    """Fixed seconds of a prepare."""
    prepare_s_event: float
    """Seconds an event."""
    raw_bytes_event: float
    """Bytes of Parquet an event of the data folder."""
    prepared_bytes_event: float
    """Bytes of Parquet an event of the prepared set."""
    step_s: float
    """Fixed seconds a training step."""
    encoder_s_flop: float
    loss_s_flop: float
    """Of the softmax over the catalogue, in the machine's fast type."""
    sampled_s_flop: float
    """Of the softmax over sampled negatives, in the same type: masks and positives weigh more beside its smaller products."""
    table_s_byte: float
    batch_s_user: float
    """Seconds a user of batch scoring without the catalogue."""
    batch_s_flop: float
    """Seconds a flop of the products of users and items in batch scoring, sources, fusion and top-k included."""
    request_s: float
    """Seconds a single request without the catalogue: encoder, fusion, ranker."""
    request_s_byte: float
    """Seconds a byte of item vectors in a single request."""
    tail: float
    """p99 / mean of single requests on an otherwise idle replica."""
    checks: list[dict]
    """Predictions at sizes that the fit did not see: what, size, predicted, measured, error."""

    @property
    def encoder_efficiency(self) -> float:
        """Share of the machine's matrix product speed that the encoder reached."""
        return min(1.0, 1.0 / (self.encoder_s_flop * self.gemm_flops))

    @property
    def loss_efficiency(self) -> float:
        """The same of the softmax over the catalogue."""
        return min(1.0, 1.0 / (self.loss_s_flop * self.loss_gemm_flops))

    @property
    def sampled_efficiency(self) -> float:
        """The same of the softmax over sampled negatives."""
        return min(1.0, 1.0 / (self.sampled_s_flop * self.loss_gemm_flops))

    @property
    def table_efficiency(self) -> float:
        """Share of the machine's memory bandwidth that the table's update reached."""
        return min(1.0, 1.0 / (self.table_s_byte * self.stream_bytes_s))

    @property
    def batch_efficiency(self) -> float:
        """Share of the machine's matrix product speed that batch scoring reached."""
        return min(1.0, 1.0 / (self.batch_s_flop * self.gemm_flops))


def parse_count(text: str) -> int:
    """`10B`, `1.5M`, `20k` or `1000` as a number.

    Raises:
        ConfigError: anything else, or nothing positive.
    """
    number, scale = (text[:-1], SUFFIXES[text[-1].lower()]) if text[-1:].lower() in SUFFIXES and text else (text, 1.0)
    try:
        count = round(float(number.replace("_", "").replace(",", "")) * scale)
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise ConfigError(f"expected a positive number such as 1000, 20k, 1.5M or 10B, got {text!r}")
    return count


def load_nodes(uri: str = NODES) -> dict[str, NodeType]:
    """The table of node types.

    Raises:
        ConfigError: a field is missing, unknown or of a wrong type.
    """
    table = config.read_yaml(uri)
    return {str(name): config.from_dict(NodeType, {"name": str(name), **(values or {})}, where=str(name)) for name, values in table.items()}


def node_type(nodes: dict[str, NodeType], name: str) -> NodeType:
    """One node type.

    Raises:
        ConfigError: there is none of that name, with the nearest one.
    """
    if name not in nodes:
        close = difflib.get_close_matches(name, nodes, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"no node type {name!r}; {hint}known: {', '.join(nodes)}; --nodes FILE reads another table")
    return nodes[name]


def load_constants(uri: str = CONSTANTS) -> Constants:
    """The measured constants.

    Raises:
        ConfigError: the file is missing, or not what calibrate.py writes.
    """
    if not storage.exists(uri):
        raise ConfigError(f"{uri}: expected the constants that benchmarks/scale/calibrate.py writes, found nothing")
    return config.from_dict(Constants, storage.read_json(uri), where=uri)
