"""The lake: a data folder of the contract that `prepare` reads, written from the event log.

    LAKE/interactions/date=YYYY-MM-DD/batch-N.parquet     what users did, by the day it happened (UTC)
    LAKE/items.parquet, users.parquet                      what was put over HTTP about items and users
    LAKE/impressions/date=.../batch-N.parquet              what was shown, a row an item
    LAKE/examples/date=.../batch-N.parquet                 the same with what became of it: labelled
    LAKE/dataset.json                                      for `prepare`
    LAKE/compaction.json                                   how far the log is in here; written last

A batch counts once `compaction.json` names its files. Files that it does not
name are what a crash left; the next run removes them and writes that batch again.
"""

from dataclasses import asdict, dataclass, field

import polars as pl
import pyarrow as pa

from raysys import storage
from raysys.config import from_dict
from raysys.errors import ConfigError

STATE, DATASET = "compaction.json", "dataset.json"
INTERACTIONS, IMPRESSIONS, EXAMPLES, ITEMS, USERS = "interactions", "impressions", "examples", "items", "users"
PARTITIONED = (INTERACTIONS, IMPRESSIONS, EXAMPLES)
FORMAT = 1
TIME = pl.Datetime("us", "UTC")


@dataclass(frozen=True)
class LakeFile:
    """One file of a batch: rows, and when the service took in the first and the last of them, UTC epoch seconds."""

    rows: int
    first: float
    last: float


@dataclass(frozen=True)
class Compaction:
    """What is in a lake; see the module.

    Attributes:
        format: of this file.
        offset: of the log; None before the first batch.
        batches: written so far.
        files: path below the lake -> what it holds.
        waiting: batches whose impressions are not labelled yet.
        erased: user key (hex) -> erasure that the lake has carried out.
        deltas: folders that `--delta` wrote, for erasure.
        duplicates: events left out because their id was there already.
    """

    format: int = FORMAT
    offset: str | None = None
    batches: int = 0
    files: dict[str, LakeFile] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    erased: dict[str, float] = field(default_factory=dict)
    deltas: list[str] = field(default_factory=list)
    duplicates: int = 0

    def of(self, table: str, batch: int | None = None) -> dict[str, LakeFile]:
        """Files of a table, of one batch where given."""
        end = "" if batch is None else f"/{batch_name(batch)}"
        return {path: file for path, file in self.files.items() if path.startswith(f"{table}/") and path.endswith(end)}


def load(lake: str) -> Compaction:
    """What is in a lake, after removing what a crash left.

    Raises:
        ConfigError: the folder holds something else, or was written by another version.
    """
    if not storage.exists(storage.join(lake, STATE)):
        names = storage.list_dir(lake) if storage.is_dir(lake) else []
        if (
            storage.exists(lake)
            and not storage.is_dir(lake)
            or set(names) - {*PARTITIONED, f"{ITEMS}.parquet", f"{USERS}.parquet", DATASET}
        ):
            raise ConfigError(
                f"{lake}: expected a new folder or a lake of an earlier `raysys compact`, found {', '.join(names[:5]) or 'a file'}"
            )
        found = Compaction()
    else:
        values = storage.read_json(storage.join(lake, STATE))
        if values.get("format") != FORMAT:
            raise ConfigError(f"{lake}: expected a lake of format {FORMAT}, found {values.get('format')}; compact into a new folder")
        found = from_dict(Compaction, values, where=STATE)
    for table in PARTITIONED:
        folder = storage.join(lake, table)
        for name in storage.list_files(folder) if storage.is_dir(folder) else ():
            if f"{table}/{name}" not in found.files:
                storage.remove(storage.join(folder, name))
    return found


def save(lake: str, compaction: Compaction) -> None:
    """Commit: from here on these files count."""
    storage.write_json(storage.join(lake, DATASET), {"source": "raysys compact", "time": "utc"})
    storage.write_json(storage.join(lake, STATE), asdict(compaction))


def write_days(lake: str, table: str, batch: int, rows: pl.DataFrame) -> dict[str, LakeFile]:
    """Write a batch, a file a day of `timestamp`.

    Args:
        lake: folder.
        table: one of PARTITIONED.
        batch: number.
        rows: with `timestamp` (UTC) and `received` (epoch seconds).

    Returns:
        Path below the lake -> what it holds.
    """
    files = {}
    for (day,), part in rows.sort("timestamp", "received", maintain_order=True).group_by(
        pl.col("timestamp").dt.date(), maintain_order=True
    ):
        path = f"{table}/date={day}/{batch_name(batch)}"
        storage.make_dir(storage.join(lake, path.rpartition("/")[0]))
        storage.write_table(storage.join(lake, path), plain(part))
        files[path] = LakeFile(len(part), float(part["received"].min()), float(part["received"].max()))  # type: ignore[arg-type]
    return files


def read_files(lake: str, paths: list[str], columns: list[str] | None = None) -> pl.DataFrame:
    """Rows of some files of one table."""
    return pl.concat([pl.DataFrame(storage.read_table(storage.join(lake, path), columns)) for path in sorted(paths)])


def plain(frame: pl.DataFrame) -> pa.Table:
    """Arrow with the ordinary string and list types, which every reader knows."""
    table = frame.to_arrow()
    kinds = {pa.large_string(): pa.string(), pa.large_list(pa.large_string()): pa.list_(pa.string())}
    return table.cast(pa.schema([(field.name, kinds.get(field.type, field.type)) for field in table.schema]))


def batch_name(batch: int) -> str:
    """File name of a batch."""
    return f"batch-{batch:08d}.parquet"
