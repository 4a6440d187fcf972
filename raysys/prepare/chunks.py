"""Cut the interaction files into chunks of about equal size, and read a chunk in batches. No Ray, no judgement of rows.

A chunk holds pieces of one or many files: row groups of a Parquet file, a byte range of a
CSV file. Many small files share a chunk and a huge file has many, so the number of tasks
follows the number of rows. What cannot be cut (one row group, one .gz) is streamed in batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from raysys import storage
from raysys.prepare.source import USED_COLUMNS, SourceFile, csv_options, is_text
from raysys.schema import EVENT, ITEM_ID, USER_ID

CSV_BYTES_PER_ROW = 30
LINE_BLOCK = 1 << 16


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one file.

    Attributes:
        file: where from.
        number: position among the pieces of the file.
        rows: how many, for CSV a guess by size.
        row_groups: of a Parquet file.
        start, stop: bytes of a CSV file; the piece is the lines that begin in [start, stop). A .gz has one piece.
    """

    file: SourceFile
    number: int
    rows: int
    row_groups: tuple[int, ...] = ()
    start: int = 0
    stop: int | None = None

    @property
    def key(self) -> str:
        """Unique name, in the order of rows."""
        return f"{self.file.rank:06d}-{self.number:06d}"


def plan_chunks(files: list[SourceFile], chunk_rows: int) -> list[tuple[Piece, ...]]:
    """Pieces of all files in order, grouped to chunks of at most about `chunk_rows` rows."""
    chunks: list[tuple[Piece, ...]] = []
    open_chunk: list[Piece] = []
    rows = 0
    for file in files:
        for piece in _pieces(file, chunk_rows):
            if open_chunk and rows + piece.rows > chunk_rows:
                chunks.append(tuple(open_chunk))
                open_chunk, rows = [], 0
            open_chunk.append(piece)
            rows += piece.rows
    return [*chunks, tuple(open_chunk)] if open_chunk else chunks


def _pieces(file: SourceFile, chunk_rows: int) -> Iterator[Piece]:
    if file.format == "csv":
        guess = file.size_bytes // CSV_BYTES_PER_ROW
        if file.uri.endswith(".gz"):
            yield Piece(file, 0, guess)
            return
        # As many equal ranges as a file needs, so that the last one is no crumb.
        cuts = max(1, -(-guess // chunk_rows))
        bounds = [file.size_bytes * cut // cuts for cut in range(cuts + 1)]
        for number, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            yield Piece(file, number, guess // cuts, (), start, stop)
        return
    groups: list[int] = []
    rows = number = 0
    for index, count in enumerate(file.row_groups):
        if rows and rows + count > chunk_rows:
            yield Piece(file, number, rows, tuple(groups))
            groups, rows, number = [], 0, number + 1
        groups.append(index)
        rows += count
    if rows:
        yield Piece(file, number, rows, tuple(groups))


def read_piece(piece: Piece, ragged: list[dict], batch_rows: int) -> Iterator[pa.Table]:
    """Yield the used columns of a piece under their names in the contract, raw types, text ids as dictionaries.

    Args:
        piece: what to read.
        ragged: CSV lines with a wrong number of fields are appended here: `row` in the piece, and `line`.
        batch_rows: about how many rows a table may hold.
    """
    file = piece.file
    wanted = {name: file.columns[name] for name in USED_COLUMNS if name in file.columns}
    filesystem, path = storage.resolve(file.uri)
    if file.format == "csv":
        yield from _read_csv(piece, wanted, ragged)
        return
    with filesystem.open_input_file(path) as stream:
        # Dictionary pages stay dictionaries: ids are then checked and hashed once for each distinct id, not for each row.
        schema = pq.read_schema(stream)
        encoded = [wanted[name] for name in (USER_ID, ITEM_ID, EVENT) if name in wanted and is_text(schema.field(wanted[name]).type)]
        stream.seek(0)
        reader = pq.ParquetFile(stream, read_dictionary=encoded)
        names = list(wanted.values())
        if piece.rows <= 2 * batch_rows:
            yield reader.read_row_groups(list(piece.row_groups), columns=names).select(names).rename_columns(list(wanted))
            return
        for batch in reader.iter_batches(batch_rows, row_groups=list(piece.row_groups), columns=names):
            yield pa.Table.from_batches([batch]).select(names).rename_columns(list(wanted))


def _read_csv(piece: Piece, wanted: dict[str, str], ragged: list[dict]) -> Iterator[pa.Table]:
    file, header = piece.file, int(piece.start == 0)

    def set_aside(bad: pacsv.InvalidRow) -> str:
        # The number counts lines from 1, a skipped header line included.
        ragged.append({"row": (bad.number or 1 + header) - 1 - header, "line": bad.text})
        return "skip"

    options = csv_options(file.header, file.delimiter)
    options["parse_options"].invalid_row_handler = set_aside
    options["convert_options"].include_columns = list(wanted.values())
    filesystem, path = storage.resolve(file.uri)
    if path.endswith(".gz"):
        stream = filesystem.open_input_stream(path, compression="gzip")
    else:
        stream = pa.BufferReader(_lines(piece))
        options["read_options"].skip_rows = header
        if stream.size() == 0:
            return
    with stream, pacsv.open_csv(stream, **options) as reader:
        for batch in reader:
            yield pa.Table.from_batches([batch]).rename_columns(list(wanted))


def _lines(piece: Piece) -> pa.Buffer:
    """The bytes of the lines that begin in [start, stop). Cells hold no line breaks, so every line break ends a row."""
    filesystem, path = storage.resolve(piece.file.uri)
    with filesystem.open_input_file(path) as stream:
        size = stream.size()
        first = 0 if piece.start == 0 else _next_line(stream, piece.start, size)
        last = size if piece.stop is None or piece.stop >= size else _next_line(stream, piece.stop, size)
        return stream.read_at(last - first, first) if last > first else pa.py_buffer(b"")


def _next_line(stream: pa.NativeFile, at: int, size: int) -> int:
    """Where the first line at or after byte `at` begins."""
    at -= 1  # a line that begins exactly at `at` follows the line break at `at - 1`
    while at < size:
        block = bytes(stream.read_at(min(LINE_BLOCK, size - at), at))
        found = block.find(b"\n")
        if found >= 0:
            return at + found + 1
        at += len(block)
    return size
