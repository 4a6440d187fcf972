"""kill -9 at random points: nothing acknowledged is lost, nothing counts twice, everything opens again. Slow: hundreds of kills."""

import random
import subprocess
import time

import pytest

from tests.kills import Writers
from tests.redis_process import RedisProcess


def test_kill_9_of_log_writers_twenty_times_loses_nothing_and_counts_nothing_twice(tmp_path):
    writers = Writers(str(tmp_path / "log"), str(tmp_path / "state"), ["a", "b"])
    writers.rounds(10, random.Random(0))
    assert writers.kills == 20 and all(count >= 50 for count in writers.acknowledged.values())
    assert writers.damage() == (0, 0)


@pytest.mark.parametrize(
    "mode, damage",
    [
        ("die-after-log", (0, 0)),  # in the log, not in the state, not answered: sent again, counted once
        ("die-after-log no-ids", (0, 5)),  # without event ids the second sending counts
        ("acknowledge-first", (10, 0)),  # answered before the log has it
    ],
)
def test_the_count_finds_what_is_missing_when_a_mechanism_is_switched_off(tmp_path, mode, damage):
    writers = Writers(str(tmp_path / "log"), str(tmp_path / "state"), ["a"], mode)
    for _ in range(2):
        writers.start()
        writers.kill()
    assert writers.damage() == damage


def test_a_redis_without_append_only_file_loses_what_the_check_would_have_refused(tmp_path):
    server = RedisProcess(tmp_path / "redis", appendonly="no")
    writers = Writers(server.uri, str(tmp_path / "state"), ["a"], "unchecked")
    writers.start()
    time.sleep(0.1)
    writers.kill()
    server.kill()
    server.settings["appendonly"] = "yes"  # only so that the log can be opened for the count
    server.start()
    assert writers.damage()[0] == writers.acknowledged["a"] > 0
    server.stop()


def test_kill_9_of_redis_under_its_writers_loses_nothing(tmp_path):
    assert kill_redis(tmp_path, kills=3) == (0, 0)


@pytest.mark.slow
def test_kill_9_of_log_writers_150_times(tmp_path):
    writers = Writers(str(tmp_path / "log"), str(tmp_path / "state"), ["a", "b", "c"])
    writers.rounds(50, random.Random(1), longest_s=0.2)
    assert writers.kills == 150 and writers.damage() == (0, 0)


@pytest.mark.slow
def test_kill_9_of_redis_and_of_writers_160_times(tmp_path):
    assert kill_redis(tmp_path, kills=100) == (0, 0)
    server = RedisProcess(tmp_path / "again")
    writers = Writers(server.uri, f"{server.uri}?prefix=state", ["a", "b"])
    writers.rounds(30, random.Random(3), longest_s=0.2)
    assert writers.kills == 60 and writers.damage() == (0, 0)
    server.stop()


def kill_redis(folder, kills: int) -> tuple[int, int]:
    """Kill the server of log and state under two writers that go on; what was lost or counted twice."""
    server, rng = RedisProcess(folder / "redis"), random.Random(2)
    writers = Writers(server.uri, server.uri, ["a", "b"])
    writers.start()
    for _ in range(kills):
        time.sleep(rng.uniform(0.05, 0.25))
        server.kill()
        server.start()
    for process in writers._running.values():  # they are back at work
        process.stdout.readline()
    time.sleep(0.5)
    processes: list[subprocess.Popen] = list(writers._running.values())
    assert all(process.poll() is None for process in processes), "a writer died of it"
    writers.kill()
    damage = writers.damage()
    server.stop()
    return damage
