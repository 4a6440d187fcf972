"""From the event log to a lake, exactly once: `raysys compact`, the story in one function.

Reads on from the offset in the lake's own `compaction.json`, which is written
after the files of a batch: a run that was killed is repeated from there, over
what it left. Then it labels impressions whose window is over, carries out
erasures in lake, log and dead letters, and drops what the log need not keep.
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from raysys import storage
from raysys.events.dead_letters import dead_letter_folder, erase_letters
from raysys.events.identity import user_key
from raysys.events.log import Record, Tombstones, open_log
from raysys.events.retention import Retention, retain
from raysys.lake import examples, layout, rows
from raysys.lake.layout import EXAMPLES, IMPRESSIONS, INTERACTIONS, ITEMS, USERS, Compaction
from raysys.schema import EVENT_ID, ITEM_ID, USER_ID

TASK = "compact"
SETTLE_S = 60.0
"""An impression's window counts as over so long after its end: what was answered by then is in the log that was read."""


@dataclass(frozen=True)
class CompactConfig:
    """How a log becomes a lake."""

    batch_records: int = 500_000
    """Records of a batch at most; about 1.5 kB of memory each."""
    window_s: float = 86_400.0
    """How long after an impression feedback counts for it, seconds."""
    dedupe_s: float = 7 * 86_400.0
    """How far back an `event_id` is looked for in the lake, seconds; that of the state is 7 days too."""
    pseudonyms: bool = False
    """Write keyed hashes instead of user and session ids."""

    def __post_init__(self) -> None:
        for name in ("batch_records", "window_s", "dedupe_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")


def compact(
    events: str,
    lake: str,
    *,
    config: CompactConfig | None = None,
    retention: Retention | None = None,
    delta: str | None = None,
    dead_letters: str | None = None,
    clock: Callable[[], float] = time.time,
) -> dict:
    """Take over what is new in the log; see the module.

    Args:
        events: location of the log.
        lake: folder of the lake, path or URI.
        config: settings.
        retention: what the log need not keep afterwards; everything is kept when None.
        delta: folder for one more copy of each new batch, `DELTA/batch-N`, for `prepare --append`.
        dead_letters: folder of refused records; where the service puts them when None.
        clock: UTC epoch seconds now.

    Returns:
        Counts, for the closing table.

    Raises:
        StateError: another compaction of this log runs, or the log cannot be read.
        ConfigError: `lake` holds something else.
    """
    config = config or CompactConfig()
    log = open_log(events)
    try:
        with log.exclusive(TASK):
            before = layout.load(lake)
            after, skipped = before, 0
            while True:
                records, offset = log.read(after.offset, config.batch_records)
                if not records:
                    break
                after, unknown = _add_batch(lake, after, records, offset, config, delta)
                skipped += unknown
            labelled = 0
            for batch in list(after.waiting):
                after, count = _label_batch(lake, after, batch, config, clock())
                labelled += count
            after, erased = _erase(lake, after, log.tombstones())
            overwritten = log.overwrite_erased()
            letters = erase_letters(dead_letter_folder(events, dead_letters), log.tombstones())
            if after.offset is not None:
                log.commit(consumer(lake), after.offset)
            dropped = retain(log, retention or Retention(), now=clock())
    finally:
        log.close()
    old, new = before.of(INTERACTIONS), after.of(INTERACTIONS)
    return {
        "events": sum(file.rows for path, file in new.items() if path not in old),
        "duplicates": after.duplicates - before.duplicates,
        "batches": after.batches - before.batches,
        "labelled": labelled,
        "patched only": skipped,
        "erased": erased + overwritten + letters,
        "segments dropped": dropped.segments,
        "segments held": dropped.held,
        "dropped unread": dropped.unread,
    }


def consumer(lake: str) -> str:
    """The name under which a lake reads the log."""
    return f"{TASK}-{hashlib.sha256(lake.rstrip('/').encode()).hexdigest()[:8]}"


def _add_batch(
    lake: str, at: Compaction, records: Sequence[Record], offset: str, config: CompactConfig, delta: str | None
) -> tuple[Compaction, int]:
    batch = at.batches + 1
    told = rows.interactions(records, pseudonyms=config.pseudonyms)
    new = _without_known(lake, at, told, config.dedupe_s)
    shown = rows.impressions(records, pseudonyms=config.pseudonyms)
    files = {**layout.write_days(lake, INTERACTIONS, batch, new), **layout.write_days(lake, IMPRESSIONS, batch, shown)}
    skipped = sum(_update_table(lake, *table, records, config.pseudonyms) for table in ((ITEMS, ITEM_ID), (USERS, USER_ID)))
    deltas = at.deltas
    if delta is not None and len(new):
        folder = storage.join(delta, f"batch-{batch:08d}")
        storage.make_dir(folder)
        storage.write_table(storage.join(folder, f"{INTERACTIONS}.parquet"), layout.plain(new))
        storage.write_json(storage.join(folder, layout.DATASET), {"source": "raysys compact", "time": "utc"})
        deltas = [*at.deltas, folder]
    num_events = sum(record.get("kind") == "event" for record in records)
    after = dataclasses.replace(
        at,
        offset=offset,
        batches=batch,
        files={**at.files, **files},
        waiting=[*at.waiting, batch] if len(shown) else at.waiting,
        deltas=deltas,
        duplicates=at.duplicates + num_events - len(new),
    )
    layout.save(lake, after)
    return after, skipped


def _without_known(lake: str, at: Compaction, told: pl.DataFrame, dedupe_s: float) -> pl.DataFrame:
    """The events whose id no file of the last `dedupe_s` has; memory follows the batch, not the lake."""
    ids = told[EVENT_ID].drop_nulls()
    if not len(ids):
        return told
    wanted, since = pa.array(ids.to_list(), pa.string()), float(told["received"].min()) - dedupe_s  # type: ignore[arg-type]
    known: set[str] = set()
    for path, file in at.of(INTERACTIONS).items():
        if file.last >= since:
            column = storage.read_table(storage.join(lake, path), [EVENT_ID])[EVENT_ID]
            known.update(column.filter(pc.is_in(column, value_set=wanted)).to_pylist())
    known.discard(None)  # type: ignore[arg-type]
    return told.filter(pl.col(EVENT_ID).is_null() | ~pl.col(EVENT_ID).is_in(list(known))) if known else told


def _update_table(lake: str, name: str, column: str, records: Sequence[Record], pseudonyms: bool) -> int:
    """Lay changes of items or users over their table; doing it again changes nothing. How many changes had nothing to change."""
    uri = storage.join(lake, f"{name}.parquet")
    old = storage.read_table(uri).to_pylist() if storage.exists(uri) else []
    known = {row.pop(column): {key: value for key, value in row.items() if value is not None} for row in old}
    table, skipped = rows.attributes(known, records, column, pseudonyms=pseudonyms)
    if table != known:
        storage.make_dir(lake)
        storage.write_table(uri, layout.plain(rows.attribute_frame(table, column)))
    return skipped


def _label_batch(lake: str, at: Compaction, batch: int, config: CompactConfig, now: float) -> tuple[Compaction, int]:
    """Write the examples of a batch whose windows are over; rows written."""
    shown = at.of(IMPRESSIONS, batch)
    if not shown:  # all of it was erased
        after = dataclasses.replace(at, waiting=[other for other in at.waiting if other != batch])
        layout.save(lake, after)
        return after, 0
    first, last = min(file.first for file in shown.values()), max(file.last for file in shown.values())
    if last + config.window_s + SETTLE_S > now:
        return at, 0
    near = [path for path, file in at.of(INTERACTIONS).items() if file.last >= first and file.first <= last + config.window_s]
    events = layout.read_files(lake, near) if near else rows.interactions([])
    labelled = examples.label(layout.read_files(lake, list(shown)), events, config.window_s)
    files = layout.write_days(lake, EXAMPLES, batch, labelled)
    waiting = [other for other in at.waiting if other != batch]
    after = dataclasses.replace(at, files={**at.files, **files}, waiting=waiting)
    layout.save(lake, after)
    return after, len(labelled)


def _erase(lake: str, at: Compaction, tombstones: Tombstones) -> tuple[Compaction, int]:
    """Rewrite the files that hold what erased users did until then; rows removed."""
    new = {key: when for key, when in tombstones.items() if at.erased.get(key.hex(), float("-inf")) < when}
    if not new:
        return at, 0
    files, removed = dict(at.files), 0
    for path, file in at.files.items():
        left = _drop_rows(storage.join(lake, path), new)
        removed += file.rows - left
        files[path] = dataclasses.replace(file, rows=left)
    for uri in (storage.join(lake, f"{USERS}.parquet"), *(storage.join(folder, f"{INTERACTIONS}.parquet") for folder in at.deltas)):
        if storage.exists(uri):
            _drop_rows(uri, new)
    erased = {**at.erased, **{key.hex(): when for key, when in new.items()}}
    after = dataclasses.replace(at, files=files, erased=erased)
    layout.save(lake, after)
    return after, removed


def _drop_rows(uri: str, tombstones: Tombstones) -> int:
    """Rewrite a table without the rows of erased users, where it has any; rows left."""
    users = storage.read_table(uri, [USER_ID])[USER_ID]
    found = {user: tombstones[key] for user in pc.unique(users).to_pylist() if user is not None and (key := user_key(user)) in tombstones}
    if not found:
        return len(users)
    table = pl.DataFrame(storage.read_table(uri))
    when = pl.col(USER_ID).replace_strict(found, default=None, return_dtype=pl.Float64)
    left = table.filter(~(pl.col("received") <= when).fill_null(False))
    if len(left) < len(table):
        storage.write_table(uri, layout.plain(left))
    return len(left)
