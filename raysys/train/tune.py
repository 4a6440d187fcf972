"""`raysys tune`: Ray Tune over the encoder's settings, bad trials stopped early by ASHA.

Every trial trains the encoder as `stages.py` does, on the same part and judged
by the same validation figure, epoch by epoch. The other models are not trained:
they cost seconds and have their defaults from elsewhere. The first trial is the
settings as they were given, so the winner is never worse than those on validation.
"""

import copy
import dataclasses
import os
import typing
from typing import Any

import numpy as np
import torch
import yaml
from ray import tune as ray_tune
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler

from raysys import config, storage
from raysys.errors import ConfigError, RaysysError
from raysys.prepare.dataset import Prepared
from raysys.train.batches import InMemory
from raysys.train.config import TrainConfig, dotted_names, with_data_defaults
from raysys.train.encoder import train_encoder
from raysys.train.parts import Judged, Parts, new_encoder, validation

BEST, TRIALS = "best.yaml", "trials.json"
DEFAULT_SEARCH: dict[str, dict] = {
    "interest.dropout": {"uniform": [0.1, 0.6]},
    "encoder.lr": {"loguniform": [1e-3, 1e-2]},
    "encoder.weight_decay": {"choice": [0.0, 0.01, 0.1, 0.3]},
    "interest.dim": {"choice": [32, 64, 128]},
}
KINDS = ("choice", "uniform", "loguniform", "randint")
SEARCHED = ("interest.", "encoder.")
"""Only these change what a trial measures."""
FIXED = {"encoder.epochs": "it is the length of a trial, and ASHA decides who gets all of it"}
REDUCTION = 3
"""One trial in so many goes on at each decision of ASHA."""

Rows = list[tuple[str, str]]


def tune(prepared_uri: str, out: str, *, config_uri: str | None, overrides: list[str], samples: int, seed: int) -> Rows:
    """Search settings; writes `best.yaml` for `raysys train --config` and `trials.json`.

    Args:
        prepared_uri: a prepared set.
        out: folder of the results.
        config_uri: YAML of train settings with an optional `search:` mapping, see `read_search`.
        overrides: `key=value` settings that win over the file.
        samples: number of trials, the given settings among them.
        seed: of the search; the trials themselves use `seed` of the settings.

    Returns:
        The closing table.

    Raises:
        ConfigError: the settings or the search space are wrong.
        RaysysError: no trial finished.
    """
    if samples < 1:
        raise ConfigError(f"--samples: expected at least 1, got {samples}")
    values = config.merge(config.read_yaml(config_uri) if config_uri else {}, config.parse_overrides(overrides))
    search = read_search(values.pop("search", None))
    given = frozenset(dotted_names(values))
    prepared = Prepared.open(prepared_uri)
    settings = config.from_dict(TrainConfig, values)
    lengths = np.diff(Parts(prepared.sequences(), settings).train.indptr)
    base = with_data_defaults(settings, given, lengths, prepared.num_items)
    choices = draw(search, samples - 1, seed)
    candidates = [_with(base, choice) for choice in [{}, *choices]]  # all of them checked before the first one starts
    trials = _run(prepared_uri, candidates, out)
    for trial, choice in zip(trials, [{}, *choices], strict=True):
        trial["settings"] = choice or {name: _get(base, name) for name in search}
    finished = [trial for trial in trials if trial["best"] is not None]
    if not finished:
        raise RaysysError(f"no trial of {len(trials)} finished: {trials[0]['error']}")
    best = max(finished, key=lambda trial: trial["best"])
    winner = config.to_dict(candidates[best["trial"]])
    report = {"metric": "validation ndcg@10", "best": best["trial"], "search": search, "trials": trials}
    storage.write_json(storage.join(out, TRIALS), report)
    storage.write_bytes(storage.join(out, BEST), yaml.safe_dump(winner, sort_keys=False).encode())
    return _summary(trials, best, storage.join(out, BEST))


def read_search(values: Any) -> dict[str, dict]:
    """The search space as {dotted name: {kind: values}}; the default one when there is none.

    Names may be dotted or nested. Kinds: `choice: [...]`, `uniform: [low, high]`, `loguniform: [low, high]`, `randint: [low, high]`
    (both ends included).

    Raises:
        ConfigError: naming the setting, what was expected and what was found.
    """
    if values is None:
        return DEFAULT_SEARCH
    if not isinstance(values, dict) or not values:
        raise ConfigError(f"search: expected a mapping of settings, got {values!r}")
    space = {}
    for name, domain in _domains(values):
        known = f"expected one of {', '.join(KINDS)}, such as {{uniform: [0.1, 0.5]}}"
        if not isinstance(domain, dict) or len(domain) != 1 or next(iter(domain)) not in KINDS:
            raise ConfigError(f"search.{name}: {known}, got {domain!r}")
        if name in FIXED or not name.startswith(SEARCHED):
            why = FIXED.get(name, f"only settings under {' and '.join(part.rstrip('.') for part in SEARCHED)} change what a trial measures")
            raise ConfigError(f"search.{name}: cannot be searched, because {why}")
        kind, bounds = next(iter(domain.items()))
        space[name] = {kind: _bounds(name, kind, bounds)}
        for value in space[name][kind]:
            _check_value(name, value)
    return space


def draw(search: dict[str, dict], count: int, seed: int) -> list[dict]:
    """`count` points of the search space, {dotted name: value} each."""
    rng = np.random.default_rng(seed)
    points = []
    for _ in range(count):
        point: dict[str, Any] = {}
        for name, domain in search.items():
            kind, bounds = next(iter(domain.items()))
            if kind == "choice":
                point[name] = bounds[int(rng.integers(len(bounds)))]
            elif kind == "randint":
                point[name] = int(rng.integers(bounds[0], bounds[1] + 1))
            elif kind == "uniform":
                point[name] = float(f"{rng.uniform(*bounds):.4g}")
            else:
                point[name] = float(f"{np.exp(rng.uniform(*np.log(bounds))):.4g}")
        points.append(point)
    return points


def _domains(values: dict) -> list[tuple[str, Any]]:
    found = []
    for name, domain in values.items():
        is_section = f"{name}." in SEARCHED and isinstance(domain, dict)
        found += [(f"{name}.{inner}", value) for inner, value in domain.items()] if is_section else [(str(name), domain)]
    return found


def _bounds(name: str, kind: str, bounds: Any) -> list:
    if kind == "choice":
        if not isinstance(bounds, list) or not bounds:
            raise ConfigError(f"search.{name}: expected choice: [one or more values], got {bounds!r}")
        return bounds
    try:
        low, high = (int(bound) if kind == "randint" else float(bound) for bound in bounds)  # YAML reads 1e-3 as text
    except (TypeError, ValueError):
        raise ConfigError(f"search.{name}: expected {kind}: [low, high], got {bounds!r}") from None
    if not low < high or (kind == "loguniform" and low <= 0):
        order = "0 < low < high" if kind == "loguniform" else "low < high"
        raise ConfigError(f"search.{name}: expected {kind}: [low, high] with {order}, got {bounds!r}")
    return [low, high]


def _check_value(name: str, value: Any) -> None:
    """Refuse an unknown name or a wrong type; whether values go together shows only when all are drawn."""
    section, _, field = name.partition(".")
    hints = typing.get_type_hints(typing.get_type_hints(TrainConfig)[section])
    fields = [(known, hint, dataclasses.field(default=None)) for known, hint in hints.items()]
    config.from_dict(dataclasses.make_dataclass(section, fields), {field: value}, where=f"search.{section}")


def _with(settings: TrainConfig, choice: dict) -> TrainConfig:
    values = config.to_dict(settings)
    for name, value in choice.items():
        nested: Any = value
        for part in reversed(name.split(".")):
            nested = {part: nested}
        values = config.merge(values, nested)
    try:
        return config.from_dict(TrainConfig, values)
    except ConfigError as error:
        raise ConfigError(f"search: {error}") from None


def _get(settings: TrainConfig, name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _run(prepared_uri: str, candidates: list[TrainConfig], out: str) -> list[dict]:
    """Train every candidate under ASHA; one record each, in their order."""
    first = candidates[0]
    watcher = _Watcher([candidate.encoder.patience for candidate in candidates], first.encoder.epochs)
    cpus = first.scaling.cpus_per_worker or 1
    resources = {"cpu": float(cpus), "gpu": 1.0} if first.scaling.use_gpu else {"cpu": float(cpus)}
    # Tune's tables, and the logs it writes of each trial beside the one it reads itself, say nothing that `trials.json` does not.
    os.environ.update({"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"})
    work = storage.join(out, "work")
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(ray_tune.with_parameters(_trial, prepared_uri=prepared_uri, candidates=candidates), resources),
        param_space={"trial": ray_tune.grid_search(list(range(len(candidates))))},
        tune_config=ray_tune.TuneConfig(
            metric="ndcg",
            mode="max",
            scheduler=ASHAScheduler(
                time_attr="epoch",
                max_t=first.encoder.epochs,
                grace_period=max(1, first.encoder.epochs // 10),
                reduction_factor=REDUCTION,
            ),
        ),
        run_config=ray_tune.RunConfig(storage_path=work, name="tune", verbose=0, callbacks=[watcher, JsonLoggerCallback()]),
    )
    tuner.fit()
    storage.remove(work)
    return watcher.records


def _trial(parameters: dict, *, prepared_uri: str, candidates: list[TrainConfig]) -> None:
    """One training of the encoder; reports after each validation."""
    settings = candidates[parameters["trial"]]
    torch.set_num_threads(settings.scaling.cpus_per_worker or 1)
    prepared = Prepared.open(prepared_uri)
    parts = Parts(prepared.sequences(), settings)

    def on_epoch(last: dict) -> None:
        if last["validation"] is not None:
            ray_tune.report({"epoch": last["epoch"], "ndcg": last["validation"], "loss": last["loss"]})

    train_encoder(
        new_encoder(prepared, settings),
        InMemory(parts.fit),
        settings.encoder,
        seed=settings.seed,
        device="cuda" if settings.scaling.use_gpu and torch.cuda.is_available() else "cpu",
        on_epoch=on_epoch,
        validate=validation(Judged.of(parts, settings, prepared.num_items)),
    )


class _Watcher(ray_tune.Callback):
    """Prints what a person wants to see of each trial, and keeps it.

    Args:
        patience: validations without a better figure that end each trial by itself.
        epochs: longest trial.
    """

    def __init__(self, patience: list[int], epochs: int):
        self.patience, self.epochs, self.done = patience, epochs, 0
        blank = {"ndcg@10": [], "loss": [], "epochs": 0, "best": None, "seconds": 0.0, "stopped": None, "error": None}
        self.records: list[dict] = [{"trial": index, "settings": {}, **copy.deepcopy(blank)} for index in range(len(patience))]

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        record = self.records[trial.config["trial"]]
        if result["epoch"] <= record["epochs"]:  # Tune starts a trial again when its node has died
            record.update({"ndcg@10": [], "loss": []})
        record["ndcg@10"].append(round(result["ndcg"], 6))
        record["loss"].append(round(result["loss"], 6))
        record.update(epochs=result["epoch"], best=max(record["ndcg@10"]), seconds=round(result["time_total_s"], 1))

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        record = self.records[trial.config["trial"]]
        figures = record["ndcg@10"]
        if record["epochs"] < self.epochs:
            stale = len(figures) - 1 - int(np.argmax(figures)) if figures else 0
            record["stopped"] = "no better epoch" if stale >= self.patience[record["trial"]] else "ASHA"
        self.done += 1
        why = f", stopped early ({record['stopped']})" if record["stopped"] else ""
        figure = f"ndcg@10 {record['best'] or 0:.4f} in {record['epochs']} epochs, {record['seconds']:.1f} s"
        print(f"      trial {record['trial']}: {figure}{why}; {self.done} of {len(trials)} done", flush=True)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        record = self.records[trial.config["trial"]]
        error = trial.get_pickled_error() or trial.get_error()
        record["error"] = str(error).strip().splitlines()[-1]
        print(f"      trial {record['trial']}: failed: {record['error']}", flush=True)


def _summary(trials: list[dict], best: dict, path: str) -> Rows:
    rows = []
    for trial in sorted(trials, key=lambda trial: -(trial["best"] or 0)):
        settings = ", ".join(f"{name.split('.')[-1]}={value}" for name, value in trial["settings"].items())
        note = trial["error"] or (f"stopped: {trial['stopped']}" if trial["stopped"] else "")
        figure = f"ndcg@10 {trial['best'] or 0:.4f}  {trial['epochs']:3d} epochs"
        rows.append((f"trial {trial['trial']}", f"{figure}  {settings}  {note}".rstrip()))
    return [*rows, ("best", f"trial {best['trial']}"), ("next", f"raysys train --config {path} --prepared DIR --out BUNDLE")]
