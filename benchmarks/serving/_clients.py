"""Clients in threads, for benchmarks: closed loop (ask again when answered) and open loop (each request at its own time).

In an open loop latency counts from when a request was due, so that a service that stalls cannot hide those it kept waiting.
"""

import http.client
import itertools
import json
import select
import threading
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Seen:
    """One request as its client saw it."""

    at: float
    """When it was due, monotonic seconds."""
    ms: float
    kind: str
    """`answered`, `degraded`, `written`, `shed` (an honest 503 with Retry-After) or `failed`."""
    told: str = ""


class Load:
    """Clients that send requests at a rate, each at its own time; without one, as fast as answers come.

    Args:
        port: of the service.
        users: asked for in turn.
        n: items of an answer; None where any answer will do, as of a no-op.
        rate: requests a second; None for as many as the clients can.
        clients: threads; with a rate, as many requests can be under way at once.
        items: of the events.
        write_every: one request in so many is an event; None for none.
    """

    def __init__(
        self,
        port: int,
        users: list[str],
        *,
        n: int | None,
        rate: float | None,
        clients: int,
        items: list[str] | None = None,
        write_every: int | None = None,
    ):
        self.port, self.users, self.n, self.rate, self.items, self.write_every = port, users, n, rate, items or [], write_every
        self.seen: list[Seen] = []
        self.started = 0.0
        self._tickets = itertools.count()  # next() is atomic
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._client, daemon=True) for _ in range(clients)]

    def __enter__(self) -> "Load":
        self.started = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(timeout=40)

    def _client(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        while not self._done.is_set():
            number = next(self._tickets)
            due = time.monotonic() if self.rate is None else self.started + number / self.rate
            if self._done.wait(max(0.0, due - time.monotonic())):
                return
            kind, told = self._ask(connection, number)
            self.seen.append(Seen(due, (time.monotonic() - due) * 1000, kind, told))

    def _ask(self, connection: http.client.HTTPConnection, number: int) -> tuple[str, str]:
        user = self.users[number % len(self.users)]
        is_write = self.write_every is not None and number % self.write_every == 0
        path, body = "/v1/recommend", {"user_id": user, "n": self.n or 1}
        if is_write:
            item = self.items[number // self.write_every % len(self.items)]
            path, body = "/v1/events", {"user_id": user, "item_id": item, "event": "view", "event_id": f"soak-{self.started}-{number}"}
        try:
            if connection.sock is not None and select.select([connection.sock], [], [], 0)[0]:
                # Closed by the other end while it was idle, as HAProxy does when replicas change; connection pools look for that too.
                connection.close()
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
            if response.status == 503 and response.getheader("Retry-After") and b'"error"' in text:
                return "shed", text.decode()[:200]
            answer = json.loads(text) if response.status == 200 else {}
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            return "failed", repr(error)
        if is_write and answer.get("accepted", 0) + answer.get("duplicates", 0) == 1:
            return "written", ""
        if self.n is None and response.status == 200:
            return "answered", ""
        if len(answer.get("items", ())) == self.n:
            return ("degraded", answer["degraded_reason"]) if answer["degraded"] else ("answered", answer["model_version"])
        return "failed", f"HTTP {response.status}: {text[:200]!r}"


def quantile(seen: list[Seen], share: float) -> float | None:
    """Milliseconds within which this share of the answers came; None without any."""
    times = sorted(one.ms for one in seen if one.kind in ("answered", "degraded"))
    return times[int(share * len(times))] if times else None
