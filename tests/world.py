"""The HTTP API over real models, log and state in this process, as Serve's deployments put it together."""

import asyncio

import numpy as np
from fastapi.testclient import TestClient

from raysys.bundle import Bundle
from raysys.events.dead_letters import DeadLetters
from raysys.events.log import open_log
from raysys.events.state import StateLimits, open_state
from raysys.events.store import EventStore
from raysys.pipeline import Pipeline
from raysys.queries import Queries
from raysys.serve.catalogue import Catalogue, live_encoder
from raysys.serve.http import create_app
from raysys.serve.recommender import Recommender, RetrievedOne, Version, pad_candidates
from raysys.serve.request import Budget

NOW = 1_700_200_000.0


class LocalBackend:
    """The models in this process."""

    def __init__(self, bundle: Bundle):
        self.pipeline = Pipeline(bundle)
        self.fail: set[str] = set()
        self.slow_s = 0.0

    async def retrieve(self, version, query: Queries, k, allowed, blocked, closest=0) -> RetrievedOne:
        if "retrieval" in self.fail:
            raise RuntimeError("planted failure")
        mask = np.ones((1, self.pipeline.num_items), bool) if allowed is None else allowed[None].copy()
        mask[0, blocked] = False
        found = self.pipeline.retrieve(query, k, allowed=mask, closest=closest)
        count = int((found.candidates.items[0] >= 0).sum())
        part = found.candidates
        profile, affinity = (None, None) if found.profiles is None else (found.profiles[0], found.affinity[0])
        return RetrievedOne(part.items[0, :count], part.fused[0, :count], part.log_probs[0, :count], part.sources, profile, affinity)

    async def rank(self, version, query: Queries, retrieved: RetrievedOne):
        if "ranking" in self.fail:
            raise RuntimeError("planted failure")
        await asyncio.sleep(self.slow_s)
        scores, probabilities = self.pipeline.rank(query, pad_candidates([retrieved]))
        return scores[0], probabilities[0]

    async def explain(self, version, query: Queries, items):
        return [(reason.kind, reason.because) for reason in self.pipeline.explain(query, items)]


class LocalWriter:
    def __init__(self, store: EventStore, dead_letters: DeadLetters):
        self.store, self.dead_letters = store, dead_letters

    async def write(self, records):
        return await asyncio.wrap_future(self.store.submit(records))

    async def reject(self, entries):
        self.dead_letters.write(entries)

    async def held(self, user_id):
        return self.store.records_of(user_id)

    def post(self, records):
        self.store.submit(records)


class World:
    """A service under a folder; `now` is its clock, `store` its log and state."""

    def __init__(self, folder, bundle_uri: str | None, *, place=None, pseudonyms: bool = False, limits: StateLimits | None = None):
        self.folder, self.now = folder, NOW
        place = place or (lambda name: str(folder / name))
        log, state = open_log(place("events"), writable=True), open_state(place("state"), limits)
        self.store = EventStore(log, state, pseudonyms=pseudonyms)
        bundle = Bundle.open(bundle_uri) if bundle_uri else None
        self.backend = LocalBackend(bundle) if bundle else None
        self.recommender = Recommender(self.store.state, self.backend, clock=lambda: self.now, budget=Budget(ranking_s=0.3))
        if bundle:
            self.recommender.version = Version.of(bundle, Catalogue(bundle.items, live_encoder(bundle)))
        writer = LocalWriter(self.store, DeadLetters(str(folder / "events")))
        not_ready = lambda: None if bundle else "no model published; run raysys publish"  # noqa: E731
        self.app = create_app(self.recommender, writer, models=list, not_ready=not_ready, clock=lambda: self.now)
        self.client = TestClient(self.app, raise_server_exceptions=False)

    def ask(self, **body) -> dict:
        answer = self.client.post("/v1/recommend", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ids(self, **body) -> list[str]:
        return [item["item_id"] for item in self.ask(**body)["items"]]
