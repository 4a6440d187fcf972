"""SIGTERM: a command stops what it has started, and supervisors that signal twice cannot hinder it."""

import signal
import subprocess
import sys
import time

COMMAND = """
import sys, time
from raysys import cli

def run(arguments):
    try:
        print("started", flush=True)
        time.sleep(60)
    finally:
        time.sleep(2)
        print("stopped what it had started", flush=True)

cli._models = run
sys.exit(cli.main(["models"]))
"""


def test_a_second_signal_does_not_end_the_cleaning_up():
    process = subprocess.Popen([sys.executable, "-c", COMMAND], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    for _ in range(3):  # as `timeout` does it: to the process, then to its group
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert process.communicate(timeout=30)[0] == "stopped what it had started\n"
    assert process.returncode == 143
