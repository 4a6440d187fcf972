"""A fingerprint of content that does not depend on the order of users, shards or tasks."""

import hashlib
import json

import numpy as np
import pyarrow as pa

LANES = (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03)
"""Two seeds: the sums make 128 bits together."""


def content_sums(table: pa.Table) -> list[int]:
    """Two 64-bit sums over all events of encoded sequences; sums of shards add up modulo 2**64.

    Args:
        table: SEQUENCE_SCHEMA rows. Each event is mixed with its user and its position.
    """
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    lists = columns["item_idx"]
    lengths = np.diff(lists.offsets.to_numpy())
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    position = np.arange(lengths.sum()) - starts
    values = columns["value"].flatten().to_numpy(zero_copy_only=False).astype(np.float32).view(np.uint32)
    parts = [
        np.repeat(columns["user_idx"].to_numpy(), lengths),
        position,
        columns["item_idx"].flatten().to_numpy(),
        columns["event"].flatten().to_numpy(),
        columns["timestamp"].flatten().to_numpy(),
        np.where(np.isnan(values.view(np.float32)), np.uint32(0x7FC00000), values),
        columns["positive"].flatten().to_numpy(zero_copy_only=False),
        columns["split"].flatten().to_numpy(),
    ]
    return [int(_mix(parts, lane).sum(dtype=np.uint64)) for lane in LANES]


def _mix(parts: list[np.ndarray], seed: int) -> np.ndarray:
    state = np.full(len(parts[0]), seed, np.uint64)
    for part in parts:
        # splitmix64's finaliser after every field: order of fields and of events matters.
        state = (state ^ part.astype(np.int64).view(np.uint64)) + np.uint64(seed)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state


def fingerprint(sums: list[int], tables: dict[str, bytes], facts: dict) -> str:
    """sha256 over the event sums, the bytes of the tables, and facts such as split and event types."""
    digest = hashlib.sha256(json.dumps([sums, facts], sort_keys=True).encode())
    for name in sorted(tables):
        digest.update(name.encode() + hashlib.sha256(tables[name]).digest())
    return digest.hexdigest()
