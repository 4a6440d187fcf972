"""A peer without Ray: the same HTTP and pipeline code in one process of FastAPI and uvicorn."""

import asyncio
import sys

import uvicorn

from raysys.events.log import Record, open_log
from raysys.events.state import StateLimits, open_state
from raysys.events.store import EventStore
from raysys.serve.catalogue import Catalogue, live_encoder
from raysys.serve.http import create_app
from raysys.serve.metrics import Metrics
from raysys.serve.models import Compute, Models, warm_up
from raysys.serve.recommender import Recommender, Version
from raysys.serve.together import TogetherBackend


class Writer:
    """`telling.Writer` in this process."""

    def __init__(self, store: EventStore):
        self._store = store

    async def write(self, records: list[Record]) -> list[bool]:
        return await asyncio.wrap_future(self._store.submit(records))

    async def reject(self, entries: list[dict]) -> None: ...

    async def held(self, user_id: str) -> list[Record]:
        return self._store.records_of(user_id)

    def post(self, records: list[Record]) -> None:
        self._store.submit(records)


def main(registry: str, events: str, state: str, port: int) -> None:
    models = Models(registry, Compute(), Metrics())
    pipeline = models.load_current()
    assert pipeline is not None, "publish a bundle first"
    warm_up(pipeline)
    store = EventStore(open_log(events, writable=True), open_state(state, StateLimits()))
    recommender = Recommender(store.state, TogetherBackend(models))
    recommender.version = Version.of(pipeline.bundle, Catalogue(pipeline.bundle.items, live_encoder(pipeline.bundle)))
    app = create_app(recommender, Writer(store), models=models.registry.versions, not_ready=lambda: None)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
