"""Atomic replacement, configuration and column names."""

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from raysys import config, storage
from raysys.errors import ConfigError, SchemaError
from raysys.prepare.config import PrepareConfig
from raysys.prepare.dataset import FORMAT, MANIFEST, Prepared
from raysys.prepare.output import recover, step, working_folder
from raysys.prepare.source import map_columns
from raysys.schema import COLUMN_ALIASES, EventType

KNOWN = ("user_id", "item_id", "timestamp", "event", "value")


def write(out: str, name: str, key: str = "key") -> None:
    recover(out)
    with working_folder(out, key) as work:
        storage.write_bytes(f"{work}/{name}", b"x")
        storage.write_bytes(step(work, "half"), b"x")
        storage.write_json(f"{work}/{MANIFEST}", {"format": FORMAT, "name": name})


def killed(code: str) -> None:
    """Run code with `out` bound in a process that kills itself."""
    preface = "import os, signal\nfrom raysys import storage\nfrom raysys.prepare import output\n"
    done = subprocess.run([sys.executable, "-c", preface + code], check=False)
    assert done.returncode == -signal.SIGKILL


def test_a_new_set_replaces_the_old_one_completely(tmp_path):
    out = str(tmp_path / "set")
    write(out, "old")
    write(out, "new")
    assert storage.list_dir(out) == [MANIFEST, "new"]
    assert os.listdir(tmp_path) == ["set"]


def test_a_users_error_leaves_the_old_set_and_no_rubbish(tmp_path):
    out = str(tmp_path / "set")
    write(out, "old")
    with pytest.raises(SchemaError):
        with working_folder(out, "key") as work:
            storage.write_bytes(f"{work}/half", b"x")
            raise SchemaError("wrong")
    assert storage.list_dir(out) == [MANIFEST, "old"]
    assert os.listdir(tmp_path) == ["set"]


def test_a_kill_in_the_middle_leaves_the_old_set_and_the_work(tmp_path):
    out = str(tmp_path / "set")
    write(out, "old")
    killed(f"""
with output.working_folder({out!r}, "key") as work:
    storage.write_bytes(work + "/half", b"x")
    os.kill(os.getpid(), signal.SIGKILL)
""")
    assert Prepared.open(out).manifest["name"] == "old"
    assert storage.list_dir(out) == [MANIFEST, "old"]
    recover(out)
    with working_folder(out, "key") as work:
        assert storage.list_dir(work) == ["half"]
        storage.write_json(f"{work}/{MANIFEST}", {"format": FORMAT, "name": "new"})
    assert Prepared.open(out).manifest["name"] == "new"
    assert os.listdir(tmp_path) == ["set"]


def test_other_inputs_begin_anew_and_remove_what_was_left(tmp_path):
    out = str(tmp_path / "set")
    with pytest.raises(RuntimeError):
        with working_folder(out, "one"):
            raise RuntimeError("the cluster went away")
    with working_folder(out, "two") as work:
        assert storage.list_dir(work) == []
        storage.write_json(f"{work}/{MANIFEST}", {"format": FORMAT})
    assert os.listdir(tmp_path) == ["set"]


@pytest.mark.parametrize("local", [True, False])
def test_a_kill_between_old_and_new_is_made_good_by_the_next_call(tmp_path, monkeypatch, local):
    out = str(tmp_path / "set")
    write(out, "old")
    fatal = "storage.os.rename" if local else "output.storage.copy_file"
    killed(f"""
output.storage.is_local = lambda uri: {local}
real, calls = {fatal}, []
def once(*arguments):
    if calls: os.kill(os.getpid(), signal.SIGKILL)
    calls.append(real(*arguments))
{fatal} = once
with output.working_folder({out!r}, "key") as work:
    for name in ("one", "two"):
        storage.write_bytes(work + "/" + name, b"x")
    storage.write_json(work + "/{MANIFEST}", {{"format": {FORMAT!r}, "name": "new"}})
""")
    with pytest.raises(SchemaError, match="expected a prepared set"):
        Prepared.open(out)
    monkeypatch.setattr(storage, "is_local", lambda uri: local)
    recover(out)
    assert Prepared.open(out).manifest["name"] == "new"
    assert storage.list_dir(out) == [MANIFEST, "one", "two"]


def test_only_a_prepared_set_is_replaced(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="expected a new or empty folder, or a prepared set to replace, found 'thesis.txt'"):
        write(str(mine), "new")
    (mine / "manifest.json").write_text('{"format": "raysys-bundle/1"}')
    with pytest.raises(ConfigError, match="prepared set to replace"):
        write(str(mine), "new")
    with pytest.raises(ConfigError, match="expected a folder to write to, found a file"):
        write(str(mine / "thesis.txt"), "new")
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_a_set_on_another_file_system_is_replaced_with_its_manifest_last(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "is_local", lambda uri: False)
    out = str(tmp_path / "set")
    write(out, "old")
    write(out, "new")
    assert storage.list_dir(out) == [MANIFEST, "new"]
    assert Prepared.open(out).manifest["name"] == "new"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"valid_fraction": 0.6, "test_fraction": 0.5}, "sum below 1"),
        ({"test_fraction": 0}, "expected shares in"),
        ({"min_user_events": -1}, "min_user_events: expected 0 or more, got -1"),
        ({"rows_per_partition": 0}, "rows_per_partition"),
        ({"rows_per_chunk": 0}, "rows_per_chunk"),
        ({"partitions": 100_000}, "partitions: expected at most 65536"),
        ({"max_timestamp": "soon"}, "max_timestamp: expected an ISO date"),
        ({"min_timestamp": "2020-01-01", "max_timestamp": "2019-01-01"}, "is not before"),
        ({"event_types": {"click": {"weight": -1}}}, "event_types.click.weight"),
        ({"event_types": {"click": {"wieght": 1}}}, "did you mean 'weight'"),
        ({"time": "lunar"}, "'utc'"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(values, message):
    with pytest.raises(ConfigError, match=message):
        config.from_dict(PrepareConfig, values)


def test_event_types_are_laid_over_the_defaults():
    settings = config.from_dict(PrepareConfig, {"event_types": {"rating": {"positive": True, "min_value": 3}, "watch": {"weight": 2}}})
    types = settings.merged_event_types()
    assert types["rating"] == EventType(1.0, True, 3.0)
    assert types["watch"] == EventType(2.0)
    assert types["purchase"].positive


def test_the_plausible_range_ends_a_day_after_the_run():
    now = datetime(2024, 1, 1, tzinfo=UTC)
    first, last = PrepareConfig().plausible_us(now)
    assert first == datetime(1990, 1, 1, tzinfo=UTC).timestamp() * 1e6
    assert last == datetime(2024, 1, 2, tzinfo=UTC).timestamp() * 1e6


@pytest.mark.parametrize(
    "header",
    [
        ["user_id", "item_id", "timestamp", "event", "value"],
        ["user_id", "item_id", "datetime", "event", "weight"],  # RecTools
        ["user_id:token", "item_id:token", "timestamp:float", "event:token", "rating:float"],  # RecBole
        ["USER_ID", "ITEM_ID", "TIMESTAMP", "EVENT_TYPE", "EVENT_VALUE"],  # Personalize
    ],
)
def test_column_names_of_neighbours(header):
    columns, notes = map_columns(header, "f", COLUMN_ALIASES, KNOWN)
    assert columns == dict(zip(KNOWN, header))
    assert len(notes) == sum(column not in KNOWN for column in header)


def test_an_exact_name_wins_over_an_alias_and_two_aliases_collide():
    columns, _ = map_columns(["value", "rating"], "f", COLUMN_ALIASES, KNOWN)
    assert columns["value"] == "value"
    with pytest.raises(SchemaError, match="f: columns 'rating' and 'weight' both mean 'value'"):
        map_columns(["rating", "weight"], "f", COLUMN_ALIASES, KNOWN)
