"""Peak memory of a command and of every process that it starts, by proportional set size (PSS). Linux only.

PSS counts a page that n processes share as 1/n of it in each, so the sum over processes counts every page once; mapped pages of Ray's
object store (in /dev/shm) are among them. Processes are told by a variable of their environment: Ray's outlive their parents.
"""

import os
import secrets
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

MARK = "RAYSYS_BENCH_RUN"


@dataclass
class Usage:
    """What one run took.

    Attributes:
        seconds: wall time. peak_bytes: largest sum of PSS seen. shm_bytes: largest growth of /dev/shm.
        spilled_bytes: largest sum of Ray's spilled files. samples: how often memory was looked at.
    """

    seconds: float = 0.0
    peak_bytes: int = 0
    shm_bytes: int = 0
    spilled_bytes: int = 0
    samples: int = 0
    processes_at_peak: dict = field(default_factory=dict)


def measured(command: list[str], *, hertz: float = 5.0, log: str, cwd: str | None = None) -> Usage:
    """Run a command, its output in the file `log`; SystemExit with the log's end when it fails. It ends with the caller."""
    mark, usage, ended = secrets.token_hex(8), Usage(), threading.Event()
    temporary = f"/tmp/rb-{mark[:6]}"  # short: Ray puts sockets there, whose paths are limited
    environment = os.environ | {MARK: mark, "RAY_TMPDIR": temporary, "RAY_AUTH_MODE": "disabled"}
    shm = _shm_bytes()
    sampler = threading.Thread(target=_sample, args=(mark, temporary, shm, usage, ended, 1 / hertz))
    with open(log, "w") as output:
        started = time.monotonic()
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=cwd)
        sampler.start()
        try:
            status = process.wait()
        finally:
            process.terminate()  # a signal to the caller would not reach it
            process.wait()
            usage.seconds = time.monotonic() - started
            ended.set()
            sampler.join()
    subprocess.run(["rm", "-rf", temporary], check=True)
    if status:
        raise SystemExit(f"{' '.join(command)}: exit status {status}\n{Path(log).read_text()[-3000:]}")
    return usage


def _sample(mark: str, temporary: str, shm: int, usage: Usage, ended: threading.Event, pause: float) -> None:
    known: dict[tuple[int, int], bool] = {}
    while not ended.wait(pause):
        sizes: dict[str, int] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                born = (int(folder.name), folder.stat().st_ctime_ns)
                if born not in known:
                    known[born] = f"{MARK}={mark}".encode() in (folder / "environ").read_bytes()
                if known[born]:
                    name = (folder / "comm").read_text().strip()
                    sizes[name] = sizes.get(name, 0) + pss_bytes(folder)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        usage.samples += 1
        if sum(sizes.values()) > usage.peak_bytes:
            usage.peak_bytes, usage.processes_at_peak = sum(sizes.values()), sizes
        usage.shm_bytes = max(usage.shm_bytes, _shm_bytes() - shm)
        spilled = sum(path.stat().st_size for path in Path(temporary).glob("**/ray_spilled_objects*/*") if path.is_file())
        usage.spilled_bytes = max(usage.spilled_bytes, spilled)


def pss_bytes(folder: Path) -> int:
    """Proportional set size of a process, by its folder in /proc."""
    for line in (folder / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _shm_bytes() -> int:
    facts = os.statvfs("/dev/shm")
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize
