"""Read text sources: find the file that is meant, decode it, split it into columns."""

import gzip
from collections.abc import Iterator, Sequence

import polars as pl

from raysys import storage
from raysys.errors import SchemaError


def find_file(src: str, suffixes: Sequence[str], what: str) -> str:
    """The source itself if it is a file, else the one file in the folder whose name ends with a suffix.

    Raises:
        SchemaError: there is none, or more than one.
    """
    if not storage.is_dir(src):
        if not src.endswith(tuple(suffixes)):
            raise SchemaError(f"{src}: expected {what} (a name that ends in {', '.join(suffixes)}), or its folder")
        return src
    names = [name for name in storage.list_dir(src) if name.endswith(tuple(suffixes))]
    if len(names) != 1:
        found = ", ".join(names or storage.list_dir(src)[:8]) or "an empty folder"
        raise SchemaError(f"{src}: expected one file of {what} (*{', *'.join(suffixes)}), found {found}")
    return storage.join(src, names[0])


def decode(content: bytes, name: str) -> str:
    """UTF-8 where it is valid, else Latin-1 (the GroupLens files); without a byte order mark.

    Raises:
        SchemaError: the content is binary.
    """
    if b"\0" in content[:4096]:
        raise SchemaError(f"{name}: expected text, found binary data")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def read_text(uri: str) -> str:
    """Whole text of a file, gzip understood.

    Raises:
        SchemaError: it is empty or binary.
    """
    content = storage.read_bytes(uri)
    if uri.endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError) as error:
            raise SchemaError(f"{uri}: expected gzip data, found something else ({error})") from None
    if not content.strip():
        raise SchemaError(f"{uri}: expected data, found an empty file")
    return decode(content, uri)


def read_lines(uri: str) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of every line that is not blank."""
    for number, line in enumerate(read_text(uri).splitlines(), start=1):
        if line.strip():
            yield number, line


def read_fields(uri: str, separator: str, names: Sequence[str] | None = None) -> pl.DataFrame:
    """A delimited file without quoting as text columns.

    Args:
        uri: the file.
        separator: between fields; may be longer than a character.
        names: column names; None takes the first line as header.

    Raises:
        SchemaError: a line has another number of fields than the header or `names`.
    """
    lines = read_lines(uri)
    if names is None:
        names = next(lines)[1].rstrip("\r\n").split(separator)
    rows = []
    for number, line in lines:
        fields = line.rstrip("\r\n").split(separator)
        if len(fields) != len(names):
            raise SchemaError(
                f"{uri}: line {number}: expected {len(names)} fields separated by {separator!r} ({', '.join(names)}), found {len(fields)}"
            )
        rows.append(fields)
    return pl.DataFrame(rows, schema={name: pl.String for name in names}, orient="row")


def to_number(frame: pl.DataFrame, column: str, kind: type[pl.DataType], uri: str) -> pl.Series:
    """A text column as numbers; empty text is null.

    Raises:
        SchemaError: a field is no number, with its row.
    """
    text = frame[column].str.strip_chars()
    text = text.set(text == "", None)
    number = text.cast(kind, strict=False)
    wrong = number.is_null() & text.is_not_null()
    if wrong.any():
        row = int(wrong.arg_true()[0])
        raise SchemaError(f"{uri}: column {column!r}, data row {row + 1}: expected a number, found {text[row]!r}")
    return number
