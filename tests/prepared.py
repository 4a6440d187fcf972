"""A prepared set written directly from sequences, for tests that are not about `prepare`."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysys import storage
from raysys.prepare.dataset import FORMAT, SEQUENCE_SCHEMA, Prepared, Sequences
from raysys.schema import SPLIT_CODES
from tests import planted


def leave_one_out(sequences: Sequences) -> Sequences:
    """The last event of each user is test, the one before it validation."""
    split = np.full(len(sequences.items), SPLIT_CODES["train"], np.int8)
    split[sequences.indptr[1:] - 1] = SPLIT_CODES["test"]
    split[sequences.indptr[1:] - 2] = SPLIT_CODES["valid"]
    return dataclasses.replace(sequences, split=split)


def write_prepared(folder: str, sequences: Sequences, items: pa.Table) -> str:
    """Write a set whose users have the ids of `planted.user_ids()`; returns `folder`."""
    num_users, split = len(sequences), "leave-one-out" if sequences.split.any() else "none"
    flat = {
        "item_idx": sequences.items,
        "event": sequences.events,
        "timestamp": sequences.times,
        "value": sequences.values,
        "positive": sequences.positive,
        "split": sequences.split,
    }
    offsets = pa.array(sequences.indptr, pa.int32())
    lists = {
        name: pa.ListArray.from_arrays(offsets, pa.array(values, SEQUENCE_SCHEMA.field(name).type.value_type))
        for name, values in flat.items()
    }
    storage.write_table(
        storage.join(folder, "sequences", "part-0.parquet"),
        pa.table({"user_idx": pa.array(sequences.user_idx, pa.int32()), **lists}, SEQUENCE_SCHEMA),
    )
    storage.write_table(storage.join(folder, "items.parquet"), items)
    users = pa.table({"user_idx": pa.array(range(num_users), pa.int32()), "user_id": [f"user-{user}" for user in range(num_users)]})
    storage.write_table(storage.join(folder, "users.parquet"), users)
    counts = {name: int((sequences.split == code).sum()) for name, code in SPLIT_CODES.items()}
    manifest = {
        "format": FORMAT,
        "split": split,
        "time": "utc",
        "events": planted.EVENTS,
        "event_types": {name: {"weight": 1.0, "positive": False, "min_value": None} for name in planted.EVENTS},
        "counts": {**counts, "items": items.num_rows, "users": num_users},
        "watermark": int(sequences.times.max()),
        "fingerprint": f"planted-{split}",
    }
    storage.write_json(storage.join(folder, "manifest.json"), manifest)
    return folder


def in_files(folder: str, sequences: Sequences, items: pa.Table, *, num_files: int = 3, group: int = 25, order=None) -> Prepared:
    """A prepared set of several files with several row groups of `group` users each.

    Args:
        order: (U,) rows of the users in the order of files; as they come by default.
    """
    write_prepared(folder, sequences, items)
    whole = f"{folder}/sequences/part-0.parquet"
    table = pq.read_table(whole)
    table = table if order is None else table.take(pa.array(order))
    storage.remove(whole)
    size = -(-table.num_rows // num_files)
    for number in range(num_files):
        pq.write_table(table.slice(number * size, size), f"{folder}/sequences/part-{number}.parquet", row_group_size=group)
    return Prepared.open(folder)
