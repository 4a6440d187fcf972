"""Send refused events again, once somebody has mended them in their dead-letter file."""

import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from typing import Any

import orjson

from raysys import storage
from raysys.errors import ConfigError, RaysysError
from raysys.events.dead_letters import read_letters, rewrite
from raysys.serve.ingest import check_events
from raysys.serve.keys import KEY_VARIABLE

BATCH = 500


def resend(path: str, url: str, *, timeout_s: float = 30.0) -> dict[str, int]:
    """Send the records of a dead-letter file that are valid now; the file keeps the others, with the reason of today.

    An event without an id gets one from its place in the file, so sending again after a crash counts once.

    Args:
        path: of the file.
        url: of the service, such as http://127.0.0.1:8000.
        timeout_s: patience with one answer.

    Returns:
        `sent`, `accepted`, `duplicates`, `left`.

    Raises:
        ConfigError: no such file.
        RaysysError: the service refuses or does not answer; what was not sent stays in the file.
    """
    if not storage.exists(path):
        raise ConfigError(f"{path}: expected a dead-letter file, found nothing")
    good: dict[int, dict] = {}
    left: dict[int, bytes] = {}
    for at, letter in enumerate(read_letters(path)):
        if letter is None or not isinstance(letter.get("record"), dict):
            continue  # not a letter; the line stays as it is
        record = {"event_id": _id(path, at), "timestamp": letter.get("received"), **letter["record"]}
        record = {name: value for name, value in record.items() if name != "timestamp" or value is not None}
        checked, refused = check_events({"events": [record]}, time.time())
        if checked:
            good[at] = record
        else:
            left[at] = orjson.dumps({**letter, "field": refused[0]["field"], "reason": refused[0]["reason"]})
    counts = {"sent": 0, "accepted": 0, "duplicates": 0}
    places = list(good)
    try:
        for first in range(0, len(places), BATCH):
            batch = places[first : first + BATCH]
            answer = _post(url, {"events": [good[at] for at in batch]}, timeout_s)
            for name in ("accepted", "duplicates"):
                counts[name] += answer[name]
            counts["sent"] += len(batch)
    finally:
        done = set(places[: counts["sent"]])
        rewrite(path, lambda at, line: None if at in done else left.get(at, line))
    return {**counts, "left": len(left)}


def _id(path: str, at: int) -> str:
    return "resent-" + hashlib.sha256(f"{os.path.basename(path)} {at}".encode()).hexdigest()[:24]


def _post(url: str, body: dict, timeout_s: float) -> dict[str, Any]:
    headers = {"Content-Type": "application/json", "X-API-Key": os.environ.get(KEY_VARIABLE, "")}
    request = urllib.request.Request(f"{url.rstrip('/')}/v1/events", data=json.dumps(body).encode(), headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        raise RaysysError(f"{url}: HTTP {error.code}: {error.read(300).decode(errors='replace')}") from None
    except (OSError, ValueError) as error:
        raise RaysysError(f"{url}: expected a running service (raysys serve), {error}") from None
