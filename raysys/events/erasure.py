"""Erasing a user: the record that does it, and the receipt that says what became of every place where something could be."""

from typing import Any

from raysys.events.identity import signed, user_key
from raysys.events.log import Record

PLACES = {
    "state": "erased: history, sessions, counters, seen items, attributes",
    "caches": "none hold users",
    "index": "holds items only",
    "log": "tombstoned: no reader returns the user's records any more; the next `raysys compact` overwrites them",
    "dead_letters": "the next `raysys compact` removes them",
    "lake": "the next `raysys compact` removes the user's rows",
    "replay_buffer": "the learner replays histories of the bundle and reads the log, so nothing of its own",
    "embedding_row": "no model has a row a user",
    "data_folders": "what you imported yourself and what was prepared from it is not reached from here",
}


def erase_record(user_id: str, at: float) -> Record:
    """The record that makes state and every reader of the log forget what a user did up to a moment (UTC epoch seconds)."""
    return {"kind": "erase", "user_key": user_key(user_id).hex(), "at": at}


def receipt(record: Record, model_version: str | None, holds_history: bool) -> dict[str, Any]:
    """A signed statement that an erasure is durable.

    Args:
        record: the `erase` record in the log.
        model_version: version in use, None when nothing is published.
        holds_history: whether that version's histories still have the user (by hash).
    """
    waiting = (
        f"{model_version} is the last that holds a history, by hash and hidden from now on; the next version of `raysys online` drops it"
    )
    models = {
        "status": waiting if holds_history else "the version in use holds no history of the user",
        "version": model_version,
        "first_version_without": None if holds_history else model_version,
    }
    return signed({"erased": True, "user_key": record["user_key"], "at": record["at"], "places": {**PLACES, "models": models}})
