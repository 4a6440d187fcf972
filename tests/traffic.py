"""Clients that ask a running service all the time, and what they saw."""

import http.client
import json
import threading
import time
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Seen:
    """One request as its client saw it; status 0 where no answer came."""

    at: float
    status: int
    ms: float
    body: dict

    @property
    def degraded(self) -> bool:
        return bool(self.body.get("degraded"))

    @property
    def reason(self) -> str:
        return self.body.get("degraded_reason") or ""


class Traffic:
    """As a context: some clients, each asking for one user after another, until the block ends.

    Args:
        base_url: of the service.
        clients: threads with a connection each.
        pause_s: between an answer and the next request.
        body_after_s: between the headers and the body of a request, which travel apart in any case.
        deadline_ms: sent along.
    """

    def __init__(
        self, base_url: str, *, clients: int = 4, pause_s: float = 0.02, body_after_s: float = 0.0, deadline_ms: int | None = None
    ):
        self.host, self.port = urlsplit(base_url).hostname, urlsplit(base_url).port
        self.pause_s, self.body_after_s, self.headers = pause_s, body_after_s, {"Content-Type": "application/json"}
        if deadline_ms is not None:
            self.headers["X-Deadline-Ms"] = str(deadline_ms)
        self.seen: list[Seen] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(number,), daemon=True) for number in range(clients)]

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=40)

    def since(self, moment: float) -> list[Seen]:
        return [one for one in self.seen if one.at >= moment]

    def statuses(self) -> set[int]:
        return {one.status for one in self.seen}

    def wait_until(self, happened, *, timeout_s: float = 60.0, since: float = 0.0) -> list[Seen]:
        """Wait for something to be true of what was seen since a moment; what was seen then."""
        deadline = time.monotonic() + timeout_s
        while not happened(found := self.since(since)):
            assert time.monotonic() < deadline, f"after {timeout_s} s: {found[-3:]}"
            time.sleep(0.05)
        return found

    def wait_until_sound(self, *, timeout_s: float = 60.0, in_a_row: int = 20) -> None:
        """Wait until the last answers were all 200 and not degraded."""
        self.wait_until(
            lambda seen: len(seen) >= in_a_row and all(one.status == 200 and not one.degraded for one in seen[-in_a_row:]),
            since=time.monotonic(),
            timeout_s=timeout_s,
        )

    def _client(self, number: int) -> None:
        connection, turn = http.client.HTTPConnection(self.host, self.port, timeout=30), 0
        while not self._stop.is_set():
            turn += 1
            started = time.monotonic()
            try:
                body = json.dumps({"user_id": f"user-{(number * 31 + turn) % 180}", "n": 5}).encode()
                connection.putrequest("POST", "/v1/recommend")
                for name, value in {**self.headers, "Content-Length": str(len(body))}.items():
                    connection.putheader(name, value)
                connection.endheaders()
                time.sleep(self.body_after_s)
                connection.send(body)
                response = connection.getresponse()
                status, text = response.status, response.read()
                found = json.loads(text) if text.startswith(b"{") else {"text": text.decode(errors="replace")}
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                status, found = 0, {"text": repr(error)}
            self.seen.append(Seen(started, status, (time.monotonic() - started) * 1000, found))
            time.sleep(self.pause_s)
        connection.close()
