"""The app builder that `serve run serve_config.yaml` imports; the only place where deployments are bound.

This module must not postpone the evaluation of annotations: Serve would then
hand over the raw arguments instead of `AppArgs`, and a misspelt key would pass.
"""

import logging
import os
from typing import Literal

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray.serve import Application, Deployment

from raysys import storage
from raysys.errors import ConfigError
from raysys.events.dead_letters import dead_letter_folder
from raysys.events.state import StateLimits
from raysys.pools.config import PoolConfig
from raysys.serve import deployments
from raysys.serve.catalogue import CatalogueBounds
from raysys.serve.models import Compute
from raysys.serve.rate import Rate
from raysys.serve.request import MAX_DEADLINE_MS, Budget
from raysys.serve.settings import FAST_SETTINGS

LOCAL_NODE = {"resources": {"node:__internal_head__": 0.001}}
"""Keeps the processes that open the embedded store on one node."""


class AppArgs(BaseModel):
    """`args:` of serve_config.yaml."""

    model_config = ConfigDict(extra="forbid")

    registry: str | None = Field(None, description="URI of published bundles; default RAYSYS_REGISTRY, else a folder under RAYSYS_HOME")
    events: str | None = Field(None, description="event log; default RAYSYS_EVENTS, else a folder under RAYSYS_HOME")
    state: str | None = Field(None, description="online state; default RAYSYS_STATE, else a folder under RAYSYS_HOME")
    placement: Literal["together", "apart"] = Field(
        "together", description="models in the ingress replicas, without a hop; or in deployments of their own, on other nodes or GPUs"
    )
    device: Literal["cpu", "cuda", "auto"] = Field(
        "cpu", description="where models compute; auto: on the GPU that num_gpus gave to those that do, else on the CPU"
    )
    threads: int = Field(1, ge=1, description="torch threads of each replica that computes")
    cached_histories: int = Field(20_000, ge=0, description="histories whose encoded vectors a node keeps; about 300 bytes each")
    pools_from: int = Field(
        50_000, ge=0, description="items from which retrieval looks at the best of each source, by an index, instead of all; 0: never"
    )
    pool_size: int = Field(500, ge=1, description="items that each source then puts into the pool of a request")
    max_in_flight: int = Field(150, ge=1, description="requests an ingress replica works on at once; more get 503 and Retry-After")
    deadline_ms: int = Field(
        3000, ge=1, le=MAX_DEADLINE_MS, description="an answer is due so long after its request, where X-Deadline-Ms says nothing"
    )
    retrieval_ms: int = Field(2000, ge=1, description="retrieval is waited for so long; later, co-visitation and popularity answer")
    ranking_ms: int = Field(1000, ge=1, description="ranking is waited for so long; later, the answer keeps retrieval's order")
    rate_limit: float = Field(0.0, ge=0, description="requests a second of one client and ingress replica; more get 429; 0 for no limit")
    rate_clients: int = Field(10_000, ge=1, description="clients whose rate a replica remembers; the quietest are forgotten")
    rate_burst: int = Field(20, ge=1, description="requests of one client at once after a quiet time, where there is a rate limit")
    followers: int = Field(
        20, ge=0, le=500, description="co-visited items kept an item in the ingress, for answers without retrieval; 0 for none"
    )
    history_events: int = Field(500, ge=1, le=10_000, description="events kept a user in the online state")
    seen_items: int = Field(10_000, ge=1, description="items kept a user as seen there; those of longest ago are forgotten")
    session_days: float = Field(30.0, gt=0, description="days that a session without events is kept there")
    event_id_days: float = Field(7.0, gt=0, description="days that an event_id is known there, to tell a repeated event")
    live_items: int = Field(20_000, ge=1, description="items unknown to the model that an ingress replica keeps, and as many deleted ones")
    filter_masks_mb: int = Field(
        64, ge=1, description="memory of a replica for masks of filters, a byte an item each; the last asked for stay"
    )
    pseudonyms: bool = Field(False, description="write keyed hashes instead of user and session ids to the event log")
    dead_letters: str | None = Field(None, description="folder of refused records; default beside a local log, else under RAYSYS_HOME")


def build(args: AppArgs) -> Application:
    """What `import_path` of serve_config.yaml names.

    Raises:
        ConfigError: a relative location.
    """
    return assemble(args, *(_deployment(name) for name in ("Ingress", "Retrieval", "Ranking", "Ingestion")))


def assemble(args: AppArgs, ingress: Deployment, retrieval: Deployment, ranking: Deployment, ingestion: Deployment) -> Application:
    """Bind the deployments to each other, retrieval and ranking only where they are apart; see `build`."""
    registry, events, state = (_location(name, getattr(args, name)) for name in ("registry", "events", "state"))
    missing = [name for name, value in FAST_SETTINGS.items() if os.environ.get(name) != value]
    if missing:
        logging.getLogger("ray.serve").warning(
            "started without %s; `raysys serve` sets them and is several times faster", ", ".join(missing)
        )
    on_node = LOCAL_NODE if storage.is_local(state) or storage.is_local(events) else {}
    if on_node and len([node for node in ray.nodes() if node["Alive"]]) > 1 and not storage.is_local(registry):
        logging.getLogger("ray.serve").warning("log and state are embedded: ingress and ingestion stay on the head node")
    pools = PoolConfig(items_from=args.pools_from, size=args.pool_size)
    compute = Compute(args.threads, args.device, args.cached_histories, pools)
    stages = tuple(stage.bind(registry, compute) for stage in (retrieval, ranking)) if args.placement == "apart" else None
    refused = dead_letter_folder(events, args.dead_letters and _location("dead_letters", args.dead_letters))
    limits = StateLimits(args.history_events, args.seen_items, args.session_days * 86_400, args.event_id_days * 86_400)
    writer = ingestion.options(ray_actor_options=_actor(on_node)).bind(events, state, limits, args.pseudonyms, refused)
    return ingress.options(ray_actor_options=_actor(on_node)).bind(
        registry,
        state,
        stages,
        writer,
        compute=compute,
        max_in_flight=args.max_in_flight,
        rate=Rate(args.rate_limit, args.rate_burst, args.rate_clients),
        budget=Budget(args.deadline_ms / 1000, args.retrieval_ms / 1000, args.ranking_ms / 1000),
        followers=args.followers,
        bounds=CatalogueBounds(args.live_items, args.filter_masks_mb << 20),
    )


def _deployment(name: str) -> Deployment:
    return getattr(deployments, name)  # `@serve.deployment` is typed as if it returned the class


def _actor(on_node: dict) -> dict:
    # Small shares of a CPU: a laptop with two cores must place all replicas; the kernel shares the time.
    # None where the node is fixed: the head of a larger cluster often offers Ray no CPUs, to keep tasks away.
    return {"num_cpus": 0 if on_node else 0.1, **on_node}


def _location(name: str, value: str | None) -> str:
    value = value or os.environ.get(f"RAYSYS_{name.upper()}") or str(storage.home() / name)
    if "://" not in value and not os.path.isabs(value):
        raise ConfigError(
            f"args.{name}: expected an absolute path or a URI, got {value!r}; a relative path means something else on every node"
        )
    return value
