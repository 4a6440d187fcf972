"""Prepare a data set: from raw events to user sequences, the story in one function.

The steps stand in their own files: source.py (which files, which columns), rows.py
(clean and quarantine), sequences.py (deduplicate, order, split, encode), vocabulary.py
(rows of ids), tables.py (attributes), stages.py (where it runs on Ray), output.py (atomic replace).
"""

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

from raysys import config as settings
from raysys import storage
from raysys.errors import ConfigError, SchemaError
from raysys.prepare import stages
from raysys.prepare.config import PrepareConfig
from raysys.prepare.dataset import FORMAT, ITEMS, MANIFEST, QUARANTINE, USERS
from raysys.prepare.manifest import collect_notes, content_fingerprint, count_everything
from raysys.prepare.manifest import summary_rows as summary_rows  # the command line takes it from here
from raysys.prepare.output import working_folder
from raysys.prepare.rows import REPORTS, RowRules, plan_chunks, read_reports
from raysys.prepare.sequences import SplitRule
from raysys.prepare.source import DATASET, ITEM_TABLE, USER_TABLE, find_interactions, find_table, open_sources
from raysys.prepare.tables import AttributeTable, items_in_order, read_attributes, users_in_order
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
    split: str = "leave-one-out",
    config: PrepareConfig | None = None,
    strict: bool = False,
    progress: bool = True,
) -> dict:
    """Validate, deduplicate, split and encode a data set; needs a running Ray.

    Args:
        data: data folder of the contract (Parquet or CSV, one file or many), or one interactions file; path or URI.
        out: folder of the prepared set; an older prepared set there is replaced once the new one is complete.
        split: "leave-one-out" (per user), "time" (global) or "none".
        config: settings; None for the defaults.
        strict: make any bad row an error.
        progress: print a line a stage.

    Returns:
        The manifest, as written to `out`.

    Raises:
        SchemaError: the data is not what the contract says, or has bad rows under `strict`.
        ConfigError: a setting does not fit, or `out` holds something that is not a prepared set.
    """
    config = config or PrepareConfig()
    if split not in SPLIT_KINDS:
        raise ConfigError(f"split: expected one of {', '.join(SPLIT_KINDS)}, got {split!r}")
    started = datetime.now(UTC)
    report = Progress(progress)
    files = open_sources(data, find_interactions(data))
    ordinal = is_ordinal(data, config)
    if ordinal and split == "time":
        raise ConfigError(
            f"{data}: timestamps are an order only, so there is no global time to split at; use --split leave-one-out or none"
        )
    items, users = (read_tables(data, files[0].uri, stem, column) for stem, column in ((ITEM_TABLE, ITEM_ID), (USER_TABLE, USER_ID)))
    report.done("tables", len(items.rows) + len(users.rows))
    event_types = config.merged_event_types()
    no_weight = tuple(name for name, kind in event_types.items() if kind.weight == 0)
    with working_folder(out) as work, stages.quiet_ray_data():
        rules = RowRules(ordinal, *config.plausible_us(started), no_weight, work)
        chunks = plan_chunks(files)
        if not chunks:
            raise SchemaError(f"{data}: expected at least one interaction, found {len(files)} Parquet files without rows")
        ordered = stages.read_and_order(chunks, rules, stages.num_partitions(files, config))
        facts = read_reports(work)
        storage.remove(storage.join(work, REPORTS))
        quarantine = {**dict(sorted(facts["quarantine"].items())), **items.quarantine, **users.quarantine}
        check_rows(data, facts, quarantine, strict=strict)
        report.done("read, clean, order", facts["rows"])
        cuts = stages.time_cuts(ordered, config.valid_fraction, config.test_fraction) if split == "time" else (0, 0)
        rule = SplitRule(split, *cuts, config.min_user_events)
        stats = stages.count(ordered, rule, event_types)
        if stats.watermark is None:
            raise ConfigError(f"{data}: the {split} split leaves no training events; check min_user_events and the fractions")
        types, notes = resolve_event_types(event_types, stats)
        names, unnamed = event_codes(stats.events)
        item_order = order_items(stats, items.rows[ITEM_ID], split=split, min_item_events=config.min_item_events)
        if not item_order.num_warm:
            raise ConfigError(f"{data}: no item has min_item_events = {config.min_item_events} training events; lower it")
        user_order = order_users(stats, users.rows[USER_ID])
        report.done("count", stats.interactions)
        vocabulary = build_vocabulary(item_order, user_order, names, types, ordinal=ordinal)
        written = stages.encode_and_write(ordered, rule, vocabulary, work)
        storage.write_table(storage.join(work, ITEMS), items_in_order(item_order.rows, items))
        storage.write_table(storage.join(work, USERS), users_in_order(user_order, users))
        for name, table in ((ITEMS, items), (USERS, users)):
            if len(table.bad):
                storage.write_table(storage.join(work, QUARANTINE, name), table.bad.to_arrow())
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
            "quarantine": quarantine,
            "notes": collect_notes(files, facts, items, users, notes, unnamed),
            "watermark": stats.watermark if ordinal else stats.watermark // 1_000_000,
        }
        if split == "time":
            manifest["cuts"] = {"valid_from": cuts[0] // 1_000_000, "test_from": cuts[1] // 1_000_000}
        manifest["fingerprint"] = content_fingerprint(work, written["sums"], manifest)
        manifest["stages"] = report.stages
        manifest["files"] = [name for name in storage.list_files(work)]
        storage.write_json(storage.join(work, MANIFEST), manifest)
    return manifest


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


def read_tables(data: str, first_file: str, stem: str, id_column: str) -> AttributeTable:
    """The item or user table of a data folder; empty when there is none or `data` is a single file."""
    return read_attributes(find_table(data, stem) if data != first_file else [], id_column)


def check_rows(data: str, facts: dict, quarantine: dict[str, int], *, strict: bool) -> None:
    """Refuse a data set without a good row, and under `strict` any bad row.

    Raises:
        SchemaError: with the reasons and their counts.
    """
    if not facts["rows"]:
        raise SchemaError(f"{data}: expected at least one interaction, found a header and no rows")
    reasons = ", ".join(f"{count:,} x {reason}" for reason, count in sorted(quarantine.items(), key=lambda pair: -pair[1]))
    if strict and quarantine:
        raise SchemaError(f"{data}: expected no bad rows (--strict), found {reasons}; without --strict they go to {QUARANTINE}/")
    if facts["rows"] == sum(facts["quarantine"].values()):
        raise SchemaError(
            f"{data}: expected at least one good row, found none in {facts['rows']:,}: {reasons}"
            + ("; if timestamps are only an order, set time: ordinal (--set time=ordinal)" if "implausible timestamp" in quarantine else "")
        )
    if facts["rows"] == sum(facts["quarantine"].values()) + sum(facts["dropped"].values()):
        raise SchemaError(
            f"{data}: expected at least one event with weight, found only {', '.join(sorted(facts['dropped']))}; see event_types"
        )
