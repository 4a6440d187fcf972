"""Refused rows on their way to `quarantine/`: written by piece, numbered by file once all pieces are counted."""

import polars as pl

from raysys import storage
from raysys.prepare.dataset import QUARANTINE
from raysys.prepare.output import step


def write(bad: pl.DataFrame, work: str, piece: str, row: int) -> None:
    """Keep refused rows of a piece; the name makes a repeated task write the same file."""
    if len(bad):
        storage.write_table(step(work, "bad", f"{piece}-{row:012d}.parquet"), bad.to_arrow())


def publish(work: str, piece_rows: dict[str, int], call: int) -> None:
    """Turn row numbers within pieces into row numbers of files, and move the rows to `quarantine/`.

    Args:
        work: working folder.
        piece_rows: key of every piece (`RANK-NUMBER`) -> its rows, refused ones included.
        call: how many calls of prepare wrote to the set before; part of the names.
    """
    before: dict[str, int] = {}
    rows_of_file: dict[str, int] = {}
    for key in sorted(piece_rows):
        rank = key.split("-")[0]
        before[key] = rows_of_file.get(rank, 0)
        rows_of_file[rank] = before[key] + piece_rows[key]
    for name in storage.list_dir(step(work, "bad")):
        key = "-".join(name.split("-")[:2])
        bad = pl.DataFrame(storage.read_table(step(work, "bad", name))).with_columns(pl.col("row") + before[key])
        storage.write_table(storage.join(work, QUARANTINE, f"interactions-{call:04d}-{name}"), bad.to_arrow())


def keep(old: str, work: str) -> None:
    """Copy the refused interactions of the set that is appended to."""
    for name in storage.list_dir(storage.join(old, QUARANTINE)):
        if name.startswith("interactions-"):
            storage.copy_file(storage.join(old, QUARANTINE, name), storage.join(work, QUARANTINE, name))
