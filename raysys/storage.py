"""The only door to files: local paths and `pyarrow.fs` URIs, atomic writes, checksums.

Local writes go to a temporary file in the same folder, are flushed to disk and
renamed; object stores publish an object only when its upload is complete, so
there a plain write has the same effect.
"""

import functools
import hashlib
import json
import os
import secrets
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from raysys.errors import ConfigError, SchemaError


def home() -> Path:
    """Folder of defaults for registry, log, state and secrets: `$RAYSYS_HOME` or `~/.raysys`."""
    return Path(os.environ.get("RAYSYS_HOME") or Path.home() / ".raysys")


def resolve(uri: str | os.PathLike) -> tuple[pafs.FileSystem, str]:
    """Split a path or URI into a file system and a path on it.

    Raises:
        ConfigError: the scheme is unknown or the URI is malformed.
    """
    text = os.fspath(uri)
    if "://" not in text:
        return pafs.LocalFileSystem(), os.path.abspath(text)
    scheme, rest = text.split("://", 1)
    path, mark, options = rest.partition("?")
    authority, slash, inside = path.partition("/")
    try:
        if scheme == "s3" and not authority:
            raise pa.ArrowInvalid("it names no bucket")
        if scheme == "s3":
            # A client costs a lookup of the bucket's region and its own connections: one for all paths of a bucket.
            filesystem, bucket = _open(f"{scheme}://{authority}{mark}{options}")
            return filesystem, f"{bucket}{slash}{inside}".rstrip("/")
        return pafs.FileSystem.from_uri(text)
    except (pa.ArrowInvalid, OSError, NotImplementedError) as error:
        raise ConfigError(f"cannot open {text!r}: expected a local path or a file://, s3://, gs:// or hdfs:// URI ({error})") from None


@functools.lru_cache(maxsize=32)
def _open(root: str) -> tuple[pafs.FileSystem, str]:
    return pafs.FileSystem.from_uri(root)


def is_local(uri: str | os.PathLike) -> bool:
    """Whether the URI names a file of this machine."""
    text = os.fspath(uri)
    return "://" not in text or text.startswith("file://")


def join(uri: str | os.PathLike, *parts: str) -> str:
    """Append path parts to a path or URI; options of a URI (`?endpoint_override=...`) stay at its end."""
    path, options = split_options(uri)
    return "/".join([path.rstrip("/"), *(part.strip("/") for part in parts)]) + options


def beside(uri: str | os.PathLike, suffix: str) -> str:
    """The path or URI with `suffix` appended to its last name: where work in progress stands until it becomes `uri`."""
    path, options = split_options(uri)
    return path.rstrip("/") + suffix + options


def relative(uri: str | os.PathLike, base: str | os.PathLike) -> str:
    """The part of a path or URI below `base`, without options; the whole where it is not below it."""
    path, folder = split_options(uri)[0], split_options(base)[0]
    return path[len(folder) :].lstrip("/") if path.startswith(folder) else path


def split_options(uri: str | os.PathLike) -> tuple[str, str]:
    """A path or URI without its options, and the options with their question mark; a local path has none."""
    text = os.fspath(uri)
    if "://" not in text:
        return text, ""
    path, mark, options = text.partition("?")
    return path, mark + options


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    filesystem, path = resolve(uri)
    return filesystem.get_file_info(path).type != pafs.FileType.NotFound


def is_dir(uri: str) -> bool:
    """Whether a folder is there."""
    filesystem, path = resolve(uri)
    return filesystem.get_file_info(path).type == pafs.FileType.Directory


def list_dir(uri: str) -> list[str]:
    """Names directly inside a folder, sorted; empty when the folder is missing."""
    filesystem, path = resolve(uri)
    infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in infos)


def list_files(uri: str) -> list[str]:
    """Paths of all files below a folder, relative to it, sorted."""
    filesystem, path = resolve(uri)
    infos = filesystem.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    return sorted(os.path.relpath(info.path, path) for info in infos if info.type == pafs.FileType.File)


def make_dir(uri: str) -> None:
    """Create a folder and its parents."""
    filesystem, path = resolve(uri)
    filesystem.create_dir(path, recursive=True)


def remove(uri: str) -> None:
    """Remove a file or a whole folder; no error when it is missing."""
    filesystem, path = resolve(uri)
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        filesystem.delete_dir(path)
    elif kind == pafs.FileType.File:
        filesystem.delete_file(path)


def read_bytes(uri: str) -> bytes:
    """Whole content of a file."""
    filesystem, path = resolve(uri)
    with filesystem.open_input_stream(path) as stream:
        return stream.read()


def write_bytes(uri: str, content: bytes | memoryview | pa.Buffer) -> None:
    """Write a file atomically: a reader sees the old content or the new one."""
    filesystem, path = resolve(uri)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        with filesystem.open_output_stream(path) as stream:
            stream.write(content)
        return
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temporary = f"{path}.tmp-{secrets.token_hex(6)}"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    sync_dir(folder)


def sync_dir(folder: str) -> None:
    """Make the names inside a local folder durable (a rename is not, until its folder is synced)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_dir(source: str, target: str) -> None:
    """Rename a finished local folder into place; an older one there is moved aside (`TARGET.old-...`) first, then removed."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    old = f"{target}.old-{secrets.token_hex(6)}"
    if os.path.exists(target):
        os.rename(target, old)
    os.rename(source, target)
    sync_dir(os.path.dirname(target))
    remove(old)


def read_json(uri: str) -> dict:
    """Parse a JSON file.

    Raises:
        SchemaError: it is not JSON.
    """
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise SchemaError(f"{uri}: expected JSON, {error}") from None


def write_json(uri: str, value: object) -> None:
    """Write a JSON file atomically, with a final newline."""
    write_bytes(uri, (json.dumps(value, indent=2, sort_keys=False, default=str) + "\n").encode())


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Read one Parquet file or a folder of them (files in name order)."""
    filesystem, path = resolve(uri)
    if filesystem.get_file_info(path).type == pafs.FileType.Directory:
        names = [name for name in list_dir(uri) if name.endswith(".parquet")]
        if not names:
            raise SchemaError(f"{uri}: expected *.parquet files, found none")
        tables = [pq.read_table(f"{path}/{name}", columns=columns, filesystem=filesystem) for name in names]
        return pa.concat_tables(tables, promote_options="permissive")
    return pq.read_table(path, columns=columns, filesystem=filesystem)


def write_table(uri: str, table: pa.Table) -> None:
    """Write one Parquet file atomically."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(uri, sink.getvalue())


def sha256(uri: str) -> str:
    """Hex digest of a file's content."""
    filesystem, path = resolve(uri)
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path) as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def copy_file(source: str, target: str) -> None:
    """Copy one file to another path or URI, atomically."""
    write_bytes(target, read_bytes(source))


def copy_tree(source: str, target: str) -> None:
    """Copy all files of a folder to another path or URI."""
    source_fs, source_path = resolve(source)
    target_fs, target_path = resolve(target)
    target_fs.create_dir(target_path, recursive=True)
    pafs.copy_files(source_path, target_path, source_filesystem=source_fs, destination_filesystem=target_fs)
