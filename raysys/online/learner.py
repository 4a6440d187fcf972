"""The continual learner: tail the event log, update, judge, publish, again and again.

A round starts at the current version and the log offset in its manifest. What
it learns and the offset it learnt through are published together, in one
bundle, so a crash at any point repeats the round or has finished it: every
event counts once. The registry refuses the publish when somebody else has moved
the pointer meanwhile; the next round then starts from there.

The driver reads the log and writes the bundle, because only it holds the key
that hides user ids. The models are updated in this process, or in a resident
actor when a cluster address is given (starting a Train run for each round would
take longer than the round).
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from raysys import cluster, storage
from raysys.bundle import Bundle, load_model
from raysys.errors import BundleError, ConfigError
from raysys.events.log import open_log
from raysys.online.config import OnlineConfig
from raysys.online.feed import Fresh, merged_histories, read_fresh
from raysys.online.growth import grown
from raysys.online.improve import Improvement, improve
from raysys.registry import Pointer, Registry

TASK = "learner"
"""Lock of the log that a learner holds while it runs: two would only undo each other's rounds."""
INTERVAL_S = 30.0
"""Seconds from the end of a round to the next, by default."""
CONSUMER = "online"
"""Name under which the log remembers the offset of the version in use, so that retention waits for the learner."""
Improve = Callable[[Bundle, Fresh, OnlineConfig, int], Improvement]


def run_online(
    registry: str,
    events: str,
    *,
    once: bool = False,
    interval_s: float = INTERVAL_S,
    config: OnlineConfig | None = None,
) -> dict:
    """Learn from the event log until interrupted.

    Args:
        registry: where versions come from and go to.
        events: location of the event log, whose lock makes sure that one learner reads it.
        once: one round, then return.
        interval_s: seconds from the end of a round to the next.
        config: settings; defaults when None.

    Returns:
        What the last round did: `status` ("published", "refused", "idle", "waiting", "pinned", "superseded", "no model"),
        `version`, and counts and figures of the round: `learning_s` of the update alone, `seconds` of the whole round,
        `oldest_event_s` from the acknowledgement of the oldest event learnt to the published version.

    Raises:
        StateError: another learner reads this log, or it cannot be read.
        ConfigError: the user key of this machine is not the one the bundle was written with.
    """
    learner = Learner(registry, events, config or OnlineConfig())
    with learner.log.exclusive(TASK), _improver() as learner.step:
        while True:
            report = learner.round()
            if report["status"] not in ("idle", "waiting"):
                print(f"      {_line(report)}", flush=True)
            if once:
                return report
            time.sleep(interval_s)


class Learner:
    """Rounds of learning; see the module.

    Args:
        registry: URI.
        events: URI of the log.
        config: settings.
        step: `improve`, or the same elsewhere.
    """

    def __init__(self, registry: str, events: str, config: OnlineConfig, step: Improve = improve):
        self.registry, self.config, self.step = Registry(registry), config, step
        self.log = open_log(events)
        self._bundle: Bundle | None = None
        # Records after the published offset that hold nothing to learn; without this each round would read them again.
        self._empty_until: tuple[str, str] | None = None
        # New items among those records: they get their rows with the next events. A new process reads them again.
        self._pending: dict[str, dict[str, Any]] = {}
        self._refused_at: tuple[str, str] | None = None

    def round(self) -> dict[str, Any]:
        """One round; see `run_online` for what it returns."""
        started = time.monotonic()
        pointer = self.registry.current()
        if pointer is None:
            return {"status": "no model", "version": None}
        report: dict[str, Any] = {"status": "pinned", "version": pointer.version, "events": 0}
        if pointer.pinned:
            return report
        bundle = self._open(pointer.version)
        after = bundle.manifest.get("log_offset")
        if after is not None and self.log.committed(CONSUMER) != after:
            self.log.commit(CONSUMER, after)
        pending: dict[str, dict[str, Any]] = {}
        if self._empty_until is not None and self._empty_until[0] == pointer.version:
            after, pending = self._empty_until[1], self._pending
        fresh = read_fresh(self.log, bundle, after, max_events=self.config.max_events, pending=pending)
        report |= {"events": fresh.num_events, "records": fresh.num_records, "skipped": fresh.num_skipped}
        if fresh.num_events == 0 and not fresh.erased & set(bundle.histories.table["user_key"].to_pylist()):
            self._empty_until, self._pending = (pointer.version, fresh.offset), fresh.new_items
            return report | {"status": "idle"}
        if fresh.num_events < self.config.min_events and not fresh.erased or self._refused_at == (pointer.version, fresh.offset):
            return report | {"status": "waiting"}
        bundle = grown(bundle, fresh.new_items)
        result = Improvement({}, bundle.fusion, True, "", {"events": 0})
        if fresh.num_events:
            result = self.step(bundle, fresh, self.config, pointer.sequence)
        report |= {"figures": result.figures, "learning_s": round(time.monotonic() - started, 2)}
        if not result.passed:
            self._refused_at = (pointer.version, fresh.offset)
            return report | {"status": "refused", "reason": result.reason}
        report |= self._publish(bundle, fresh, result, pointer)
        if report["status"] == "published" and fresh.oldest is not None:
            report["oldest_event_s"] = round(max(0.0, time.time() - fresh.oldest), 2)
        return report | {"seconds": round(time.monotonic() - started, 2)}

    def _open(self, version: str) -> Bundle:
        if self._bundle is None or self._bundle.version != version:
            self._bundle = Bundle.open(self.registry.bundle_uri(version))
            if problem := self._bundle.key_problem:
                raise ConfigError(problem)
        return self._bundle

    def _publish(self, bundle: Bundle, fresh: Fresh, result: Improvement, pointer: Pointer) -> dict[str, Any]:
        kept = {name: model for name, model in bundle.models.items() if name not in result.dropped}
        models = {**kept, **{name: load_model(name, arrays, meta) for name, (arrays, meta) in result.models.items()}}
        new_items = fresh.sequences.items[fresh.arrival >= 0]
        counts = bundle.items["num_train"].to_numpy() + np.bincount(new_items, minlength=bundle.items.num_rows)
        column = bundle.items.schema.get_field_index("num_train")
        items = bundle.items.set_column(column, "num_train", [counts])
        updated = Bundle(items, models, result.fusion, merged_histories(bundle.histories, fresh))
        lineage = bundle.manifest.get("lineage") or {"trained": bundle.version, "rounds": 0, "events": 0}
        newest = int(fresh.sequences.times[fresh.arrival >= 0].max(initial=0))
        manifest = {
            **bundle.told,
            "watermark": max(bundle.manifest.get("watermark") or 0, newest),
            "metrics": {**(bundle.manifest.get("metrics") or {}), "online": result.figures},
            "log_offset": fresh.offset,
            "new_items": len(fresh.new_items),
            "lineage": {
                "trained": lineage["trained"],
                "parent": bundle.version,
                "rounds": lineage["rounds"] + 1,
                "events": lineage["events"] + fresh.num_events,
            },
        }
        with tempfile.TemporaryDirectory(prefix="raysys-online-") as folder:
            updated.write(storage.join(folder, "bundle"), manifest=manifest)
            try:
                self.registry.publish(storage.join(folder, "bundle"), expected_sequence=pointer.sequence)
            except BundleError as error:
                if self.registry.current() == pointer:
                    raise
                return {"status": "superseded", "reason": str(error)}
        self._bundle = updated
        return {"status": "published", "version": updated.version}


@contextlib.contextmanager
def _improver() -> Iterator[Improve]:
    """The step here, or in a resident actor of the cluster whose address is given."""
    if not os.environ.get("RAY_ADDRESS"):
        yield improve
        return
    with cluster.connected():
        import ray

        # No CPU is reserved: a serving cluster may have none left, and a learner that waits for one learns nothing.
        resident: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=3)(_Improver)
        actor = resident.remote()
        try:
            yield lambda *arguments: ray.get(actor.improve.remote(*arguments))
        finally:
            ray.kill(actor)


class _Improver:
    """`improve` as a resident actor: torch is imported once, not in every round."""

    def improve(self, bundle: Bundle, fresh: Fresh, config: OnlineConfig, seed: int) -> Improvement:
        return improve(bundle, fresh, config, seed)


def _line(report: dict) -> str:
    text = f"{report['status']}: version {report['version']}"
    if report.get("events"):
        text += f", {report['events']:,} events"
    if report["status"] == "published" and "prequential" in report["figures"]:
        text += f", predicted before learning: NDCG@10 {report['figures']['prequential'].get('ndcg@10', 0.0):.4f}"
    if report.get("reason"):
        text += f" ({report['reason']})"
    return text
