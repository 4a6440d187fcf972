"""What a prepared set keeps of its past, so that new events can be added without reading the old files again.

The cleaned events in order by partition (`raw/part-*.parquet`), the attribute tables as they
were read, and sums of what was read and refused (`raw` in the manifest).
"""

from dataclasses import dataclass
from typing import cast

import polars as pl

from raysys import config as settings
from raysys import storage
from raysys.errors import ConfigError
from raysys.prepare.config import PrepareConfig
from raysys.prepare.dataset import ITEMS, QUARANTINE, RAW, USERS, Prepared
from raysys.prepare.tables import AttributeTable, plain_table
from raysys.prepare.tasks import part_name
from raysys.schema import ITEM_ID, USER_ID

LAYOUT_ONLY = ("partitions", "rows_per_partition", "rows_per_chunk", "keep_raw")
"""Settings that do not change the result; all others must be those of the set that is appended to."""
TABLES = ((ITEMS, ITEM_ID), (USERS, USER_ID))


@dataclass(frozen=True)
class Past:
    """The calls of prepare that made a set; none for a new one.

    Attributes:
        calls: how many. partitions: of the raw events, 0 without any. files: read so far.
        facts: sums of the chunk reports. file_notes: what was understood of the files.
        duplicates: replaced rows of the item and the user table.
    """

    calls: int = 0
    partitions: int = 0
    files: int = 0
    facts: dict | None = None
    file_notes: tuple[str, ...] = ()
    duplicates: tuple[int, int] = (0, 0)

    def as_dict(self) -> dict:
        """For the manifest."""
        return dict(vars(self))


def open_kept(out: str, split: str | None, config: PrepareConfig | None) -> tuple[Prepared, Past, PrepareConfig]:
    """The set to append to, and the settings that it was made with.

    Raises:
        SchemaError: there is no prepared set.
        ConfigError: it kept no raw events, or split or settings differ from those it was made with.
    """
    prepared = Prepared.open(out)
    manifest = prepared.manifest
    if not manifest.get("raw"):
        raise ConfigError(
            f"{out}: expected a set that kept its raw events, found one without raw/; prepare all data again with keep_raw: true"
        )
    if split not in (None, manifest["split"]):
        raise ConfigError(f"--append: expected the split of {out}, {manifest['split']}, got {split}; leave --split out")
    old = settings.from_dict(PrepareConfig, manifest["config"])
    if config is not None:
        differ = [
            name for name, value in settings.to_dict(config).items() if name not in LAYOUT_ONLY and value != settings.to_dict(old)[name]
        ]
        if differ:
            raise ConfigError(
                f"--append: expected the settings of {out}, found another {differ[0]}; leave it out, or prepare all data again"
            )
    facts = dict(manifest["raw"])
    facts["file_notes"], facts["duplicates"] = tuple(facts["file_notes"]), tuple(facts["duplicates"])
    return prepared, Past(**facts), old


def partition_uris(prepared: Prepared, past: Past) -> list[str]:
    """The raw file of every partition."""
    return [storage.join(prepared.uri, RAW, part_name(number)) for number in range(past.partitions)]


def save_tables(work: str, items: AttributeTable, users: AttributeTable) -> None:
    """Keep the attribute tables as they were read."""
    for (name, _), table in zip(TABLES, (items, users), strict=True):
        if len(table.rows):
            storage.write_table(storage.join(work, RAW, name), plain_table(table.rows))


def add_tables(prepared: Prepared, past: Past, new: tuple[AttributeTable, AttributeTable]) -> tuple[AttributeTable, AttributeTable]:
    """The kept attribute tables with the new rows laid over them; the last row of an id wins, as within one table."""
    merged = []
    for (name, column), duplicates, table in zip(TABLES, past.duplicates, new, strict=True):
        old = AttributeTable(column)
        old.duplicates = duplicates
        if storage.exists(storage.join(prepared.uri, RAW, name)):
            old.rows = cast(pl.DataFrame, pl.from_arrow(storage.read_table(storage.join(prepared.uri, RAW, name))))
        if storage.exists(storage.join(prepared.uri, QUARANTINE, name)):
            old.bad = cast(pl.DataFrame, pl.from_arrow(storage.read_table(storage.join(prepared.uri, QUARANTINE, name))))
        merged.append(old.extended(table))
    return merged[0], merged[1]
