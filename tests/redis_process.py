"""A real redis-server of a test's own: free port, temporary folder, append-only file flushed before every answer."""

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

SETTINGS = {"appendonly": "yes", "appendfsync": "always"}


class RedisProcess:
    """Started at once; `kill` is kill -9, `start` brings it back with what it kept."""

    def __init__(self, folder: Path, **settings: str):
        if shutil.which("redis-server") is None:
            pytest.skip("no redis-server on the PATH (Debian: apt-get install redis-server)")
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.settings = {**SETTINGS, **settings}
        self.uri = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen | None = None
        self.start()

    def start(self) -> None:
        """Start, and wait until it answers."""
        fixed = {"port": str(self.port), "bind": "127.0.0.1", "dir": str(self.folder)}
        arguments = [part for name, value in {**fixed, **self.settings}.items() for part in (f"--{name}", *value.split())]
        self.process = subprocess.Popen(["redis-server", *arguments], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                    connection.sendall(b"PING\r\n")
                    if connection.recv(16).startswith(b"+PONG"):
                        return
            except OSError:
                pass
            assert self.process.poll() is None and time.monotonic() < deadline, "redis-server does not start"
            time.sleep(0.01)

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """End it."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
