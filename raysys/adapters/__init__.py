"""Known public formats -> a folder of the data contract. One file per format, no Ray."""

import importlib

from raysys import storage
from raysys.errors import ConfigError

KINDS = {
    "recbole": "raysys.adapters.recbole",
    "movielens": "raysys.adapters.movielens",
    "sequences": "raysys.adapters.sequences",
    "amazon-reviews": "raysys.adapters.amazon",
    "synthetic": "raysys.adapters.synthetic",
}
"""Kind on the command line -> module with `read(src, writer)`, for `synthetic` with `generate(writer, ...)`."""


def import_dataset(
    kind: str,
    src: str | None,
    out: str,
    *,
    users: int = 1000,
    items: int = 500,
    events: int = 50_000,
    seed: int = 0,
    files: int = 0,
    heavy_user: float = 0.0,
    flip: float = 0.0,
) -> dict:
    """Read a known source and write the data contract.

    Args:
        kind: one of KINDS.
        src: file or folder of the source; None for "synthetic".
        out: folder to write; an earlier import there is replaced, anything else is refused.
        users: number of users of "synthetic"; like the next six without effect on other kinds.
        items: number of items.
        events: number of events.
        seed: random seed.
        files: spread the events over so many files by time; 0 = by user, filled one after the other.
        heavy_user: share of all events that one user more has, in [0, 1).
        flip: share of their time after which another law over tastes holds, in [0, 1); 0 for never.

    Returns:
        Summary: `kind`, `out`, rows and columns per table, `time` and `notes`.

    Raises:
        ConfigError: unknown kind, missing or superfluous source, or an `out` that holds something else.
        SchemaError: the source is not of this kind.
    """
    # Below the check of `kind`, so that a typo does not import anything.
    from raysys.adapters.contract import ContractWriter

    if kind not in KINDS:
        raise ConfigError(f"import: expected a kind of {', '.join(KINDS)}, got {kind!r}")
    if (kind == "synthetic") != (src is None):
        expected = "no source" if kind == "synthetic" else "a source file or folder"
        raise ConfigError(f"import {kind}: expected {expected}, got {src!r}")
    if src is not None and not storage.exists(src):
        raise ConfigError(f"import {kind}: {src} does not exist")
    module = importlib.import_module(KINDS[kind])
    with ContractWriter(out, kind) as writer:
        if src is None:
            sizes = {"users": users, "items": items, "events": events, "files": files}
            module.generate(writer, **sizes, seed=seed, heavy_user=heavy_user, flip=flip)
        else:
            module.read(src, writer)
    return writer.summary()
