"""`raysys tune`: settings of the encoder searched with Ray Tune; the best is left for `raysys train --config`.

    OUT/
      plan.json            what is searched; a sweep of another plan is refused
      trials/trial-*.json  a finished trial each, written as it ends; a sweep that was killed keeps them
      trials.json, report.html, best.yaml, and comparison.json with `--compare`

Every trial trains the encoder as `train/stages.py` does, on the same part and judged
by the same validation figure, epoch by epoch. The other models are not trained:
they cost seconds and have their defaults from elsewhere. The first trial is the
settings as they were given, so the winner is never worse than those on validation.
"""

import secrets
from typing import Any

import yaml

from raysys import config, storage
from raysys.errors import ConfigError, RaysysError
from raysys.prepare.dataset import Prepared
from raysys.train.config import TrainConfig, dotted_names, with_data_defaults
from raysys.train.evidence import Evidence
from raysys.train.survey import survey_if_streamed
from raysys.tune.compare import compare
from raysys.tune.config import TuneConfig
from raysys.tune.report import importance, write_report
from raysys.tune.space import check_mutable, draw, grid, read_search, value_of, with_choice
from raysys.tune.sweep import run_trials

PLAN, TRIAL_FOLDER, TRIALS, REPORT, BEST, COMPARISON = "plan.json", "trials", "trials.json", "report.html", "best.yaml", "comparison.json"

Rows = list[tuple[str, str]]


def tune(
    prepared_uri: str,
    out: str,
    *,
    config_uri: str | None,
    overrides: list[str],
    samples: int,
    seed: int,
    compared: bool = False,
) -> Rows:
    """Search settings; goes on where an earlier call of the same plan was stopped.

    Finished trials are kept; those that were running start again, and ASHA's
    decisions are made among the trials of one call.

    Args:
        prepared_uri: a prepared set.
        out: folder of the results.
        config_uri: YAML of train settings with an optional `search:` mapping (see `read_search`) and `tune:` (see `TuneConfig`).
        overrides: `key=value` settings that win over the file.
        samples: number of trials, the given settings among them; a grid has as many as it has combinations, plus those settings.
        seed: of the search; the trials themselves use `seed` of the settings.
        compared: train a bundle with the winner's settings and one with the given ones, and compare them on the test part.

    Returns:
        The closing table.

    Raises:
        ConfigError: the settings or the search space are wrong, or `out` holds another sweep.
        RaysysError: no trial finished.
    """
    if samples < 1:
        raise ConfigError(f"--samples: expected at least 1, got {samples}")
    values = config.merge(config.read_yaml(config_uri) if config_uri else {}, config.parse_overrides(overrides))
    search, sweep = read_search(values.pop("search", None)), config.from_dict(TuneConfig, values.pop("tune", None), where="tune")
    given = frozenset(dotted_names(values))
    prepared = Prepared.open(prepared_uri)
    settings = config.from_dict(TrainConfig, values)
    survey = survey_if_streamed(prepared, settings.scaling)
    base = with_data_defaults(settings, given, *Evidence(prepared, settings, survey).statistics)
    first = {name: value_of(base, name) for name in search}
    if sweep.scheduler == "pbt":
        check_mutable(search)
    points = _points(search, sweep, first, samples, seed)
    for point in points:  # all of them checked before the first one starts
        with_choice(base, point)
    count = samples if sweep.algorithm == "optuna" else len(points)
    plan = {"data": prepared.manifest["fingerprint"], "settings": config.to_dict(base), "search": search, "tune": config.to_dict(sweep)}
    _adopt(out, {**plan, "trials": count, "seed": seed})
    kept = [record for record in _kept(out) if record["error"] is None]  # a failed one gets another chance
    if kept:
        print(f"      going on: {len(kept)} of {count} trials are there", flush=True)
    if len(kept) < count:
        missing = [point for number, point in enumerate(points) if number not in {record["trial"] for record in kept}]
        work = storage.join(out, f"work-{secrets.token_hex(3)}")
        run_trials(
            prepared_uri,
            survey,
            base,
            search,
            first,
            missing,
            kept,
            settings=sweep,
            count=count - len(kept),
            seed=seed + len(kept) if sweep.algorithm == "optuna" else seed,
            work=work,
            keep=lambda record: storage.write_json(_record_path(out, record["trial"]), record),
        )
    for name in storage.list_dir(out):
        if name.startswith("work-"):
            storage.remove(storage.join(out, name))
    return _close(prepared_uri, out, base, search, sweep, _kept(out), compared)


def _points(search: dict[str, dict], sweep: TuneConfig, first: dict, samples: int, seed: int) -> list[dict]:
    """Settings of the trials that are known beforehand, the given ones first."""
    if sweep.algorithm == "grid":
        return [first, *(point for point in grid(search) if point != first)]
    if sweep.algorithm == "optuna":
        return [first]
    return [first, *draw(search, samples - 1, seed)]


def _adopt(out: str, plan: dict) -> None:
    path = storage.join(out, PLAN)
    if not storage.exists(path):
        storage.write_json(path, plan)
    elif (found := storage.read_json(path)) != plan:
        differing = ", ".join(name for name in plan if found.get(name) != plan[name])
        raise ConfigError(f"--out {out}: holds another sweep ({differing} differ); choose another folder or remove it")


def _record_path(out: str, number: int) -> str:
    return storage.join(out, TRIAL_FOLDER, f"trial-{number:04d}.json")


def _kept(out: str) -> list[dict]:
    folder = storage.join(out, TRIAL_FOLDER)
    return [storage.read_json(storage.join(folder, name)) for name in storage.list_dir(folder) if name.endswith(".json")]


def _close(
    prepared_uri: str,
    out: str,
    base: TrainConfig,
    search: dict,
    sweep: TuneConfig,
    trials: list[dict],
    compared: bool,
) -> Rows:
    finished = [trial for trial in trials if trial["best"] is not None]
    if not finished:
        raise RaysysError(f"no trial of {len(trials)} finished: {trials[0]['error'] if trials else 'none was started'}")
    best = max(finished, key=lambda trial: trial["best"])
    winner = with_choice(base, best["settings"])
    path = storage.join(out, BEST)
    storage.write_bytes(path, yaml.safe_dump(config.to_dict(winner), sort_keys=False).encode())
    report: dict[str, Any] = {"metric": "validation ndcg@10", "best": best["trial"], "search": search, "tune": config.to_dict(sweep)}
    report.update(importance=importance(finished, search), trials=trials)
    rows = _summary(trials, best, path)
    if compared:
        report["comparison"] = comparison = compare(prepared_uri, out, default=base, winner=winner)
        storage.write_json(storage.join(out, COMPARISON), comparison)
        low, high = comparison["difference_interval"]
        text = f"{comparison['winner']:.4f} against {comparison['default']:.4f}, difference {comparison['difference']:+.4f}"
        rows.insert(-1, (f"{comparison['split']} ndcg@10", f"{text} (95% interval {low:+.4f} to {high:+.4f}, paired)"))
    storage.write_json(storage.join(out, TRIALS), report)
    write_report(report, storage.join(out, REPORT))
    return rows


def _summary(trials: list[dict], best: dict, path: str) -> Rows:
    rows = []
    for trial in sorted(trials, key=lambda trial: -(trial["best"] or 0)):
        settings = ", ".join(f"{name.split('.')[-1]}={value}" for name, value in trial["settings"].items())
        note = trial["error"] or (f"stopped: {trial['stopped']}" if trial["stopped"] else "")
        figure = f"ndcg@10 {trial['best'] or 0:.4f}  {trial['epochs']:3d} epochs"
        rows.append((f"trial {trial['trial']}", f"{figure}  {settings}  {note}".rstrip()))
    return [*rows, ("best", f"trial {best['trial']}"), ("next", f"raysys train --config {path} --prepared DIR --out BUNDLE")]
