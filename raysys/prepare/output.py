"""Replace one prepared set by another, so that a reader sees the old one or the new one."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from raysys import storage
from raysys.errors import ConfigError
from raysys.prepare.dataset import FORMAT, MANIFEST


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


@contextmanager
def working_folder(out: str) -> Iterator[str]:
    """A folder beside `out` that becomes `out` when the block ends well, and is removed when it fails.

    Local folders are renamed. Object stores cannot rename a folder: the new files are copied
    over and the manifest is written last, so an interrupted copy leaves a folder without
    manifest, which readers refuse, and never a mixture.
    """
    check_target(out)
    work = storage.beside(out, f".tmp-{secrets.token_hex(4)}")
    storage.make_dir(work)
    try:
        yield work
        _replace_local(work, out) if storage.is_local(out) else _replace_remote(work, out)
    finally:
        storage.remove(work)


def _replace_local(work: str, out: str) -> None:
    source, target = storage.resolve(work)[1], storage.resolve(out)[1]
    old = f"{target}.old-{secrets.token_hex(4)}"
    if os.path.exists(target):
        os.rename(target, old)
    os.rename(source, target)
    storage.sync_dir(os.path.dirname(target))
    storage.remove(old)


def _replace_remote(work: str, out: str) -> None:
    manifest = storage.read_json(storage.join(work, MANIFEST))
    storage.remove(storage.join(work, MANIFEST))
    storage.remove(storage.join(out, MANIFEST))
    storage.remove(out)
    storage.copy_tree(work, out)
    storage.write_json(storage.join(out, MANIFEST), manifest)
