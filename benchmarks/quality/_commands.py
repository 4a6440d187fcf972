"""What every quality benchmark does: run a command of raysys, and say which commit it was."""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "scale"))
from _memory import measured  # noqa: E402


def raysys(command: list[str], log: Path):
    """Run a command of raysys, its output in a log; what it took."""
    return measured([sys.executable, "-m", "raysys.cli", *command], hertz=1.0, log=str(log))


def commit() -> str:
    """Of the working tree."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
