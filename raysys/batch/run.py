"""`raysys recommend-all` and `raysys export-embeddings`: every user's list or vector, by a pool of Ray Data actors.

    OUT/
      plan.json              what is being computed; written first, a run of another plan is refused
      part-00000.parquet ... one file a part, written whole by a worker: there means finished
      items.parquet          item vectors (export-embeddings only)
      manifest.json          written last: the plan, counts, throughput, sha256 of every file

A run that was killed goes on with the parts that are not there. A part depends
on nothing but the plan, so the files are the same however often that happened.
User ids stand in the files only where they were given; log lines name parts.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch

from raysys import config, storage
from raysys.batch.config import BatchConfig
from raysys.batch.stages import EMBEDDINGS, STAGES, Stage, encoder_of, item_vectors_table
from raysys.batch.users import Histories, Part, Users, users_of_bundle, users_of_file, users_of_prepared
from raysys.bundle import Bundle
from raysys.errors import ConfigError, RaysysError
from raysys.pools.config import PoolConfig
from raysys.prepare.dataset import Prepared
from raysys.prepare.stages import quiet_ray_data

FORMAT = "raysys-batch/1"
PLAN, MANIFEST, ITEMS = "plan.json", "manifest.json", "items.parquet"
PROGRESS_S = 5.0

Rows = list[tuple[str, str]]
PART_SCHEMA = pa.schema([("index", pa.int32()), ("rows", pa.list_(pa.int64())), ("user_ids", pa.list_(pa.string())), ("file", pa.string())])


def run_batch(
    model_uri: str,
    out: str,
    *,
    stage: str = "final",
    k: int = 100,
    users_uri: str | None = None,
    prepared_uri: str | None = None,
    settings: BatchConfig | None = None,
    say: Callable[[str], Any] = print,
) -> dict:
    """Compute one stage for all users into `out`; goes on where an earlier call of the same plan was stopped.

    Args:
        model_uri: a bundle.
        out: folder of the result.
        stage: one of STAGES, or EMBEDDINGS.
        k: items a user; fewer are listed where fewer may be shown.
        users_uri: file of user ids; without it, and without a prepared set, all users of the bundle.
        prepared_uri: a prepared set, whose users and whole histories are taken.
        settings: see `BatchConfig`.
        say: prints a line of progress.

    Returns:
        The manifest.

    Raises:
        ConfigError: contradictory arguments, another plan in `out`, or more asked for than the cluster has.
        SchemaError, BundleError: an input is not what it should be.
        RaysysError: a part failed; what is finished stays.
    """
    settings = settings or BatchConfig()
    if stage not in (*STAGES, EMBEDDINGS):
        raise ConfigError(f"--stage: expected one of {', '.join(STAGES)}, got {stage!r}")
    if k < 1:
        raise ConfigError(f"-k: expected at least 1, got {k}")
    if users_uri and prepared_uri:
        raise ConfigError("expected --users or --prepared, got both")
    bundle = Bundle.open(model_uri)
    if stage in ("interest", EMBEDDINGS):
        encoder_of(bundle)
    users = _users(bundle, users_uri, prepared_uri, settings)
    plan = _plan(bundle, users, stage, k)
    if stage in ("final", "retrieval") and PoolConfig(items_from=settings.pools_from).applies(bundle.items.num_rows):
        plan["pools_from"] = settings.pools_from  # lists from pools and from all items must not lie in one folder
    _adopt(out, plan)
    if storage.exists(storage.join(out, MANIFEST)):
        say(f"{out} is complete already")
        return storage.read_json(storage.join(out, MANIFEST))
    there = set(storage.list_dir(out))
    missing = [part for part in users.parts if _name(part.index) not in there]
    if len(missing) < len(users.parts):
        say(f"going on: {len(users.parts) - len(missing)} of {len(users.parts)} parts are there")
    started = time.monotonic()
    made = _compute(missing, model_uri, out, stage, k, users.key, prepared_uri, settings, say) if missing else []
    return _finish(bundle, out, plan, users, made, time.monotonic() - started, settings)


def _users(bundle: Bundle, users_uri: str | None, prepared_uri: str | None, settings: BatchConfig) -> Users:
    if prepared_uri:
        return users_of_prepared(Prepared.open(prepared_uri))
    if users_uri:
        return users_of_file(bundle, users_uri, settings.users_per_part)
    return users_of_bundle(bundle, settings.users_per_part)


def _plan(bundle: Bundle, users: Users, stage: str, k: int) -> dict:
    """All that an output file depends on."""
    plan = {"format": FORMAT, "bundle": bundle.version, "stage": stage, "users": users.kind, "key": users.key, **users.identity}
    if stage != EMBEDDINGS:
        plan["k"] = k
    # Numbers and not names: the same users in other portions would make other files.
    return {**plan, "parts": [len(part.rows) if part.rows is not None else None for part in users.parts]}


def _adopt(out: str, plan: dict) -> None:
    """Make `out` a folder of this plan, or refuse."""
    path = storage.join(out, PLAN)
    if storage.exists(path):
        found = storage.read_json(path)
        if found != plan:
            differing = sorted(name for name in {*found, *plan} if found.get(name) != plan.get(name))
            shown = [name for name in differing if name not in ("parts", "files")]
            what = ", ".join(f"{name} {found.get(name)!r} there, {plan.get(name)!r} now" for name in shown) or "users_per_part"
            raise ConfigError(f"--out {out}: holds another run ({what}); choose another folder or remove it")
    elif storage.list_dir(out):
        raise ConfigError(f"--out {out}: expected an empty or missing folder, or one with {PLAN}; choose another folder")
    else:
        storage.write_json(path, plan)


def _compute(
    parts: list[Part],
    model_uri: str,
    out: str,
    stage: str,
    k: int,
    key: str,
    prepared_uri: str | None,
    settings: BatchConfig,
    say: Callable[[str], Any],
) -> list[dict]:
    actors = min(len(parts), settings.actors or _room(settings))
    worker = {"model_uri": model_uri, "out": out, "stage": stage, "k": k, "key": key, "prepared_uri": prepared_uri, "settings": settings}
    dataset = ray.data.from_arrow([part_table(part) for part in parts]).map_batches(
        PartWriter,
        fn_constructor_kwargs=worker,
        batch_size=None,  # a block is a part
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=settings.cpus_per_actor,
        num_gpus=settings.gpus_per_actor or None,
    )
    made: list[dict] = []
    started = told = time.monotonic()
    try:
        with quiet_ray_data():
            for row in dataset.iter_rows():
                made.append(row)
                if time.monotonic() - told > PROGRESS_S or len(made) == len(parts):
                    told = time.monotonic()
                    done = sum(part["users"] for part in made)
                    say(f"      {len(made):,} of {len(parts):,} parts, {done:,} users, {done / (told - started):,.0f} users/s")
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise RaysysError(
            f"a part failed; {len(made)} parts of this run stay in {out}, the same command goes on from them: {reason}"
        ) from error
    return made


def _room(settings: BatchConfig) -> int:
    """Workers that the cluster has CPUs and GPUs for."""
    found = ray.cluster_resources()
    room = int(found.get("CPU", 0) // settings.cpus_per_actor)
    if settings.gpus_per_actor:
        room = min(room, int(found.get("GPU", 0) / settings.gpus_per_actor))
    if room < 1:
        raise ConfigError(
            f"a worker asks for {settings.cpus_per_actor} CPUs and {settings.gpus_per_actor:g} GPUs, "
            f"the cluster has {found.get('CPU', 0):g} and {found.get('GPU', 0):g}; "
            "lower cpus_per_actor or gpus_per_actor, or set actors where an autoscaler will add nodes"
        )
    return room


def part_table(part: Part) -> pa.Table:
    """A part as the block of one row that a worker takes."""
    rows = None if part.rows is None else part.rows.tolist()
    return pa.Table.from_pylist([{"index": part.index, "rows": rows, "user_ids": part.user_ids, "file": part.file}], schema=PART_SCHEMA)


class PartWriter:
    """A worker of the pool: holds the bundle, computes parts and writes their files."""

    def __init__(self, model_uri: str, out: str, stage: str, k: int, key: str, prepared_uri: str | None, settings: BatchConfig):
        torch.set_num_threads(settings.cpus_per_actor)
        bundle = Bundle.open(model_uri)
        self.out, self.key = out, key
        self.histories = Histories(bundle, Prepared.open(prepared_uri) if prepared_uri else None)
        pools = PoolConfig(items_from=settings.pools_from)
        self.stage = Stage(bundle, stage, k=k, batch_size=settings.batch_size, threads=settings.cpus_per_actor, pools=pools)

    def __call__(self, block: pa.Table) -> pa.Table:
        """One row (index, users, seconds) for each part of the block, after its file is written."""
        return pa.Table.from_pylist([self._write(row) for row in block.to_pylist()])

    def _write(self, row: dict) -> dict:
        started = time.monotonic()
        rows = None if row["rows"] is None else np.array(row["rows"], np.int64)
        keys, queries = self.histories.load(Part(row["index"], rows, row["user_ids"], row["file"]))
        storage.write_table(storage.join(self.out, _name(row["index"])), self.stage.table(keys, self.key, queries))
        return {"index": row["index"], "users": len(queries), "seconds": time.monotonic() - started}


def _finish(bundle: Bundle, out: str, plan: dict, users: Users, made: list[dict], seconds: float, settings: BatchConfig) -> dict:
    names = [_name(part.index) for part in users.parts]
    if plan["stage"] == EMBEDDINGS:
        storage.write_table(storage.join(out, ITEMS), item_vectors_table(bundle))
        names.append(ITEMS)
    computed = sum(part["users"] for part in made)
    manifest = {
        **{name: value for name, value in plan.items() if name not in ("parts", "files")},
        "parts": len(users.parts),
        "this_run": {
            "parts": len(made),
            "users": computed,
            "seconds": round(seconds, 3),
            "users_per_second": round(computed / seconds, 1) if made else None,
            "seconds_in_workers": round(sum(part["seconds"] for part in made), 3),
        },
        "settings": config.to_dict(settings),
        "files": {name: storage.sha256(storage.join(out, name)) for name in names},
    }
    storage.write_json(storage.join(out, MANIFEST), manifest)
    return manifest


def _name(index: int) -> str:
    return f"part-{index:05d}.parquet"


def summary_rows(manifest: dict) -> Rows:
    """The closing table of the commands."""
    run = manifest["this_run"]
    rows = [("stage", f"{manifest['stage']}, bundle {manifest['bundle']}"), ("key", manifest["key"]), ("parts", f"{manifest['parts']:,}")]
    if run["users"]:
        rows.append(
            (
                "throughput",
                f"{run['users_per_second']:,.0f} users/s ({run['users']:,} users in {run['seconds']:.1f} s, {run['parts']} parts)",
            )
        )
    return rows
