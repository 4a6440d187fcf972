"""Write a folder of the data contract in constant memory: shards of interactions, tables, dataset.json.

Everything goes to a folder beside the target that is renamed at the end, so a failed
import leaves nothing half-written.
"""

import os
import secrets
from types import TracebackType
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from raysys import storage
from raysys.errors import ConfigError, SchemaError

DATASET = "dataset.json"
MAX_SHARD_ROWS = 5_000_000


class ContractWriter:
    """Writes one data set; use as a context manager.

    Args:
        out: target folder. kind: name of the adapter, kept in dataset.json.
    """

    def __init__(self, out: str, kind: str) -> None:
        self.out = out.rstrip("/")
        self.kind = kind
        self.time = "utc"
        self.notes: list[str] = []
        self.extra: dict[str, Any] = {}
        self._work = storage.beside(out, f".tmp-{secrets.token_hex(4)}")
        self._rows: dict[str, int] = {}
        self._columns: dict[str, list[str]] = {}
        self._shard = self._shard_rows = 0
        self._open: dict[int, pq.ParquetWriter] = {}

    def __enter__(self) -> "ContractWriter":
        names = storage.list_dir(self.out) if storage.is_dir(self.out) else []
        if storage.exists(self.out) and not storage.is_dir(self.out):
            raise ConfigError(f"{self.out}: expected a folder to write to, found a file; choose another --out")
        if names and DATASET not in names:
            raise ConfigError(f"{self.out}: expected a new or empty folder, or an earlier import, found {names[0]!r}; choose another --out")
        storage.make_dir(self._work)
        return self

    def add_interactions(self, frame: pl.DataFrame, shard: int | None = None) -> None:
        """Append rows. All calls must have the same columns.

        Args:
            frame: the rows.
            shard: number of the file to append to; None fills one file after the other. One kind of call a data set.
        """
        if not len(frame):
            return
        table = _plain(frame)
        if shard is None:
            if self._shard_rows >= MAX_SHARD_ROWS:
                self._close()
                self._shard, self._shard_rows = self._shard + 1, 0
            self._shard_rows += table.num_rows
            shard = self._shard
        if shard not in self._open:
            storage.make_dir(storage.join(self._work, "interactions"))
            filesystem, path = storage.resolve(storage.join(self._work, "interactions", f"part-{shard:05d}.parquet"))
            self._open[shard] = pq.ParquetWriter(path, table.schema, filesystem=filesystem, compression="zstd")
        self._open[shard].write_table(table, row_group_size=1 << 20)
        self._count("interactions", table)

    def add_table(self, name: str, frame: pl.DataFrame) -> None:
        """Write `items` or `users`, once."""
        table = _plain(frame)
        storage.write_table(storage.join(self._work, f"{name}.parquet"), table)
        self._count(name, table)

    def add_json(self, name: str, value: object) -> None:
        """Write a further JSON file beside the tables."""
        storage.write_json(storage.join(self._work, name), value)

    def summary(self) -> dict:
        """Rows and columns per table, kind of time, notes."""
        tables = {name: f"{rows:,} rows: {', '.join(self._columns[name])}" for name, rows in self._rows.items()}
        return {"kind": self.kind, "out": self.out, **tables, "time": self.time, "notes": "; ".join(self.notes) or "none"}

    def _count(self, name: str, table: pa.Table) -> None:
        self._rows[name] = self._rows.get(name, 0) + table.num_rows
        self._columns[name] = table.column_names

    def _close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()
        try:
            if kind is None:
                self._publish()
        finally:
            storage.remove(self._work)

    def _publish(self) -> None:
        if not self._rows.get("interactions"):
            raise SchemaError(f"import {self.kind}: expected at least one interaction, found none; check the source and the kind")
        facts = {"source": self.kind, "time": self.time, "rows": self._rows, "notes": self.notes, **self.extra}
        storage.write_json(storage.join(self._work, DATASET), facts)
        storage.remove(self.out)
        if storage.is_local(self.out):
            os.rename(storage.resolve(self._work)[1], storage.resolve(self.out)[1])
        else:
            storage.copy_tree(self._work, self.out)


def _plain(frame: pl.DataFrame) -> pa.Table:
    table = frame.to_arrow()
    plain = {pa.large_string(): pa.string(), pa.large_list(pa.large_string()): pa.list_(pa.string())}
    return table.cast(pa.schema([(field.name, plain.get(field.type, field.type)) for field in table.schema]))
