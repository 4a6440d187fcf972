"""Lines of progress from workers to the terminal of whoever started the run.

Workers' standard output goes to log files (it is full of Ray's own lines); a
tiny actor carries the few lines a person wants, wherever the worker runs.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@ray.remote(num_cpus=0)
class ProgressBoard:
    """Holds the lines that the driver has not printed yet."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def post(self, line: str) -> None:
        """Add a line."""
        self._lines.append(line)

    def take(self) -> list[str]:
        """All lines since the last call."""
        lines, self._lines = self._lines, []
        return lines


@contextlib.contextmanager
def printed_progress(print_line: Callable[[str], None], *, interval_s: float = 0.5) -> Iterator["ray.actor.ActorHandle"]:
    """A board whose lines are printed in the driver while the block runs."""
    # On the driver's node: workers wait for the board, so on another one its death would be theirs.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ProgressBoard.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    done = threading.Event()

    def drain() -> None:
        for line in ray.get(board.take.remote()):
            print_line(line)

    def poll() -> None:
        while not done.wait(interval_s):
            try:
                drain()
            except ray.exceptions.RayError:
                return  # the cluster is gone; the run itself reports that

    thread = threading.Thread(target=poll, daemon=True, name="progress")
    thread.start()
    try:
        yield board
        done.set()
        thread.join()
        drain()
    finally:
        done.set()
        ray.kill(board)
