"""Trials under Ray Tune: the training of one, who goes on, and a record of each that survives the driver.

A finished trial is one JSON file, written by the driver as soon as it ends;
what Ray Tune keeps for itself (pickles) is never read back.
"""

import contextlib
import copy
import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ray import tune as ray_tune
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining
from ray.tune.search import BasicVariantGenerator

from raysys.errors import ConfigError
from raysys.prepare.dataset import Prepared
from raysys.train.checkpoint import read_rows, read_state, write_rows, write_state
from raysys.train.config import TrainConfig
from raysys.train.encoder import TrainState, train_encoder
from raysys.train.encoder_stages import new_encoder
from raysys.train.evidence import Evidence
from raysys.train.stream import source_of
from raysys.train.survey import Survey
from raysys.train.validation import validation
from raysys.tune.config import TuneConfig
from raysys.tune.space import with_choice

BLANK: dict[str, Any] = {"ndcg@10": [], "loss": [], "epochs": 0, "best": None, "seconds": 0.0, "stopped": None, "error": None}


def run_trials(
    prepared_uri: str,
    survey: Survey | None,
    base: TrainConfig,
    search: dict[str, dict],
    first: dict,
    points: list[dict],
    kept: list[dict],
    *,
    settings: TuneConfig,
    count: int,
    seed: int,
    work: str,
    keep: Callable[[dict], None],
) -> None:
    """Train `count` trials.

    Args:
        prepared_uri: a prepared set.
        survey: of it where it is streamed; None where every trial reads it.
        base: settings of every trial where the search says nothing.
        search: what `read_search` gave.
        first: what the settings as given say about what is searched.
        points: settings of the first trials; all of them, unless Optuna suggests.
        kept: records of trials finished before, from which Optuna learns.
        settings: of the sweep.
        count: trials to run.
        seed: of the search.
        work: folder for Ray Tune's own files.
        keep: called with each finished record.
    """
    free = [index for index in range(len(kept) + count) if index not in {record["trial"] for record in kept}]
    watcher = _Watcher(free, base, keep)
    cpus = settings.cpus_per_trial or float(base.scaling.cpus_per_worker or 1)
    gpus = settings.gpus_per_trial if settings.gpus_per_trial is not None else float(base.scaling.use_gpu)
    # Tune's tables, and the logs it writes of each trial beside the one it reads itself, say nothing that our records do not.
    os.environ.update({"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"})
    algorithm = (
        _optuna(search, first, points, kept, seed) if settings.algorithm == "optuna" else BasicVariantGenerator(points_to_evaluate=points)
    )
    trainable = ray_tune.with_parameters(
        _trial, prepared_uri=prepared_uri, survey=survey, base=base, use_gpu=gpus > 0, hand_on=settings.scheduler == "pbt"
    )
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(trainable, {"cpu": cpus, "gpu": gpus}),
        param_space=None if settings.algorithm == "optuna" else {name: _domain(domain) for name, domain in search.items()},
        tune_config=ray_tune.TuneConfig(
            metric="ndcg",
            mode="max",
            num_samples=count,
            search_alg=algorithm,
            scheduler=_scheduler(settings, base.encoder.epochs, search),
            reuse_actors=True,  # a process that has imported torch; PBT would start one for each trial at each decision
        ),
        run_config=ray_tune.RunConfig(
            storage_path=work,
            name="tune",
            verbose=0,
            callbacks=[watcher, JsonLoggerCallback()],
            failure_config=ray_tune.FailureConfig(max_failures=base.scaling.max_failures),
        ),
    )
    tuner.fit()


def _scheduler(settings: TuneConfig, epochs: int, search: dict[str, dict]) -> Any:
    if settings.scheduler == "asha":
        return ASHAScheduler(time_attr="epoch", max_t=epochs, grace_period=max(1, epochs // 10), reduction_factor=settings.reduction)
    if settings.scheduler == "pbt":
        # A choice is a list here: values of a domain would be multiplied, and lead out of it.
        mutations = {name: domain["choice"] if "choice" in domain else _domain(domain) for name, domain in search.items()}

        def inside(choice: dict) -> dict:
            """Changes are factors of 1.2 and 0.8 and could lead out of the space, a dropout above 1 for instance."""
            ranges = {name: next(iter(domain.values())) for name, domain in search.items() if "choice" not in domain}
            return {**choice, **{name: min(max(choice[name], low), high) for name, (low, high) in ranges.items()}}

        return PopulationBasedTraining(
            time_attr="epoch",
            perturbation_interval=settings.perturb_every,
            hyperparam_mutations=mutations,
            custom_explore_fn=inside,
            # All wait for each other: else one that starts early is over before the others come to learn from it.
            synch=True,
        )
    return FIFOScheduler()


def _domain(domain: dict) -> Any:
    kind, bounds = next(iter(domain.items()))
    if kind == "choice":
        return ray_tune.choice(bounds)
    if kind == "randint":
        return ray_tune.randint(bounds[0], bounds[1] + 1)
    return ray_tune.uniform(*bounds) if kind == "uniform" else ray_tune.loguniform(*bounds)


def _optuna(search: dict[str, dict], first: dict, points: list[dict], kept: list[dict], seed: int) -> Any:
    """TPE over the space, told of the finished trials."""
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch
    except ImportError:
        raise ConfigError(
            "tune.algorithm: 'optuna' needs Optuna, which is not installed; run `pip install 'raysys[tune]'` or use 'random'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions: dict[str, Any] = {}
    for name, domain in search.items():
        kind, bounds = next(iter(domain.items()))
        if kind == "choice":
            distributions[name] = optuna.distributions.CategoricalDistribution([*bounds, *({first[name]} - {*bounds})])
            continue
        # Optuna learns from the given settings too, so they have to lie in its space.
        low, high = min(bounds[0], first[name]), max(bounds[1], first[name])
        if kind == "randint":
            distributions[name] = optuna.distributions.IntDistribution(low, high)
        else:
            log = kind == "loguniform" and low > 0
            distributions[name] = optuna.distributions.FloatDistribution(low, high, log=log)
    searcher = OptunaSearch(distributions, metric="ndcg", mode="max", points_to_evaluate=points or None, seed=seed)
    for record in kept:
        if record["best"] is not None:
            searcher.add_evaluated_point(record["settings"], record["best"])
    return searcher


def _trial(choice: dict, *, prepared_uri: str, survey: Survey | None, base: TrainConfig, use_gpu: bool, hand_on: bool) -> None:
    """One training of the encoder; reports after each validation, with its state where others may take it over."""
    settings = with_choice(base, choice)
    torch.set_num_threads(settings.scaling.cpus_per_worker or 1)
    prepared = Prepared.open(prepared_uri)
    evidence = Evidence(prepared, settings, survey)
    encoder, source = new_encoder(prepared, settings), source_of(evidence, "fit")
    resume, checkpoint = None, ray_tune.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            # Tensors only: learning rate and decay of the optimizer are those of this trial, not of the donor.
            rows = read_rows(folder, 0, prepared.num_items)
            resume = TrainState(*read_state(folder), rows, 0, prepared.num_items)

    def on_epoch(last: dict) -> None:
        if last["validation"] is not None and not hand_on:
            ray_tune.report(_figures(last))

    def on_checkpoint(state: TrainState) -> None:
        last = state.progress["history"][-1]
        if last["validation"] is not None:
            with tempfile.TemporaryDirectory() as folder:
                write_state(folder, state.progress, state.dense)
                write_rows(folder, state.rows, state.first, state.stop)
                ray_tune.report(_figures(last), checkpoint=ray_tune.Checkpoint.from_directory(folder))

    with contextlib.closing(source):  # also when the scheduler ends the trial: its process goes on with another one
        train_encoder(
            encoder,
            source,
            settings.encoder,
            seed=settings.seed,
            device="cuda" if use_gpu and torch.cuda.is_available() else "cpu",
            on_epoch=on_epoch,
            on_checkpoint=on_checkpoint if hand_on else None,
            resume=resume,
            validate=validation(evidence),
        )


def _figures(last: dict) -> dict:
    return {"epoch": last["epoch"], "ndcg": last["validation"], "loss": last["loss"]}


class _Watcher(ray_tune.Callback):
    """Prints what a person wants to see of each trial, and keeps it.

    Args:
        numbers: of the trials to come, in their order.
        base: settings, for patience and length.
        keep: called with each finished record.
    """

    def __init__(self, numbers: list[int], base: TrainConfig, keep: Callable[[dict], None]):
        self.numbers, self.base, self.keep, self.done = numbers, base, keep, 0
        self.records: dict[str, dict] = {}

    def _record(self, trial: Any, trials: list) -> dict:
        self.on_step_end(0, trials)
        return self.records[trial.trial_id]

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        # Numbered as they come: a trial that is started again after a failure moves to the end of Ray Tune's list.
        for trial in trials:
            if trial.trial_id not in self.records:
                self.records[trial.trial_id] = {"trial": self.numbers[len(self.records)], "settings": {}, **copy.deepcopy(BLANK)}

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        record = self._record(trial, trials)
        if result["epoch"] <= record["epochs"]:  # started again after its node died, or at a better trial's checkpoint
            record.update({"ndcg@10": [], "loss": []})
        record["ndcg@10"].append(round(result["ndcg"], 6))
        record["loss"].append(round(result["loss"], 6))
        record["epochs"], record["seconds"] = result["epoch"], round(result["time_total_s"], 1)
        # A trial that changes its settings on the way stands for those of its best figure.
        if record["best"] is None or result["ndcg"] >= record["best"]:
            record.update(best=round(result["ndcg"], 6), settings=dict(trial.config))

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        record = self._record(trial, trials)
        figures = record["ndcg@10"]
        if record["epochs"] < self.base.encoder.epochs:
            stale = len(figures) - 1 - int(np.argmax(figures)) if figures else 0
            record["stopped"] = "no better epoch" if stale >= with_choice(self.base, record["settings"]).encoder.patience else "scheduler"
        why = f", stopped early ({record['stopped']})" if record["stopped"] else ""
        self._end(record, f"ndcg@10 {record['best'] or 0:.4f} in {record['epochs']} epochs, {record['seconds']:.1f} s{why}")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        record = self._record(trial, trials)
        record["settings"] = dict(trial.config)
        error = trial.get_pickled_error() or trial.get_error()
        record["error"] = str(error).strip().splitlines()[-1]
        self._end(record, f"failed: {record['error']}")

    def _end(self, record: dict, line: str) -> None:
        self.keep(record)
        self.done += 1
        print(f"      trial {record['trial']}: {line}; {self.done} of {len(self.numbers)} done", flush=True)
