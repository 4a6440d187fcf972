"""A moment of a training on disk, cut by rows where the model is, and read by any number of workers.

checkpoint/
  state.json                     progress and whatever the stages keep
  dense.safetensors              tensors that are the same on all ranks     (rank 0)
  rows-FIRST-STOP.safetensors    tensors with a row for each item in FIRST..STOP-1

Every worker writes the rows it holds; a reader takes the rows it needs from
whichever files have them. There is no pickle in it, which is why this is not
torch.distributed.checkpoint: its metadata is one.
"""

import os
import re
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from raysys import storage
from raysys.errors import SchemaError

STATE, DENSE = "state.json", "dense.safetensors"
ROWS = re.compile(r"rows-(\d+)-(\d+)\.safetensors")


@dataclass
class Saved:
    """What a worker keeps between stages and takes along in checkpoints.

    Attributes:
        state: JSON-ready. dense: tensors that are the same on all ranks. rows: tensors with a row for each item of this rank.
    """

    state: dict[str, Any]
    dense: dict[str, Tensor]
    rows: dict[str, Tensor]

    def put(self, prefix: str, dense: dict[str, Tensor], rows: dict[str, Tensor]) -> None:
        """Add tensors under a prefix."""
        self.dense |= {f"{prefix}{name}": tensor for name, tensor in dense.items()}
        self.rows |= {f"{prefix}{name}": tensor for name, tensor in rows.items()}

    def under(self, prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Dense tensors and rows under a prefix, without it."""
        return _under(self.dense, prefix), _under(self.rows, prefix)

    def drop(self, *prefixes: str) -> None:
        """Forget tensors under some prefixes."""
        self.dense = {name: tensor for name, tensor in self.dense.items() if not name.startswith(prefixes)}
        self.rows = {name: tensor for name, tensor in self.rows.items() if not name.startswith(prefixes)}


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def write_state(folder: str, state: dict[str, Any], dense: dict[str, Tensor]) -> None:
    """What is the same on all ranks; rank 0 writes it.

    Args:
        folder: of the checkpoint.
        state: JSON-ready.
        dense: tensors by name.
    """
    storage.write_bytes(storage.join(folder, DENSE), save(_plain(dense)))
    storage.write_json(storage.join(folder, STATE), state)


def write_rows(folder: str, rows: dict[str, Tensor], first: int, stop: int) -> None:
    """The rows of the items in [first, stop); each rank writes its own."""
    storage.write_bytes(storage.join(folder, f"rows-{first:012d}-{stop:012d}.safetensors"), save(_plain(rows)))


def read_state(folder: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_state` wrote."""
    return storage.read_json(storage.join(folder, STATE)), load(storage.read_bytes(storage.join(folder, DENSE)))


def read_rows(folder: str, first: int, stop: int) -> dict[str, Tensor]:
    """Rows [first, stop) of every tensor, however many files they lie in.

    Args:
        folder: a local folder.
        first: item of the first row.
        stop: item after the last row.

    Raises:
        SchemaError: rows are missing.
    """
    found: dict[str, Tensor] = {}
    covered = 0
    for name in storage.list_dir(folder):
        match = ROWS.fullmatch(name)
        if match is None:
            continue
        start, end = int(match[1]), int(match[2])
        low, high = max(first, start), min(stop, end)
        if low >= high:
            continue
        covered += high - low
        with safe_open(os.path.join(folder, name), framework="pt") as file:
            for key in file.keys():
                part = file.get_slice(key)[low - start : high - start]
                if key not in found:
                    found[key] = part.new_empty(stop - first, *part.shape[1:])
                found[key][low - first : high - first] = part
    if covered != stop - first:
        raise SchemaError(f"{folder}: expected rows {first} to {stop} of the item table, found {covered} of them; start the training anew")
    return found


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
