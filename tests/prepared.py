"""A prepared set written directly from sequences, for tests that are not about `prepare`."""

import dataclasses

import numpy as np
import pyarrow as pa

from raysys import storage
from raysys.prepare.dataset import FORMAT, SEQUENCE_SCHEMA, Sequences
from raysys.schema import SPLIT_CODES
from tests import planted


def leave_one_out(sequences: Sequences) -> Sequences:
    """The last event of each user is test, the one before it validation."""
    split = np.full(len(sequences.items), SPLIT_CODES["train"], np.int8)
    split[sequences.indptr[1:] - 1] = SPLIT_CODES["test"]
    split[sequences.indptr[1:] - 2] = SPLIT_CODES["valid"]
    return dataclasses.replace(sequences, split=split)


def write_prepared(folder: str, sequences: Sequences, items: pa.Table) -> str:
    """Write a set whose users are `planted.user_ids()`; returns `folder`."""
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
    users = pa.table({"user_idx": pa.array(range(num_users), pa.int32()), "user_id": planted.user_ids()[:num_users]})
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
