"""What a prepared set says about itself: counts, notes, fingerprint, and the table at the end of the command."""

from collections.abc import Sequence

from raysys import storage
from raysys.prepare.dataset import ITEMS, USERS
from raysys.prepare.fingerprint import fingerprint
from raysys.prepare.tables import AttributeTable
from raysys.prepare.vocabulary import ItemOrder, Stats
from raysys.schema import ITEM_ID


def count_everything(
    facts: dict, stats: Stats, order: ItemOrder, written: dict, items: AttributeTable, users: AttributeTable
) -> dict[str, int]:
    """Where every row went; `interactions_read` is the sum of `interactions` and of all that was left out.

    Args:
        facts: sums of the chunk reports.
        stats: counts before rare items are left out.
        order: the item vocabulary.
        written: sums over the shards.
        items: the item table of the data.
        users: the user table of the data.
    """
    interactions = written["train"] + written["valid"] + written["test"]
    known = set(items.rows[ITEM_ID])
    return {
        "interactions_read": facts["rows"],
        "quarantined": sum(facts["quarantine"].values()),
        "without_weight": sum(facts["dropped"].values()),
        "duplicates": facts["good"] - stats.interactions,
        "rare_items_events": order.dropped,
        "few_events_users_events": stats.interactions - order.dropped - interactions,
        "interactions": interactions,
        **{name: written[name] for name in ("train", "valid", "test", "positive", "unknown_targets", "users")},
        "items": len(order.rows),
        "items_warm": order.num_warm,
        "items_without_attributes": sum(item not in known for item in order.rows[ITEM_ID]) if known else 0,
        "item_duplicates": items.duplicates,
        "user_duplicates": users.duplicates,
    }


def collect_notes(
    file_notes: Sequence[str], facts: dict, items: AttributeTable, users: AttributeTable, notes: list[str], unnamed: list[str]
) -> list[str]:
    """Everything that was understood, assumed or left out, one line each."""
    lines = list(file_notes)
    lines += [f"items: {note}" for note in items.notes] + [f"users: {note}" for note in users.notes]
    forms = facts["forms"]
    lines.append("timestamps: " + ", ".join(f"{name} ({count:,} rows)" for name, count in sorted(forms.items(), key=lambda pair: -pair[1])))
    if len(forms) > 1:
        lines.append("timestamps come in more than one form; each row was read by its own")
    lines += [f"{count:,} rows without {column}: default used" for column, count in sorted(facts["imputed"].items())]
    lines += [f"{count:,} {name} events have weight 0 and are not in the sequences" for name, count in sorted(facts["dropped"].items())]
    if unnamed:
        lines.append(f"{len(unnamed)} rare event names share the code of 'other': {', '.join(unnamed[:5])}")
    return [*lines, *notes]


def content_fingerprint(work: str, sums: list[int], manifest: dict) -> str:
    """sha256 of what was learnt from the data: sequences, tables, split, meaning of events."""
    tables = {name: storage.read_bytes(storage.join(work, name)) for name in (ITEMS, USERS)}
    facts = {key: manifest[key] for key in ("format", "split", "time", "events", "event_types", "watermark")}
    return fingerprint(sums, tables, facts)


def summary_rows(manifest: dict) -> list[tuple[str, str]]:
    """The closing table of the command."""
    counts = manifest["counts"]
    left = {
        key: counts[key]
        for key in ("quarantined", "duplicates", "without_weight", "rare_items_events", "few_events_users_events")
        if counts[key]
    }
    rows = [
        ("interactions", f"{counts['interactions']:,} of {counts['interactions_read']:,} read"),
        ("left out", ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in left.items()) or "none"),
        ("users", f"{counts['users']:,}"),
        ("items", f"{counts['items']:,} ({counts['items_warm']:,} in training)"),
        ("split", f"{manifest['split']}: {counts['train']:,} train, {counts['valid']:,} valid, {counts['test']:,} test"),
        ("positive events", f"{counts['positive']:,}"),
    ]
    rows += [("quarantine", f"{count:,} x {reason}") for reason, count in manifest["quarantine"].items()]
    rows += [("note", note) for note in manifest["notes"]]
    return [*rows, ("fingerprint", manifest["fingerprint"][:16])]
