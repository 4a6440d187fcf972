"""The shuffle: a chunk's rows, split by a stable hash of the user, as one Parquet file with a row group for each partition.

The footer of the file is the index, so a partition is read from every chunk without
reading the rest, and the number of files is that of the chunks. Everything goes through
files: a chunk that is there need not be read again, and no memory holds the data.
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysys import storage
from raysys.prepare.rows import CLEAN_SCHEMA
from raysys.schema import EVENT, ITEM_ID, USER_ID

HASH_BASE = 0x9E3779B97F4A7C15
"""Odd; the hash of a text is a polynomial of its bytes in it, modulo 2**64, finished by splitmix64."""


def stable_hash(texts: pa.StringArray) -> np.ndarray:
    """(U,) uint64 hashes of UTF-8 texts without nulls: the same on every machine and in every version of every library."""
    if not len(texts):
        return np.empty(0, np.uint64)
    offsets = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    lengths = np.diff(offsets)
    content = np.frombuffer(texts.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]].astype(np.uint64)
    powers = np.cumprod(np.full(max(1, lengths.max()), HASH_BASE, np.uint64))
    position = np.arange(len(content)) - np.repeat(offsets[:-1] - offsets[0], lengths)
    # +1, so that a zero byte at the end counts; sums wrap around, as they should. The sentinel is for texts of no length.
    sums = np.concatenate([[np.uint64(0)], np.cumsum((content + np.uint64(1)) * powers[position], dtype=np.uint64)])
    state = sums[offsets[1:] - offsets[0]] - sums[offsets[:-1] - offsets[0]]
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def write_slices(uri: str, table: pa.Table, partitions: int) -> None:
    """Write the rows of a CLEAN_SCHEMA table as `partitions` row groups, each in the order of the table."""
    table = table.combine_chunks()
    users = dictionary_column(table, USER_ID)
    owner = (stable_hash(users.dictionary) % np.uint64(partitions)).astype(np.uint16)[users.indices.to_numpy()]
    counts = np.bincount(owner, minlength=partitions)
    if partitions > 1:
        table = table.take(pa.array(np.argsort(owner, kind="stable")))  # 16-bit keys: numpy sorts them by radix
    starts = np.cumsum(counts) - counts
    write_row_groups(uri, (compact(table.slice(start, count)) for start, count in zip(starts, counts, strict=True)))


def write_row_groups(uri: str, tables) -> None:
    """Write CLEAN_SCHEMA tables as the row groups of one file, atomically; an empty table is an empty row group."""
    sink = pa.BufferOutputStream()
    options = {
        "use_dictionary": [USER_ID, ITEM_ID, EVENT],
        "dictionary_pagesize_limit": 1 << 30,  # never fall back to plain text
        "compression": "zstd",
        "write_statistics": False,
    }
    with pq.ParquetWriter(sink, CLEAN_SCHEMA, **options) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, table.num_rows))
    storage.write_bytes(uri, sink.getvalue())


def read_row_group(uri: str, number: int) -> pa.Table:
    """One row group of such a file."""
    filesystem, path = storage.resolve(uri)
    with filesystem.open_input_file(path) as stream:
        return pq.ParquetFile(stream).read_row_group(number)


def dictionary_column(table: pa.Table, name: str) -> pa.DictionaryArray:
    """A dictionary column of a table as one array."""
    column = table[name]
    if column.num_chunks == 0:
        return pa.DictionaryArray.from_arrays(pa.array([], pa.int32()), pa.array([], pa.string()))
    combined = column.combine_chunks()
    return combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined


def compact(table: pa.Table) -> pa.Table:
    """Drop the texts that no row uses from the dictionaries of ids."""
    for name in (USER_ID, ITEM_ID):
        column = dictionary_column(table, name)
        codes, size = column.indices.to_numpy(), len(column.dictionary)
        if len(codes) * 8 < size:
            used, codes = np.unique(codes, return_inverse=True)
        else:
            seen = np.zeros(size, bool)
            seen[codes] = True
            used, codes = np.flatnonzero(seen), (np.cumsum(seen) - 1)[codes]
        column = pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), column.dictionary.take(pa.array(used)))
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table
