"""The command line: `raysys NAME ...`, and the same verbs for `jobs/NAME.py`.

Only arguments and closing tables live here; every command calls one function of
the package. A user's mistake prints one line and exits with 2.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence

import raysys
from raysys import cluster, config, storage
from raysys.errors import ConfigError, RaysysError

Rows = list[tuple[str, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0 only on success."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        rows = arguments.run(arguments)
    except RaysysError as error:
        print(f"raysys {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"raysys {arguments.command}: interrupted", file=sys.stderr)
        return 130
    if rows:
        print_table(rows)
    return 0


def _terminated(*_: object) -> None:
    """Leave by an exception, so that whatever the command started is stopped on the way out."""
    # Once only: `timeout` and many supervisors signal the process and then its group, and a second exception would end the cleaning up.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    parser = argparse.ArgumentParser(prog="raysys", description=raysys.__doc__)
    parser.add_argument("--version", action="version", version=f"raysys {raysys.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(run=run)
        return command

    command = add("demo", _demo, "the whole road on MovieLens-100k, from raw events to an answer that changes")
    command.add_argument("--data", help="folder with MovieLens-100k (RecBole or GroupLens files); downloaded when absent")
    command.add_argument("--dir", default="runs/demo", help="folder for everything the demo writes (default: runs/demo)")
    command.add_argument("--port", type=int, default=8000, help="HTTP port (default: 8000)")
    command.add_argument("--keep-serving", action="store_true", help="keep the service running at the end, until Ctrl-C")

    command = add("import", _import, "read a known source into the data contract")
    command.add_argument("kind", choices=["movielens", "recbole", "sequences", "amazon-reviews", "synthetic"])
    command.add_argument("src", nargs="?", help="file or folder (not for synthetic)")
    command.add_argument("--out", required=True)
    command.add_argument("--users", type=int, default=1000, help="synthetic: number of users")
    command.add_argument("--items", type=int, default=500, help="synthetic: number of items")
    command.add_argument("--events", type=int, default=50_000, help="synthetic: number of events")
    command.add_argument("--seed", type=int, default=0, help="synthetic: random seed")
    command.add_argument("--files", type=int, default=0, help="synthetic: spread the events over so many files by time (default: by user)")
    command.add_argument("--heavy-user", type=float, default=0.0, help="synthetic: one more user with this share of all events")
    command.add_argument("--flip", type=float, default=0.0, help="synthetic: share of the time after which tastes follow another law")

    command = add("prepare", _prepare, "validate, deduplicate, split and encode a data set into user sequences")
    command.add_argument("--data", required=True)
    command.add_argument("--out", required=True)
    command.add_argument("--split", choices=["leave-one-out", "time", "none"], default=None, help="default: leave-one-out")
    command.add_argument("--strict", action="store_true", help="make any bad row an error")
    command.add_argument("--append", action="store_true", help="DATA holds new events only; add them to the prepared set at OUT")
    _add_config(command)

    command = add("train", _train, "train every model of the pipeline into a bundle")
    _add_prepared(command)
    command.add_argument("--out", required=True, metavar="BUNDLE")
    command.add_argument("--fit", choices=["train", "train+valid"], default="train", help="part to fit on (default: train)")
    command.add_argument("--seed", type=int, default=None)
    command.add_argument("--time-budget", default=None, metavar="30m", help="stop in time and keep the best validation state")
    _add_config(command)

    command = add("tune", _tune, "search settings with Ray Tune: ASHA or PBT, random, grid or Optuna")
    _add_prepared(command)
    command.add_argument("--out", required=True)
    command.add_argument("--samples", type=int, default=8, help="trials, the given settings among them (default: 8)")
    command.add_argument("--compare", action="store_true", help="train winner and given settings whole, and compare them on the test part")
    command.add_argument("--seed", type=int, default=0)
    _add_config(command)

    command = add("evaluate", _evaluate, "full-catalogue metrics of a bundle, per stage")
    _add_prepared(command)
    command.add_argument("--model", required=True, metavar="BUNDLE")
    command.add_argument("--split", choices=["test", "valid"], default="test")
    command.add_argument("--no-mask", action="store_true", help="leave items the user has already seen in the ranking")
    command.add_argument("--out", help="write the metrics as JSON")
    command.add_argument("--report", help="write an HTML report")
    command.add_argument("--max-users", type=int, default=None, help="evaluate a random sample of targets")
    command.add_argument("--seed", type=int, default=0)

    command = add("publish", _publish, "make a bundle the current version of a registry")
    command.add_argument("bundle")
    command.add_argument("--registry", default=None)
    command.add_argument("--unpin", action="store_true", help="end the pin that a rollback left")

    command = add("rollback", _rollback, "return to an earlier version and pin it")
    command.add_argument("--registry", default=None)
    command.add_argument("--to", default=None, metavar="VERSION")

    command = add("models", _models, "list the versions of a registry")
    command.add_argument("--registry", default=None)

    command = add("serve", _serve, "serve over HTTP with the fast Serve settings")
    command.add_argument("--config", default="serve_config.yaml")
    command.add_argument("--host", default=None)
    command.add_argument("--port", type=int, default=None)
    command.add_argument("--registry", default=None)
    command.add_argument("--events", default=None)
    command.add_argument("--state", default=None)
    command.add_argument("--insecure", action="store_true", help="allow another host than 127.0.0.1 without an API key")

    command = add("online", _online, "learn from the event log and publish better versions")
    command.add_argument("--registry", default=None)
    command.add_argument("--events", default=None)
    command.add_argument("--state", default=None, help="not read: a learner needs registry and log; accepted beside them as `serve` has it")
    command.add_argument("--once", action="store_true", help="one round, then exit")
    command.add_argument("--interval", type=float, default=30.0, help="seconds between rounds (default: 30)")
    _add_config(command)

    command = add("simulate", _simulate, "replay the end of a data set through the service, with the learner on and off")
    command.add_argument("--data", required=True, metavar="DIR", help="a data folder, such as `raysys import` writes")
    command.add_argument("--out", required=True, metavar="DIR", help="folder of replay.json, replay.png and what was trained")
    command.add_argument("--url", default=None, help="a running service that knows the start of the data; else one is started, twice")
    command.add_argument(
        "--model", default=None, metavar="BUNDLE", help="start from this bundle instead of training on the start of the data"
    )
    _add_config(command)

    command = add("recommend", _recommend, "one answer without a server, by the same code")
    command.add_argument("--model", required=True, metavar="BUNDLE")
    command.add_argument("--user", required=True)
    command.add_argument("-k", type=int, default=10)

    command = add("recommend-all", _recommend_all, "the k best items of every user, to Parquet")
    _add_batch(command)
    command.add_argument("-k", type=int, default=100, help="items a user (default: 100)")
    command.add_argument(
        "--stage",
        choices=["final", "retrieval", "interest"],
        default="final",
        help="the lists that serving gives, in retrieval's order, or by the encoder's dot product alone",
    )

    command = add("export-embeddings", _export_embeddings, "user and item vectors of the interest encoder, to Parquet")
    _add_batch(command)

    command = add("compress", _compress, "a smaller and faster version of a bundle, within a stated loss")
    command.add_argument("bundle")
    command.add_argument("--prepared", required=True, metavar="DIR", help="what the bundle was trained on")
    command.add_argument("--out", required=True, metavar="BUNDLE")
    command.add_argument("--max-loss", default=None, metavar="1%", help="NDCG@10 that may be lost on the validation part (default: 1%%)")
    _add_config(command)

    command = add("pipeline", _pipeline, "prepare, train, evaluate and publish in one run")
    command.add_argument("--data", required=True)
    command.add_argument("--out", required=True, help="folder for the prepared set, the bundle and the metrics")
    command.add_argument("--prepare-config", default=None, metavar="FILE", help="YAML settings of prepare, such as event types")
    command.add_argument("--split", choices=["leave-one-out", "time", "none"], default="leave-one-out")
    command.add_argument("--registry", default=None, help="publish there when given")
    command.add_argument("--seed", type=int, default=None)
    command.add_argument("--time-budget", default=None, metavar="30m")
    _add_config(command)

    command = add("compact", _compact, "take over what is new in the event log into a data folder for prepare")
    command.add_argument("--events", default=None)
    command.add_argument("--out", required=True, metavar="LAKE", help="folder that grows with every call")
    command.add_argument("--delta", default=None, metavar="DIR", help="write each new batch to DIR/batch-N too, for prepare --append")
    command.add_argument("--max-age", default=None, metavar="30d", help="then drop segments of the log that are older")
    command.add_argument("--max-bytes", default=None, metavar="10G", help="then drop the oldest segments beyond this size")
    command.add_argument("--force", action="store_true", help="drop also what a named consumer has not read; it is counted")
    command.add_argument("--forget-consumer", default=None, metavar="NAME", help="no longer wait for this consumer of the log")
    command.add_argument(
        "--dead-letters", default=None, metavar="DIR", help="folder of refused records (default: where the service puts them)"
    )
    _add_config(command)

    command = add("resend", _resend, "send refused events again that were mended in their dead-letter file")
    command.add_argument("file", help="a dead-letter-*.jsonl; what is still refused stays in it")
    command.add_argument("--url", default="http://127.0.0.1:8000", help="of the service (default: http://127.0.0.1:8000)")

    command = add("plan", _plan, "how many nodes of which kind, hours, memory, network and replicas a size needs")
    for name in ("users", "items", "events"):
        command.add_argument(f"--{name}", required=True, metavar="N", help="a number such as 20k, 1.5M or 10B")
    command.add_argument(
        "--node", required=True, nargs="+", metavar="TYPE", help="node types that train, a plan for each, such as p5.48xlarge"
    )
    command.add_argument("--prepare-node", default="m6i.32xlarge", metavar="TYPE", help="node type that prepares and serves")
    command.add_argument("--nodes", default=None, metavar="FILE", help="YAML table of node types; the built-in one when absent")
    command.add_argument("--constants", default=None, metavar="FILE", help="constants written by benchmarks/scale/calibrate.py")
    command.add_argument("--out", default=None, metavar="FILE", help="write the plans as JSON, formulas and assumptions included")
    command.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    _add_config(command)

    command = add("bench", _bench, "run a benchmark of benchmarks/")
    command.add_argument("name", nargs="?", help="name of a benchmark; the list when absent")
    command.add_argument("rest", nargs=argparse.REMAINDER)
    return parser


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", default=None, metavar="FILE", help="YAML settings")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="one setting; may be repeated")


def _add_batch(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, metavar="BUNDLE")
    command.add_argument("--out", required=True, help="folder of the result; a run that was stopped goes on there")
    command.add_argument("--users", default=None, metavar="FILE", help="user ids: Parquet or CSV with user_id, or text, one a line")
    command.add_argument("--prepared", default=None, metavar="DIR", help="all users of a prepared set, with their whole histories")
    _add_config(command)


def _add_prepared(command: argparse.ArgumentParser) -> None:
    command.add_argument("--prepared", required=True, metavar="DIR")


def _demo(arguments: argparse.Namespace) -> Rows:
    from raysys.demo import run_demo

    return run_demo(arguments.data, os.path.abspath(arguments.dir), port=arguments.port, keep_serving=arguments.keep_serving)


def _import(arguments: argparse.Namespace) -> Rows:
    from raysys.adapters import import_dataset

    if (arguments.kind == "synthetic") != (arguments.src is None):
        expected = "no SRC" if arguments.kind == "synthetic" else "SRC, a file or folder"
        raise ConfigError(f"import {arguments.kind}: expected {expected}, got {arguments.src!r}")
    summary = import_dataset(
        arguments.kind,
        cluster.location(arguments.src, "SRC") if arguments.src else None,
        cluster.location(arguments.out, "--out"),
        users=arguments.users,
        items=arguments.items,
        events=arguments.events,
        seed=arguments.seed,
        files=arguments.files,
        heavy_user=arguments.heavy_user,
        flip=arguments.flip,
    )
    return [(str(key), _short(value)) for key, value in summary.items()]


def _prepare(arguments: argparse.Namespace) -> Rows:
    from raysys.prepare.config import PrepareConfig
    from raysys.prepare.run import prepare, summary_rows

    given = bool(arguments.config or arguments.overrides)
    settings = config.load(PrepareConfig, arguments.config, arguments.overrides) if given or not arguments.append else None
    data, out = cluster.location(arguments.data, "--data"), cluster.location(arguments.out, "--out")
    with cluster.connected():
        manifest = prepare(data, out, split=arguments.split, config=settings, strict=arguments.strict, append=arguments.append)
    return [*summary_rows(manifest), ("next", f"raysys train --prepared {arguments.out} --out BUNDLE")]


def _train(arguments: argparse.Namespace) -> Rows:
    from raysys.train.config import load_train_config
    from raysys.train.run import summary_rows, train

    settings, given = load_train_config(arguments.config, arguments.overrides)
    prepared, out = cluster.location(arguments.prepared, "--prepared"), cluster.location(arguments.out, "--out")
    budget = parse_seconds(arguments.time_budget)
    with cluster.connected():
        manifest = train(prepared, out, settings, given=given, fit=arguments.fit, seed=arguments.seed, time_budget_s=budget)
    return [*summary_rows(manifest), ("next", f"raysys evaluate --prepared {arguments.prepared} --model {arguments.out}")]


def _tune(arguments: argparse.Namespace) -> Rows:
    from raysys.tune.run import tune

    prepared, out = cluster.location(arguments.prepared, "--prepared"), cluster.location(arguments.out, "--out")
    with cluster.connected():
        return tune(
            prepared,
            out,
            config_uri=arguments.config,
            overrides=arguments.overrides,
            samples=arguments.samples,
            seed=arguments.seed,
            compared=arguments.compare,
        )


def _evaluate(arguments: argparse.Namespace) -> Rows:
    from raysys.evaluate.report import write_report
    from raysys.evaluate.run import evaluate, summary_rows

    metrics = evaluate(
        cluster.location(arguments.prepared, "--prepared"),
        cluster.location(arguments.model, "--model"),
        split=arguments.split,
        mask=not arguments.no_mask,
        max_users=arguments.max_users,
        seed=arguments.seed,
    )
    if arguments.out:
        storage.write_json(cluster.location(arguments.out, "--out"), metrics)
    if arguments.report:
        write_report(metrics, cluster.location(arguments.report, "--report"))
    return summary_rows(metrics)


def _publish(arguments: argparse.Namespace) -> Rows:
    from raysys.registry import Registry

    registry = default_location(arguments.registry, "registry")
    pointer = Registry(registry).publish(cluster.location(arguments.bundle, "BUNDLE"), unpin=arguments.unpin)
    return [("registry", registry), ("current", pointer.version), ("next", f"raysys serve --registry {registry}")]


def _rollback(arguments: argparse.Namespace) -> Rows:
    from raysys.registry import Registry

    registry = default_location(arguments.registry, "registry")
    pointer = Registry(registry).rollback(arguments.to)
    return [("registry", registry), ("current", f"{pointer.version} (pinned; `raysys publish BUNDLE --unpin` ends the pin)")]


def _models(arguments: argparse.Namespace) -> Rows:
    from raysys.registry import Registry

    registry = default_location(arguments.registry, "registry")
    versions = Registry(registry).versions()
    marks = {version["version"]: " ".join(mark for mark in ("current", "pinned") if version.get(mark)) for version in versions}
    rows = [(v["version"], f"published {v.get('published')}  {_validation(v)}  {marks[v['version']]}".rstrip()) for v in versions]
    return rows or [("registry", f"{registry} has no published model; run `raysys publish BUNDLE --registry {registry}`")]


def _validation(version: dict) -> str:
    figures = (version.get("metrics") or {}).get("validation") or {}
    figure = figures.get("final", figures.get("fused"))
    text = "" if figure is None else f"valid ndcg@10 {figure:.4f}"
    gate = ((version.get("metrics") or {}).get("online") or {}).get("gate") or {}
    passed = [
        f"{name} {one['serving']['ndcg@10']:.4f} -> {one['updated']['ndcg@10']:.4f}"
        for name, one in gate.items()
        if "ndcg@10" in one["updated"]
    ]
    return f"{text}  gate: {', '.join(passed)}" if passed else text


def _serve(arguments: argparse.Namespace) -> Rows:
    from raysys.serve.launch import launch

    launch(
        arguments.config,
        host=arguments.host,
        port=arguments.port,
        registry=arguments.registry and cluster.location(arguments.registry, "--registry"),
        events=arguments.events and cluster.location(arguments.events, "--events"),
        state=arguments.state and cluster.location(arguments.state, "--state"),
        insecure=arguments.insecure,
    )
    return []


def _online(arguments: argparse.Namespace) -> Rows:
    from raysys.online.learner import OnlineConfig, run_online

    report = run_online(
        default_location(arguments.registry, "registry"),
        default_location(arguments.events, "events"),
        once=arguments.once,
        interval_s=arguments.interval,
        config=config.load(OnlineConfig, arguments.config, arguments.overrides),
    )
    return [(str(key), _short(value)) for key, value in report.items() if not isinstance(value, dict)]


def _simulate(arguments: argparse.Namespace) -> Rows:
    from raysys.online.simulate import SimulateConfig, simulate, summary_rows

    result = simulate(
        cluster.location(arguments.data, "--data"),
        cluster.location(arguments.out, "--out"),
        config.load(SimulateConfig, arguments.config, arguments.overrides),
        url=arguments.url,
        model=arguments.model and cluster.location(arguments.model, "--model"),
    )
    return summary_rows(result)


def _recommend(arguments: argparse.Namespace) -> Rows:
    from raysys.bundle import Bundle
    from raysys.pipeline import recommend_user

    bundle = Bundle.open(cluster.location(arguments.model, "--model"))
    if arguments.k < 1:
        raise ConfigError(f"-k: expected at least 1, got {arguments.k}")
    if bundle.key_problem:
        print(f"warning: {bundle.key_problem}", file=sys.stderr)
    answer = recommend_user(bundle, arguments.user, arguments.k)
    titles = bundle.items["title"].to_pylist() if "title" in bundle.items.column_names else bundle.item_ids
    print(f"strategy {answer.strategy}, version {bundle.version}")
    rows = []
    for rank, (row, score, probability) in enumerate(zip(answer.items, answer.scores, answer.probabilities, strict=True), start=1):
        chance = "" if probability is None else f"  p={probability:.3f}"
        rows.append((f"{rank:3d}  {bundle.item_ids[row]}", f"{titles[row] or ''}  score={score:.3f}{chance}".strip()))
    return rows


def _recommend_all(arguments: argparse.Namespace) -> Rows:
    return _batch(arguments, stage=arguments.stage, k=arguments.k)


def _export_embeddings(arguments: argparse.Namespace) -> Rows:
    return _batch(arguments, stage="embeddings", k=1)


def _batch(arguments: argparse.Namespace, *, stage: str, k: int) -> Rows:
    from raysys.batch.config import BatchConfig
    from raysys.batch.run import run_batch, summary_rows

    settings = config.load(BatchConfig, arguments.config, arguments.overrides)
    model, out = cluster.location(arguments.model, "--model"), cluster.location(arguments.out, "--out")
    users = cluster.location(arguments.users, "--users") if arguments.users else None
    prepared = cluster.location(arguments.prepared, "--prepared") if arguments.prepared else None
    with cluster.connected():
        manifest = run_batch(model, out, stage=stage, k=k, users_uri=users, prepared_uri=prepared, settings=settings)
    return [*summary_rows(manifest), ("out", out)]


def _compress(arguments: argparse.Namespace) -> Rows:
    from raysys.compress.config import CompressConfig
    from raysys.compress.run import compress, summary_rows

    overrides = list(arguments.overrides)
    if arguments.max_loss is not None:
        overrides.append(f"max_loss={_share(arguments.max_loss, '--max-loss')}")
    settings = config.load(CompressConfig, arguments.config, overrides)
    bundle, prepared = cluster.location(arguments.bundle, "bundle"), cluster.location(arguments.prepared, "--prepared")
    out = cluster.location(arguments.out, "--out")
    report = compress(bundle, prepared, out, settings, say=lambda text: print(f"      {text}", file=sys.stderr, flush=True))
    return [*summary_rows(report), ("out", out)]


def _share(text: str, flag: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ConfigError(f"{flag}: expected a share such as 1% or 0.01, got {text!r}")
    return value


def _pipeline(arguments: argparse.Namespace) -> Rows:
    from raysys.evaluate.report import write_report
    from raysys.evaluate.run import evaluate, summary_rows
    from raysys.prepare.config import PrepareConfig
    from raysys.prepare.run import prepare
    from raysys.registry import Registry
    from raysys.train.config import load_train_config
    from raysys.train.run import train

    settings, given = load_train_config(arguments.config, arguments.overrides)
    prepare_settings = config.load(PrepareConfig, arguments.prepare_config)
    data, out = cluster.location(arguments.data, "--data"), cluster.location(arguments.out, "--out")
    prepared, bundle = storage.join(out, "prepared"), storage.join(out, "bundle")
    budget = parse_seconds(arguments.time_budget)
    with cluster.connected():
        prepare(data, prepared, split=arguments.split, config=prepare_settings)
        train(prepared, bundle, settings, given=given, seed=arguments.seed, time_budget_s=budget)
    rows: Rows = []
    if arguments.split != "none":
        metrics = evaluate(prepared, bundle, split="test")
        storage.write_json(storage.join(out, "metrics.json"), metrics)
        write_report(metrics, storage.join(out, "report.html"))
        rows = summary_rows(metrics)
    if arguments.registry:
        registry = cluster.location(arguments.registry, "--registry")
        pointer = Registry(registry).publish(bundle)
        rows.append(("published", f"{pointer.version} in {registry}"))
    return [*rows, ("bundle", bundle)]


def _compact(arguments: argparse.Namespace) -> Rows:
    from raysys.events.log import open_log
    from raysys.events.retention import Retention
    from raysys.lake.compact import CompactConfig, compact

    events, lake = default_location(arguments.events, "events"), cluster.location(arguments.out, "--out")
    if arguments.forget_consumer:
        open_log(events).remove_consumer(arguments.forget_consumer)
    report = compact(
        events,
        lake,
        config=config.load(CompactConfig, arguments.config, arguments.overrides),
        retention=Retention(parse_seconds(arguments.max_age, "--max-age"), parse_bytes(arguments.max_bytes), arguments.force),
        delta=arguments.delta and cluster.location(arguments.delta, "--delta"),
        dead_letters=arguments.dead_letters and cluster.location(arguments.dead_letters, "--dead-letters"),
    )
    return [*((str(key), _short(value)) for key, value in report.items()), ("lake", lake)]


def _resend(arguments: argparse.Namespace) -> Rows:
    from raysys.serve.resend import resend

    report = resend(cluster.location(arguments.file, "FILE"), arguments.url)
    return [(name, str(count)) for name, count in report.items()]


def _plan(arguments: argparse.Namespace) -> Rows:
    from raysys.plan import planner
    from raysys.plan.workload import CONSTANTS, NODES, Workload, load_constants, load_nodes, node_type, parse_count

    sizes = [f"{name}={parse_count(getattr(arguments, name))}" for name in ("users", "items", "events")]
    work = config.load(Workload, arguments.config, [*sizes, *arguments.overrides])
    table = load_nodes(arguments.nodes or NODES)
    constants = load_constants(arguments.constants or CONSTANTS)
    cpu_node = node_type(table, arguments.prepare_node)
    plans = {name: planner.plan(work, node_type(table, name), cpu_node, constants) for name in arguments.node}
    if arguments.out:
        storage.write_json(cluster.location(arguments.out, "--out"), plans)
    if arguments.markdown:
        print(planner.markdown(plans))
        return []
    rows = [row for name, plan in plans.items() for row in [("node", name), *planner.rows(plan)]]
    return [*rows, ("measured", f"{constants.date}, commit {constants.commit}, {constants.machine}")]


def _bench(arguments: argparse.Namespace) -> Rows:
    import runpy
    from pathlib import Path

    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    names = sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("[!_]*.py"))
    if arguments.name is None:
        return [(name, f"raysys bench {name}") for name in names]
    if arguments.name not in names:
        raise ConfigError(
            f"bench: expected one of {', '.join(names) or 'nothing (no benchmarks folder beside the package)'}, got {arguments.name!r}"
        )
    script = folder / f"{arguments.name}.py"
    sys.argv = [arguments.name, *arguments.rest]
    sys.path.insert(0, str(script.parent))  # as if it had been started itself
    runpy.run_path(str(script), run_name="__main__")
    return []


def default_location(value: str | None, what: str) -> str:
    """A registry, event log or state: the flag, else `RAYSYS_*`, else a folder under the home of raysys."""
    return cluster.location(value or os.environ.get(f"RAYSYS_{what.upper()}") or str(storage.home() / what), f"--{what}")


def parse_seconds(text: str | None, flag: str = "--time-budget") -> float | None:
    """Seconds from `90`, `90s`, `30m`, `2h` or `7d`.

    Raises:
        ConfigError: anything else, or nothing positive.
    """
    if text is None:
        return None
    number, unit = (text[:-1], text[-1]) if text[-1:] in "smhd" and text else (text, "s")
    try:
        seconds = float(number) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[unit]
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ConfigError(f"{flag}: expected a duration such as 90s, 30m or 2h, got {text!r}")
    return seconds


def parse_bytes(text: str | None) -> int | None:
    """Bytes from `1000`, `64K`, `10M`, `10G` or `1T`, powers of 1024.

    Raises:
        ConfigError: anything else.
    """
    if text is None:
        return None
    number, unit = (text[:-1], text[-1]) if text[-1:] in "KMGT" and text else (text, "")
    if not number.isdecimal():
        raise ConfigError(f"--max-bytes: expected a size such as 500M or 10G, got {text!r}")
    return int(number) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[unit]


def print_table(rows: Rows) -> None:
    """Two aligned columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}", flush=True)


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return json.dumps(value, default=str)[:200]
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
