"""`raysys train`: one Ray Train run, then the bundle. Knows the driver's side only; see `stages.py`.

One run trains everything, because every start of a Train run costs seconds.
Worker 0 leaves the finished parts in the last checkpoint; the driver turns them
into a bundle, since only the driver holds the key that hides user ids.
"""

import dataclasses
import hashlib
import json
import time
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig
from ray.train import ScalingConfig as RayScalingConfig
from ray.train.torch import TorchConfig
from safetensors.numpy import load as load_arrays

from raysys import config, storage
from raysys.bundle import Bundle, Histories, load_model
from raysys.errors import ConfigError, RaysysError, SchemaError
from raysys.prepare.dataset import Prepared
from raysys.train.config import TrainConfig, with_data_defaults
from raysys.train.evidence import Evidence
from raysys.train.progress import printed_progress
from raysys.train.stages import PARTS, run_stages
from raysys.train.survey import survey_if_streamed
from raysys.train.trainer import Trainer
from raysys.train.worker import Plan

Rows = list[tuple[str, str]]


def train(
    prepared_uri: str,
    out: str,
    settings: TrainConfig,
    *,
    given: frozenset[str] = frozenset(),
    fit: str = "train",
    seed: int | None = None,
    time_budget_s: float | None = None,
    quiet: bool = False,
) -> dict:
    """Train every model of the pipeline and write a bundle.

    Interrupted runs continue: a second call with the same data, settings and
    `out` starts from the last checkpoint.

    Args:
        prepared_uri: a prepared set.
        out: where the bundle goes.
        settings: see `TrainConfig`.
        given: dotted names of the settings that somebody chose; the others may follow from the data.
        fit: "train", or "train+valid" to refit on both after every choice is made (labelled in the manifest).
        seed: overrides `settings.seed`.
        time_budget_s: wall-clock seconds for the whole command; the best validation state so far is kept.
        quiet: print no progress.

    Returns:
        The bundle's manifest.

    Raises:
        SchemaError: `prepared_uri` is not a prepared set, or holds too little to train on.
        ConfigError: the settings ask for more than the cluster has.
    """
    started = time.time()
    if seed is not None:
        settings = dataclasses.replace(settings, seed=seed)
    prepared = Prepared.open(prepared_uri)
    counts = prepared.manifest["counts"]
    if counts["train"] < 2:
        raise SchemaError(f"{prepared_uri}: expected at least two training events, found {counts['train']}; prepare more data")
    survey = survey_if_streamed(prepared, settings.scaling)
    settings = with_data_defaults(settings, given, *Evidence(prepared, settings, survey).statistics)
    workers, cpus = _resources(settings)
    work = storage.beside(out, ".work")
    name = _run_name(prepared, settings, fit)
    plan = Plan(
        prepared_uri=prepared_uri,
        settings=settings,
        fit=fit,
        threads=cpus,
        deadline=None if time_budget_s is None else started + 0.9 * time_budget_s,
        run=name,
        survey=survey,
    )
    say = (lambda line: None) if quiet else (lambda line: print(f"      {line}", flush=True))
    with printed_progress(say) as board:
        trainer = Trainer(
            run_stages,
            train_loop_config={"plan": plan, "board": board},
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if workers > 1 and _has_cuda(settings) else "gloo"),
            scaling_config=RayScalingConfig(  # type: ignore[call-arg]  # mypy sees the signature of before Train V2
                num_workers=_elastic(settings),  # type: ignore[arg-type]
                use_gpu=settings.scaling.use_gpu,
                resources_per_worker={"CPU": cpus},
                elastic_resize_monitor_interval_s=settings.scaling.resize_every_s,
            ),
            run_config=RunConfig(
                name=name,
                storage_path=work,
                failure_config=FailureConfig(max_failures=settings.scaling.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        )
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise RaysysError(f"training failed; its checkpoints stay in {work}, the same command continues from them: {error}") from error
    evidence = Evidence(prepared, settings, survey)
    manifest = _write_bundle(evidence, out, fit, _read_parts(result.checkpoint), seconds=time.time() - started)
    storage.remove(work)
    return manifest


def _resources(settings: TrainConfig) -> tuple[int, int]:
    """Workers, and the CPUs each of them gets; a worker must fit on one node."""
    scaling = settings.scaling
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if scaling.use_gpu:
        nodes = [node for node in nodes if node.get("GPU", 0) >= 1]
    found = [int(node.get("CPU", 0)) for node in nodes]

    def fits(workers: int, cpus: int) -> bool:
        slots = [int(node.get("CPU", 0) // cpus) for node in nodes]
        if scaling.use_gpu:
            slots = [min(slot, int(node["GPU"])) for slot, node in zip(slots, nodes, strict=True)]
        return sum(slots) >= workers

    cpus = scaling.cpus_per_worker or next((cpus for cpus in range(max(found, default=1), 0, -1) if fits(scaling.workers, cpus)), 1)
    least = scaling.min_workers or scaling.workers  # the others may come later
    # GPU nodes may not be up yet: an autoscaler starts them when they are asked for.
    if not fits(least, cpus) and not scaling.use_gpu:
        raise ConfigError(
            f"scaling asks for {least} workers of {cpus} CPUs, the cluster's nodes have {', '.join(map(str, found))}; "
            "lower scaling.workers, scaling.min_workers or scaling.cpus_per_worker"
        )
    return scaling.workers, cpus


def _has_cuda(settings: TrainConfig) -> bool:
    """Whether torch can use a GPU where the workers will run; a node may offer GPUs to Ray while its torch was built without CUDA."""
    if not settings.scaling.use_gpu:
        return False
    return ray.get(ray.remote(num_gpus=1, num_cpus=0)(torch.cuda.is_available).remote())


def _elastic(settings: TrainConfig) -> int | tuple[int, int]:
    scaling = settings.scaling
    return scaling.workers if scaling.min_workers is None else (scaling.min_workers, scaling.workers)


def _run_name(prepared: Prepared, settings: TrainConfig, fit: str) -> str:
    """Same data and settings, same name: that is what lets a second call continue the first."""
    # Left out: a run may continue on another number of workers, and be watched differently.
    values = {**config.to_dict(settings), "scaling": None, "logging": None, "fit": fit, "data": prepared.manifest["fingerprint"]}
    return "train-" + hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _read_parts(checkpoint: Any) -> dict:
    with checkpoint.as_directory() as folder:
        parts = storage.read_json(storage.join(folder, PARTS))
        parts["arrays"] = {name: load_arrays(storage.read_bytes(storage.join(folder, f"{name}.safetensors"))) for name in parts["metas"]}
    return parts


def _write_bundle(evidence: Evidence, out: str, fit: str, parts: dict, *, seconds: float) -> dict:
    prepared, settings = evidence.prepared, evidence.settings
    user_ids = prepared.users()["user_id"].cast(pa.large_string())
    # Serving starts where the test part begins, so that a test event is never in the history it is asked for.
    histories = Histories.stack(
        Histories.build(part, user_ids.take(pa.array(part.user_idx)).to_pylist(), max_events=settings.history_max_events)
        for part in evidence.of("last refit")
    )
    models = {name: load_model(name, parts["arrays"][name], meta) for name, meta in parts["metas"].items()}
    bundle = Bundle(prepared.items(), models, parts["fusion"], histories)
    bundle.write(
        out,
        manifest={
            "config": config.to_dict(settings),
            "fit": fit,
            "data": {key: prepared.manifest[key] for key in ("fingerprint", "split", "time", "counts")},
            "time": prepared.manifest["time"],
            "watermark": prepared.manifest["watermark"],
            "events": prepared.events,
            "event_types": prepared.manifest["event_types"],
            "metrics": parts["metrics"],
            "leakage": parts["leakage"],
            "seconds": round(seconds, 1),
            "log_offset": None,
        },
    )
    return bundle.manifest


def summary_rows(manifest: dict) -> Rows:
    """The closing table of the command."""
    metrics = manifest["metrics"]
    rows = [("version", manifest["version"]), ("seconds", f"{manifest['seconds']:.0f}")]
    for name, value in ((name, value) for name, value in metrics.get("validation", {}).items() if value is not None):
        rows.append((f"valid ndcg@10, {name}", f"{value:.4f}"))
    weights = manifest["fusion"]["mixture"]["weights"]
    rows.append(("fusion weights", ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items())))
    rows.append(("ranker weight", f"{manifest['fusion']['ranker_weight']:g}"))
    return rows
