"""Writers that are killed with -9 while they write, and the count of what was lost or counted twice.

A writer is a process of its own that puts events of one user through an
`EventStore` and says on its output how many are acknowledged. Its successor
goes on from there, so it sends again what the killed one may have written.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

from raysys.events.log import open_log
from raysys.events.state import open_state
from raysys.events.store import EventStore

WRITER = """
import os, signal, sys
from raysys.errors import StateError
from raysys.events.log import open_log
from raysys.events.redis_server import RedisServer
from raysys.events.state import open_state
from raysys.events.store import EventStore

log_at, state_at, name, at, mode = sys.argv[1:6]
at, first = int(at), int(at)
if "unchecked" in mode:
    RedisServer._check = lambda *arguments: None
store = EventStore(open_log(log_at, writable=True), open_state(state_at))
die = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
if "die-after-log" in mode:
    store.state.apply = die
while True:
    batch = [
        {"kind": "event", "user_id": name, "item_id": f"{name}-{n}", "event": "view", "timestamp": float(n), "received": float(n),
         "properties": {"filler": "x" * (37 * (n % 5))}, **({} if "no-ids" in mode else {"event_id": f"{name}-{n}"})}
        for n in range(at, at + 5)
    ]
    if "acknowledge-first" in mode:
        print(at + 5, flush=True)
        die()
    while True:
        try:
            store.submit(batch).result()
            break
        except StateError:
            pass
    at += 5
    print(at, flush=True)
"""


@dataclass
class Writers:
    """Some writers on one log and state.

    Args:
        log: location. state: location. names: users they write for.
        mode: what is switched off or made to happen in them; nothing by default.
    """

    log: str
    state: str
    names: list[str]
    mode: str = "as it is"
    acknowledged: dict[str, int] = field(default_factory=dict)
    kills: int = 0
    _running: dict[str, subprocess.Popen] = field(default_factory=dict)

    def start(self) -> None:
        """Start those that do not run, and wait for their first acknowledgement (or their end)."""
        for name in self.names:
            if name not in self._running:
                arguments = [self.log, self.state, name, str(self.acknowledged.get(name, 0)), self.mode]
                self._running[name] = subprocess.Popen([sys.executable, "-c", WRITER, *arguments], stdout=subprocess.PIPE, text=True)
        for name, process in self._running.items():
            self._note(name, process.stdout.readline())

    def kill(self) -> None:
        """kill -9 all of them, and note what they had acknowledged."""
        for process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        for name, process in self._running.items():
            for line in process.stdout.read().splitlines(keepends=True):
                self._note(name, line)
            process.wait()
            self.kills += 1
        self._running.clear()

    def rounds(self, count: int, rng: random.Random, longest_s: float = 0.05) -> None:
        """Start, write for a random moment, kill; `count` times."""
        for _ in range(count):
            self.start()
            time.sleep(rng.uniform(0.0, longest_s))
            self.kill()

    def _note(self, name: str, line: str) -> None:
        if line.endswith("\n"):
            self.acknowledged[name] = max(self.acknowledged.get(name, 0), int(line))

    def damage(self) -> tuple[int, int]:
        """Events (lost though acknowledged, counted more than once); opens log and state as the service does."""
        store = EventStore(open_log(self.log, writable=True), open_state(self.state))
        written: dict[str, set[str]] = {name: set() for name in self.names}
        for record in store.log.read(limit=10**9)[0]:
            written[record["user_id"]].add(record["item_id"])
        lost = sum(len({f"{name}-{n}" for n in range(count)} - written[name]) for name, count in self.acknowledged.items())
        twice = sum(store.state.counters(name).get("view", 0) - len(written[name]) for name in self.names)
        store.close()
        return lost, twice
