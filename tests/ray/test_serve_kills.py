"""kill -9 under writing clients, over real HTTP, of ingestion replicas and of all there is on a node: nothing answered is lost or counted
twice."""

import contextlib
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from raysys.events.log import open_log
from raysys.serve.launch import MARKER, family, running_service
from tests.ray.test_serve import call, free_port, replica_pids

KILLS, NODE_KILLS, CLIENTS = 20, 4, 3


class Clients:
    """They write while the block runs and send again what was not answered; `answered` of each client's events were."""

    def __init__(self) -> None:
        self.answered = [0] * CLIENTS

    @contextlib.contextmanager
    def writing(self, url: str):
        stop = threading.Event()
        threads = [threading.Thread(target=self._write, args=(number, url, stop)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _write(self, number: int, url: str, stop: threading.Event) -> None:
        while not stop.is_set():
            first = self.answered[number]
            names = [f"c{number}-{n}" for n in range(first, first + 5)]
            events = [{"user_id": f"client-{number}", "item_id": name, "event_id": name} for name in names]
            try:
                status, answer = call(url, "POST", "/v1/events", {"events": events})
            except (OSError, ValueError):
                continue  # no answer, or half of one
            if status == 200 and answer["accepted"] + answer["duplicates"] == 5:
                self.answered[number] += 5

    def check(self, url: str, log: str) -> None:
        """Nothing answered is missing; what was written counts once."""
        held = [call(url, "GET", f"/v1/users/client-{number}")[1]["counters"]["view"] for number in range(CLIENTS)]
        written = {record["item_id"] for record in open_log(log).read(limit=10**9)[0] if record["kind"] == "event"}
        for number in range(CLIENTS):
            mine = {name for name in written if name.startswith(f"c{number}-")}
            assert {f"c{number}-{n}" for n in range(self.answered[number])} <= mine, "answered and lost"
            assert held[number] == len(mine), "counted twice, or in the log and not in the state"


@pytest.mark.slow
def test_kill_9_of_ingestion_replicas_twenty_times(tmp_path, place):
    places = {"registry": str(tmp_path / "registry"), "events": place("events"), "state": place("state")}
    clients = Clients()
    with running_service(**places, port=free_port(), require_model=False) as url:
        with clients.writing(url):
            rng, kills, deadline = random.Random(0), 0, time.monotonic() + 300
            while kills < KILLS and time.monotonic() < deadline:
                before = sum(clients.answered)
                pids = replica_pids("Ingestion")
                if pids:
                    os.kill(rng.choice(pids), signal.SIGKILL)
                    kills += 1
                while sum(clients.answered) < before + 15 and time.monotonic() < deadline:  # it takes events again
                    time.sleep(0.05)
                time.sleep(rng.uniform(0.0, 0.3))
        assert kills == KILLS and min(clients.answered) > 0
        clients.check(url, places["events"])


@pytest.mark.slow
def test_kill_9_of_all_that_runs_on_the_node(tmp_path):
    """Ray, proxy, replicas, all at once, in the middle of writes; what comes up again on the same folders has everything."""
    places = {"registry": str(tmp_path / "registry"), "events": str(tmp_path / "events"), "state": str(tmp_path / "state")}
    clients, rng = Clients(), random.Random(0)
    for _ in range(NODE_KILLS):
        with running_service(**places, port=free_port(), require_model=False) as url, clients.writing(url):
            before, deadline = sum(clients.answered), time.monotonic() + 60
            while sum(clients.answered) < before + 30 and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(rng.uniform(0.0, 0.5))
            assert sum(clients.answered) >= before + 30
            whole = family(_mark(replica_pids("Ingestion")[0]))
            assert len(whole) > 5
            for pid in whole:
                with contextlib.suppress(ProcessLookupError):  # it went with its parent
                    os.kill(pid, signal.SIGKILL)
    with running_service(**places, port=free_port(), require_model=False) as url:
        clients.check(url, places["events"])


def _mark(pid: int) -> bytes:
    """What tells the service's processes from all others."""
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(entry for entry in environment if entry.startswith(f"{MARKER}=".encode()))
