"""Progress boards for tests of training; here and not in a test module, because Ray's workers have to import them."""

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import ray


@ray.remote(num_cpus=0)
class Board:
    """A progress board that remembers, and kills somebody at a chosen line, while the worker waits in `post`.

    Args:
        kill_at: part of the line.
        pid: of the process to kill; None kills the training workers of this node.
    """

    def __init__(self, kill_at: str | None = None, pid: int | None = None):
        self.kill_at, self.pid, self.posted = kill_at, pid, []

    def post(self, line: str) -> None:
        self.posted.append(line)
        if self.kill_at and self.kill_at in line:
            self.kill_at = None
            for pid in [self.pid] if self.pid else training_workers(os.getppid()):
                os.kill(pid, signal.SIGKILL)

    def lines(self) -> list[str]:
        return self.posted


@ray.remote(num_cpus=0)
class Gates:
    """A progress board that stops the training at chosen lines, at each of them once, until it is let through.

    Args:
        lines: parts of the lines.
    """

    def __init__(self, lines: list[str]):
        self.posted: list[str] = []
        self.arrived, self.opened = ({line: asyncio.Event() for line in lines} for _ in range(2))

    async def post(self, line: str) -> None:
        self.posted.append(line)
        for gate, arrived in self.arrived.items():
            if gate in line and not arrived.is_set():
                arrived.set()
                await self.opened[gate].wait()

    async def reached(self, gate: str) -> None:
        """Return once the training stands at a gate."""
        await self.arrived[gate].wait()

    async def open(self, gate: str) -> None:
        self.opened[gate].set()

    async def lines(self) -> list[str]:
        return self.posted


def training_workers(raylet: int) -> list[int]:
    """Processes of Ray Train workers among the children of a raylet."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            if f"PPid:\t{raylet}\n" in status.read_text() and b"TrainWorker" in (status.parent / "cmdline").read_bytes():
                found.append(int(status.parent.name))
    return found
