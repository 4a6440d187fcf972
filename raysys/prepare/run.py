"""Prepare a data set: from raw events to user sequences, the story in one function.

The steps stand in their own files: source.py (which files, which columns), chunks.py and
rows.py (read, clean, refuse), partition.py (split by user), sequences.py (deduplicate, order,
split, encode), vocabulary.py (rows of ids), tables.py (attributes), kept.py (what an append
needs), tasks.py (what one task does), stages.py (where it runs on Ray), output.py (atomic replace).
"""

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

import raysys
from raysys import cluster, storage
from raysys import config as settings
from raysys.errors import ConfigError, SchemaError
from raysys.prepare import kept, output, quarantine, stages
from raysys.prepare.chunks import plan_chunks
from raysys.prepare.config import PrepareConfig
from raysys.prepare.dataset import FORMAT, ITEMS, MANIFEST, QUARANTINE, RAW, USERS, Prepared
from raysys.prepare.kept import Past
from raysys.prepare.manifest import collect_notes, content_fingerprint, count_everything
from raysys.prepare.manifest import summary_rows as summary_rows  # the command line takes it from here
from raysys.prepare.rows import RowRules
from raysys.prepare.sequences import SplitRule
from raysys.prepare.source import DATASET, ITEM_TABLE, USER_TABLE, SourceFile, find_interactions, find_table, open_sources
from raysys.prepare.tables import AttributeTable, items_in_order, read_attributes, users_in_order
from raysys.prepare.tasks import Counting, TimeGrid, sum_reports
from raysys.prepare.vocabulary import build_vocabulary, event_codes, order_items, order_users, resolve_event_types
from raysys.schema import ITEM_ID, SPLIT_KINDS, USER_ID


@dataclass
class Progress:
    """One line a stage: name, rows, seconds."""

    show: bool
    stages: list[dict] = field(default_factory=list)
    last: float = field(default_factory=time.monotonic)

    def done(self, stage: str, rows: int, what: str = "rows") -> None:
        """Note that a stage ended now."""
        now = time.monotonic()
        self.stages.append({"stage": stage, "rows": rows, "seconds": round(now - self.last, 3)})
        if self.show:
            print(f"  prepare  {stage:<18} {rows:>12,} {what:<7} {now - self.last:7.1f} s", flush=True)
        self.last = now


def prepare(
    data: str,
    out: str,
    *,
    split: str | None = None,
    config: PrepareConfig | None = None,
    strict: bool = False,
    append: bool = False,
    progress: bool = True,
) -> dict:
    """Validate, deduplicate, split and encode a data set; needs a running Ray.

    Started again after a crash with the same data, settings and `out`, it goes on where it was.

    Args:
        data: data folder of the contract (Parquet or CSV, one file or many), or one interactions file; path or URI.
        out: folder of the prepared set; an older prepared set there is replaced once the new one is complete.
        split: "leave-one-out" (per user, the default), "time" (global) or "none"; with `append` that of the set.
        config: settings; None for the defaults, with `append` for those of the set.
        strict: make any bad row an error.
        append: `data` holds new events only; the result is that of one call on the old and the new files, the new
            ones named after the old ones.
        progress: print a line a stage.

    Returns:
        The manifest, as written to `out`.

    Raises:
        SchemaError: the data is not what the contract says, or has bad rows under `strict`.
        ConfigError: a setting does not fit, or `out` holds something that is not a prepared set.
    """
    data, out = cluster.location(data, "data"), cluster.location(out, "out").rstrip("/")  # workers have another working directory
    if split is not None and split not in SPLIT_KINDS:
        raise ConfigError(f"split: expected one of {', '.join(SPLIT_KINDS)}, got {split!r}")
    output.recover(out)
    old: Prepared | None = None
    past = Past()
    if append:
        old, past, config = kept.open_kept(out, split, config)
        split = old.manifest["split"]
    split, config = split or "leave-one-out", config or PrepareConfig()
    report = Progress(progress)
    files = open_sources(data, find_interactions(data))
    ordinal = is_ordinal(data, config)
    check_time(data, split, ordinal, old)
    tables = read_tables(data, files[0].uri, ITEM_TABLE, ITEM_ID), read_tables(data, files[0].uri, USER_TABLE, USER_ID)
    items, users = kept.add_tables(old, past, tables) if old else tables
    report.done("tables", len(items.rows) + len(users.rows))
    event_types = config.merged_event_types()
    chunks = plan_chunks(files, config.rows_per_chunk)
    if not chunks:
        raise SchemaError(f"{data}: expected at least one interaction, found {len(files)} Parquet files without rows")
    partitions = past.partitions or stages.num_partitions(files, config)
    key = output.work_key(work_facts(data, files, split, config, partitions, old))
    with output.working_folder(out, key) as work, stages.quiet_ray_data():
        started = start_of(work)
        no_weight = tuple(name for name, kind in event_types.items() if kind.weight == 0)
        rules = RowRules(ordinal, *config.plausible_us(started), no_weight)
        reports = stages.clean(chunks, rules, partitions, config.rows_per_chunk, work)
        for error in (chunk["error"] for chunk in reports if chunk["error"]):
            raise SchemaError(error)
        new = sum_reports(reports)
        facts = sum_reports([past.facts, new]) if past.facts else new
        refused = {**dict(sorted(facts["quarantine"].items())), **items.quarantine, **users.quarantine}
        check_rows(data, new if strict else facts, tables, strict=strict)
        report.done("clean, split", new["rows"])

        grid = TimeGrid.over(facts["first"], facts["last"]) if split == "time" else None
        rule = None if grid else SplitRule(split, min_user_events=config.min_user_events)
        kept_uris = kept.partition_uris(old, past) if old else None
        histogram = stages.order(reports, partitions, kept_uris, Counting(rule, event_types, grid), work)
        report.done("order", facts["good"])
        if grid:
            rule = SplitRule(split, *stages.time_cuts(grid, histogram, config.valid_fraction, config.test_fraction), config.min_user_events)
            stages.count(partitions, rule, event_types, work)
        assert rule is not None
        stats, parts = stages.read_counts(partitions, work)
        if stats.watermark is None:
            raise ConfigError(f"{data}: the {split} split leaves no training events; check min_user_events and the fractions")
        types, notes = resolve_event_types(event_types, stats)
        names, unnamed = event_codes(stats.events)
        item_order = order_items(stats, items.rows[ITEM_ID], split=split, min_item_events=config.min_item_events)
        if not item_order.num_warm:
            raise ConfigError(f"{data}: no item has min_item_events = {config.min_item_events} training events; lower it")
        user_order, user_idx = order_users(parts, users.rows[USER_ID])
        report.done("count", stats.interactions)

        vocabulary = build_vocabulary(item_order, names, types, ordinal=ordinal)
        written = stages.encode(rule, user_idx, vocabulary, work)
        storage.write_table(storage.join(work, ITEMS), items_in_order(item_order.rows, items))
        storage.write_table(storage.join(work, USERS), users_in_order(user_order, users))
        if old:
            quarantine.keep(old.uri, work)
        quarantine.publish(work, {key: rows for chunk in reports for key, rows in chunk["pieces"].items()}, past.calls)
        for name, table in ((ITEMS, items), (USERS, users)):
            if len(table.bad):
                storage.write_table(storage.join(work, QUARANTINE, name), table.bad.to_arrow())
        file_notes = tuple(dict.fromkeys([*past.file_notes, *(note for file in files for note in file.notes)]))
        if config.keep_raw:
            kept.save_tables(work, items, users)
            duplicates = (items.duplicates, users.duplicates)
            past = Past(past.calls + 1, partitions, past.files + len(files), facts, file_notes, duplicates)
        else:
            storage.remove(storage.join(work, RAW))
        report.done("encode, write", written["train"] + written["valid"] + written["test"])
        manifest = {
            "format": FORMAT,
            "created": started.isoformat(timespec="seconds"),
            "config": settings.to_dict(config),
            "split": split,
            "time": "ordinal" if ordinal else "utc",
            "events": names,
            "event_types": {name: settings.to_dict(kind) for name, kind in sorted(types.items())},
            "counts": count_everything(facts, stats, item_order, written, items, users) | {"users_listed": len(user_order)},
            "quarantine": refused,
            "notes": collect_notes(file_notes, facts, items, users, notes, unnamed),
            "watermark": stats.watermark if ordinal else stats.watermark // 1_000_000,
            "raw": past.as_dict() if config.keep_raw else None,
        }
        if split == "time":
            manifest["cuts"] = {"valid_from": rule.valid_from // 1_000_000, "test_from": rule.test_from // 1_000_000}
        manifest["fingerprint"] = content_fingerprint(work, written["sums"], manifest)
        manifest["stages"] = report.stages
        manifest["files"] = [name for name in storage.list_files(work) if not name.startswith(f"{output.STEPS}/")]
        storage.write_json(storage.join(work, MANIFEST), manifest)
    return manifest


def work_facts(data: str, files: list[SourceFile], split: str, config: PrepareConfig, partitions: int, old: Prepared | None) -> dict:
    """All that the files of the working folder depend on."""
    attributes = [uri for stem in (ITEM_TABLE, USER_TABLE) for uri in (find_table(data, stem) if data != files[0].uri else [])]
    return {
        "code": raysys.__version__,
        "interactions": [(file.uri, file.size_bytes, file.modified_ns) for file in files],
        "attributes": [(uri, storage.sha256(uri)) for uri in attributes],
        "split": split,
        "config": settings.to_dict(config),
        "partitions": partitions,
        "append_to": None if old is None else (old.manifest["fingerprint"], old.manifest["created"], old.manifest["raw"]),
    }


def start_of(work: str) -> datetime:
    """When the work began; a call that goes on judges timestamps as the first one did."""
    uri = output.step(work, "started.json")
    if not storage.exists(uri):
        storage.write_json(uri, {"started": datetime.now(UTC).isoformat()})
    return datetime.fromisoformat(storage.read_json(uri)["started"])


def is_ordinal(data: str, config: PrepareConfig) -> bool:
    """Whether timestamps carry order only: by configuration, else by the folder's dataset.json.

    Raises:
        SchemaError: dataset.json has another value than "utc" or "ordinal".
    """
    marker = storage.join(data, DATASET)
    if config.time != "auto" or not storage.is_dir(data) or not storage.exists(marker):
        return config.time == "ordinal"
    unit = storage.read_json(marker).get("time", "utc")
    if unit not in ("utc", "ordinal"):
        raise SchemaError(f'{marker}: expected "time" to be "utc" or "ordinal", found {unit!r}')
    return unit == "ordinal"


def check_time(data: str, split: str, ordinal: bool, old: Prepared | None) -> None:
    """Refuse a `time` split of an order, and new events whose time is not of the old ones' kind.

    Raises:
        ConfigError: naming the data.
    """
    if ordinal and split == "time":
        raise ConfigError(
            f"{data}: timestamps are an order only, so there is no global time to split at; use --split leave-one-out or none"
        )
    if old and ordinal != old.ordinal_time:
        found = "an order only" if ordinal else "UTC"
        raise ConfigError(f"{data}: expected timestamps like those of {old.uri} ({old.manifest['time']}), found {found}")


def read_tables(data: str, first_file: str, stem: str, id_column: str) -> AttributeTable:
    """The item or user table of a data folder; empty when there is none or `data` is a single file."""
    return read_attributes(find_table(data, stem) if data != first_file else [], id_column)


def check_rows(data: str, facts: dict, tables: tuple[AttributeTable, ...], *, strict: bool) -> None:
    """Refuse a data set without a good row, and under `strict` any bad row.

    Raises:
        SchemaError: with the reasons and their counts.
    """
    bad = dict(facts["quarantine"])
    for table in tables:
        bad |= table.quarantine
    if not facts["rows"]:
        raise SchemaError(f"{data}: expected at least one interaction, found a header and no rows")
    reasons = ", ".join(f"{count:,} x {reason}" for reason, count in sorted(bad.items(), key=lambda pair: -pair[1]))
    if strict and bad:
        raise SchemaError(f"{data}: expected no bad rows (--strict), found {reasons}; without --strict they go to {QUARANTINE}/")
    if facts["rows"] == sum(facts["quarantine"].values()):
        raise SchemaError(
            f"{data}: expected at least one good row, found none in {facts['rows']:,}: {reasons}"
            + ("; if timestamps are only an order, set time: ordinal (--set time=ordinal)" if "implausible timestamp" in bad else "")
        )
    if not facts["good"]:
        raise SchemaError(
            f"{data}: expected at least one event with weight, found only {', '.join(sorted(facts['dropped']))}; see event_types"
        )
