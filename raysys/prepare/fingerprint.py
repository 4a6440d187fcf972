"""A fingerprint of content that does not depend on the order of users, shards or tasks."""

import hashlib
import json

import numpy as np
import pyarrow as pa

LANES = (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03)
"""Two seeds: the sums make 128 bits together."""
BLOCK = 1 << 14
"""Events mixed at a time: what is mixed stays in the processor's cache, which makes it three times as fast."""


def content_sums(table: pa.Table) -> list[int]:
    """Two 64-bit sums over all events of encoded sequences; sums of shards add up modulo 2**64.

    Args:
        table: SEQUENCE_SCHEMA rows. Each event is mixed with its user and its position.
    """
    lists = table["item_idx"].combine_chunks()
    lengths = np.diff(lists.offsets.to_numpy())
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    values = _flat(table, "value").astype(np.float32).view(np.uint32)
    parts = [
        np.repeat(table["user_idx"].to_numpy(), lengths),
        np.arange(len(starts)) - starts,
        _flat(table, "item_idx"),
        _flat(table, "event"),
        _flat(table, "timestamp"),
        np.where(np.isnan(values.view(np.float32)), np.uint32(0x7FC00000), values),
        _flat(table, "positive"),
        _flat(table, "split"),
    ]
    sums = [0, 0]
    for first in range(0, len(starts), BLOCK):
        block = [part[first : first + BLOCK].astype(np.int64).view(np.uint64) for part in parts]
        sums = [(total + int(_mix(block, lane).sum(dtype=np.uint64))) % 2**64 for total, lane in zip(sums, LANES, strict=True)]
    return sums


def _flat(table: pa.Table, name: str) -> np.ndarray:
    return table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _mix(parts: list[np.ndarray], seed: int) -> np.ndarray:
    state = np.full(len(parts[0]), seed, np.uint64)
    for part in parts:
        # splitmix64's finaliser after every field: order of fields and of events matters.
        state ^= part
        state += np.uint64(seed)
        state ^= state >> np.uint64(30)
        state *= np.uint64(0xBF58476D1CE4E5B9)
        state ^= state >> np.uint64(27)
        state *= np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state


def fingerprint(sums: list[int], tables: dict[str, bytes], facts: dict) -> str:
    """sha256 over the event sums, the bytes of the tables, and facts such as split and event types."""
    digest = hashlib.sha256(json.dumps([sums, facts], sort_keys=True).encode())
    for name in sorted(tables):
        digest.update(name.encode() + hashlib.sha256(tables[name]).digest())
    return digest.hexdigest()
