"""Records of the log as rows of the data contract. Knows no files."""

from collections.abc import Sequence
from typing import Any

import orjson
import polars as pl

from raysys.events.identity import pseudonym
from raysys.events.log import Record, moment
from raysys.lake.layout import TIME
from raysys.schema import EVENT, EVENT_ID, ITEM_ID, POSITION, PROPENSITY, RECOMMENDATION_ID, SESSION_ID, TIMESTAMP, USER_ID, VALUE

INTERACTION_TYPES = {
    USER_ID: pl.String,
    ITEM_ID: pl.String,
    TIMESTAMP: pl.Float64,
    EVENT: pl.String,
    VALUE: pl.Float64,
    SESSION_ID: pl.String,
    RECOMMENDATION_ID: pl.String,
    POSITION: pl.Int64,
    EVENT_ID: pl.String,
    "properties": pl.String,
    "received": pl.Float64,
}
IMPRESSION_TYPES = {
    RECOMMENDATION_ID: pl.String,
    USER_ID: pl.String,
    ITEM_ID: pl.String,
    TIMESTAMP: pl.Float64,
    POSITION: pl.Int64,
    "score": pl.Float64,
    PROPENSITY: pl.Float64,
    "model_version": pl.String,
    "strategy": pl.String,
    "received": pl.Float64,
}


def interactions(records: Sequence[Record], *, pseudonyms: bool = False) -> pl.DataFrame:
    """Events as rows, each `event_id` once: the first that the service took in."""
    rows = []
    for record in records:
        if record.get("kind") != "event":
            continue
        row = {name: record.get(name) for name in INTERACTION_TYPES}
        row["properties"] = orjson.dumps(record["properties"]).decode() if record.get("properties") else None
        row["received"] = record.get("received", record[TIMESTAMP])
        rows.append(_named(row, pseudonyms))
    frame = _frame(rows, INTERACTION_TYPES).sort("received", maintain_order=True)
    return frame.filter(pl.col(EVENT_ID).is_null() | pl.col(EVENT_ID).is_first_distinct())


def impressions(records: Sequence[Record], *, pseudonyms: bool = False) -> pl.DataFrame:
    """What was shown, a row an item; each answer once."""
    rows, known = [], set()
    for record in records:
        if record.get("kind") != "impression" or record[RECOMMENDATION_ID] in known:
            continue
        known.add(record[RECOMMENDATION_ID])
        nothing = [None] * len(record["items"])
        columns = (
            record["items"],
            record.get("positions", range(1, len(nothing) + 1)),
            record["scores"],
            record.get("propensities", nothing),
        )
        for item_id, position, score, propensity in zip(*columns, strict=True):
            row = {
                RECOMMENDATION_ID: record[RECOMMENDATION_ID],
                USER_ID: record.get(USER_ID),
                ITEM_ID: item_id,
                TIMESTAMP: record["at"],
                POSITION: position,
                "score": score,
                PROPENSITY: propensity,
                "model_version": record["version"],
                "strategy": record.get("strategy"),
                "received": record["at"],
            }
            rows.append(_named(row, pseudonyms))
    return _frame(rows, IMPRESSION_TYPES)


def attributes(known: dict[str, dict], records: Sequence[Record], column: str, *, pseudonyms: bool = False) -> tuple[dict[str, dict], int]:
    """Attributes by id after some item or user records, and how many changes had nothing to change.

    Only what was put whole counts: a PATCH of an item that came with the data set would otherwise stand for all of it.

    Args:
        known: id -> attributes before.
        records: of the log.
        column: `item_id` or `user_id`.
        pseudonyms: hide user ids.
    """
    kind = {ITEM_ID: "item", USER_ID: "user"}[column]
    changes = [record for record in records if record.get("kind") in (kind, f"{kind}_delete")]
    table, skipped = dict(known), 0
    for record in sorted(changes, key=moment):
        name = pseudonym(record[column]) if pseudonyms and column == USER_ID else record[column]
        if record["kind"] == kind and record.get("replace"):
            table[name] = {key: value for key, value in record["attributes"].items() if value is not None}
        elif name not in table:
            skipped += 1
        else:
            change = record["attributes"] if record["kind"] == kind else {"available": False}
            table[name] = {key: value for key, value in {**table[name], **change}.items() if value is not None}
        if column == USER_ID and name in table:
            table[name]["received"] = moment(record)  # an erasure spares who came back
    return table, skipped


def attribute_frame(table: dict[str, dict], column: str) -> pl.DataFrame:
    """A row an id; an attribute whose values are of several kinds becomes text."""
    names = sorted({name for values in table.values() for name in values})
    columns: dict[str, Any] = {column: list(table)}
    for name in names:
        values = [row.get(name) for row in table.values()]
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1 and kinds != {int, float}:
            values = [None if value is None else value if isinstance(value, str) else orjson.dumps(value).decode() for value in values]
        columns[name] = pl.Series(name, values, strict=False)
    return pl.DataFrame(columns)


def _named(row: dict[str, Any], pseudonyms: bool) -> dict[str, Any]:
    if not pseudonyms:
        return row
    return {**row, **{name: pseudonym(row[name]) for name in (USER_ID, SESSION_ID) if row.get(name)}}


def _frame(rows: list[dict[str, Any]], types: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=types).with_columns((pl.col(TIMESTAMP) * 1_000_000).round().cast(pl.Int64).cast(TIME))
