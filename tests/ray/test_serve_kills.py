"""kill -9 of ingestion replicas under writing clients, over real HTTP: nothing answered is lost or counted twice."""

import os
import random
import signal
import threading
import time

import pytest

from raysys.events.log import open_log
from raysys.serve.launch import running_service
from tests.ray.test_serve import call, free_port, replica_pids

KILLS, CLIENTS = 20, 3


@pytest.mark.slow
def test_kill_9_of_ingestion_replicas_twenty_times(tmp_path, place):
    places = {"registry": str(tmp_path / "registry"), "events": place("events"), "state": place("state")}
    answered, stop = [0] * CLIENTS, threading.Event()

    def client(number: int) -> None:
        while not stop.is_set():
            first = answered[number]
            names = [f"c{number}-{n}" for n in range(first, first + 5)]
            events = [{"user_id": f"client-{number}", "item_id": name, "event_id": name} for name in names]
            try:
                status, answer = call(url, "POST", "/v1/events", {"events": events})
            except (OSError, ValueError):
                continue  # no answer, or half of one: send the same again
            if status == 200 and answer["accepted"] + answer["duplicates"] == 5:
                answered[number] += 5

    with running_service(**places, port=free_port(), require_model=False) as url:
        threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        rng, kills, deadline = random.Random(0), 0, time.monotonic() + 300
        while kills < KILLS and time.monotonic() < deadline:
            before = sum(answered)
            pids = replica_pids("Ingestion")
            if pids:
                os.kill(rng.choice(pids), signal.SIGKILL)
                kills += 1
            while sum(answered) < before + 15 and time.monotonic() < deadline:  # it takes events again
                time.sleep(0.05)
            time.sleep(rng.uniform(0.0, 0.3))
        stop.set()
        for thread in threads:
            thread.join()
        assert kills == KILLS and min(answered) > 0
        held = [call(url, "GET", f"/v1/users/client-{number}")[1]["counters"]["view"] for number in range(CLIENTS)]
    written = {record["item_id"] for record in open_log(places["events"]).read(limit=10**9)[0] if record["kind"] == "event"}
    for number in range(CLIENTS):
        mine = {name for name in written if name.startswith(f"c{number}-")}
        assert {f"c{number}-{n}" for n in range(answered[number])} <= mine, "answered and lost"
        assert held[number] == len(mine), "counted twice, or in the log and not in the state"
