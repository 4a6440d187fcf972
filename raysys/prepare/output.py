"""The working folder beside a prepared set: resumed after a crash, and in the end put in the set's place.

A reader sees the old set or the new one. The manifest in the working folder is the commit:
once it is there the new set is complete, and whoever prepares next to the same place first
finishes the replacement that a crash interrupted.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

from raysys import storage
from raysys.errors import ConfigError, RaysysError
from raysys.prepare.dataset import FORMAT, MANIFEST

STEPS = "steps"
"""Subfolder of the working folder for what does not belong to the prepared set."""


def step(work: str, *parts: str) -> str:
    """A path below the steps of a working folder."""
    return storage.join(work, STEPS, *parts)


def check_target(out: str) -> None:
    """Refuse to replace anything but a prepared set or an empty folder.

    Raises:
        ConfigError: `out` holds something else.
    """
    if not storage.exists(out):
        return
    if not storage.is_dir(out):
        raise ConfigError(f"{out}: expected a folder to write to, found a file; choose another --out")
    names = storage.list_dir(out)
    manifest = storage.join(out, MANIFEST)
    ours = MANIFEST in names and str(storage.read_json(manifest).get("format", "")).startswith(FORMAT.split("/")[0])
    if names and not ours:
        raise ConfigError(f"{out}: expected a new or empty folder, or a prepared set to replace, found {names[0]!r}; choose another --out")


def work_key(facts: dict) -> str:
    """Name of the work on certain inputs with certain settings; other inputs or settings never go on with it."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@contextmanager
def working_folder(out: str, key: str) -> Iterator[str]:
    """A folder beside `out` that becomes `out` when the block ends well.

    An error of the user's removes it. Whatever else stops the block (a crash, a kill, Ctrl-C, a
    cluster that went away) leaves it, and the next call with the same key finds its files there.
    One call at a time may prepare to one `out`.
    """
    work = storage.beside(out, f".work-{key}")
    storage.make_dir(work)
    try:
        yield work
    except RaysysError:
        storage.remove(work)
        raise
    _replace(work, out)
    _remove_leftovers(out)


def recover(out: str) -> None:
    """Finish a replacement that was interrupted after its set was complete, and check what is there now.

    Raises:
        ConfigError: `out` holds something that is not a prepared set.
    """
    for work in _beside(out, "work"):
        if storage.exists(storage.join(work, MANIFEST)):
            _replace(work, out)
    check_target(out)


def _replace(work: str, out: str) -> None:
    storage.remove(storage.join(work, STEPS))
    if storage.is_local(out):
        storage.replace_dir(storage.resolve(work)[1], storage.resolve(out)[1])
        return
    # Object stores cannot rename a folder: the files are copied and the manifest comes last, so that for a
    # while there is a folder without manifest, which readers refuse, and never a mixture.
    storage.remove(storage.join(out, MANIFEST))
    storage.remove(out)
    for name in storage.list_files(work):
        if name != MANIFEST:
            storage.copy_file(storage.join(work, name), storage.join(out, name))
    storage.copy_file(storage.join(work, MANIFEST), storage.join(out, MANIFEST))
    storage.remove(storage.join(work, MANIFEST))  # from here on the working folder counts as unfinished
    storage.remove(work)


def _remove_leftovers(out: str) -> None:
    for kind in ("work", "old"):
        for folder in _beside(out, kind):
            storage.remove(folder)


def _beside(out: str, kind: str) -> list[str]:
    path, options = storage.split_options(out)
    parent, _, name = path.rstrip("/").rpartition("/")
    parent = (parent or "/") + options
    return [storage.join(parent, found) for found in storage.list_dir(parent) if found.startswith(f"{name}.{kind}-")]
