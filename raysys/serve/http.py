"""The HTTP API as a FastAPI app over a `Recommender` and a writer. No Ray here, so it is tested without it.

The calls stand in asking.py and telling.py; what is refused before a body is read in
guard.py (keys.py, rate.py); bodies and errors in replies.py; the description in openapi.py.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse, Response

from raysys.serve.asking import asking
from raysys.serve.guard import Guard
from raysys.serve.ingest import ImpressionBuffer
from raysys.serve.keys import Keys
from raysys.serve.openapi import described_app
from raysys.serve.rate import Rate, RateLimit
from raysys.serve.recommender import Recommender
from raysys.serve.replies import JSON, error_response, install_error_replies
from raysys.serve.telling import Writer, telling_events, telling_items, telling_users

HOME_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>raysys</title>
<style>body{font:16px/1.5 system-ui;max-width:42em;margin:4em auto;padding:0 1em}</style>
<h1>raysys</h1><p>A real-time recommender. Ask <code>POST /v1/recommend</code>, tell <code>POST /v1/events</code>.</p>
<p><a href="/docs">The API</a> &middot; <a href="/v1/models">models</a> &middot; <a href="/health/ready">ready?</a></p></html>"""


def create_app(
    recommender: Recommender,
    writer: Writer,
    *,
    models: Callable[[], list[dict]],
    not_ready: Callable[[], str | None],
    started: Callable[[], Coroutine[Any, Any, None]] | None = None,
    clock: Callable[[], float] = time.time,
    api_key: str | None = None,
    max_in_flight: int = 150,
    rate: Rate | None = None,
) -> FastAPI:
    """All calls of the API.

    Args:
        recommender: answers.
        writer: takes events, items and users.
        models: versions for `GET /v1/models`; called in a thread, it may read files.
        not_ready: the reason why `/health/ready` says 503, None when ready.
        started: runs beside the first requests, on the loop that answers them.
        clock: UTC epoch seconds now.
        api_key: expected in `X-API-Key`; default from the environment (keys.py), no check without one.
        max_in_flight: requests worked on at once; more are answered with 503 and Retry-After.
        rate: what one client may do; more is answered with 429 and Retry-After. No limit when None.

    Raises:
        ConfigError: the file of keys cannot be read.
    """
    metrics, impressions = recommender.metrics, ImpressionBuffer(writer.post, clock=clock)
    metrics.before_export.append(lambda: metrics.impressions_dropped.set(impressions.dropped))
    app = described_app(_beside(impressions.keep_flushing, *([started] if started else [])))
    app.add_middleware(Guard, keys=Keys(api_key), limit=RateLimit(rate or Rate()), max_in_flight=max_in_flight, metrics=metrics)
    install_error_replies(app, recommender.trouble)
    app.include_router(asking(recommender, impressions))
    app.include_router(telling_events(writer, clock, metrics))
    app.include_router(telling_items(recommender, writer, clock))
    app.include_router(telling_users(recommender, writer, clock))
    app.include_router(_service(recommender, models, not_ready))
    return app


def _beside(*work: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(one()) for one in work]
        yield
        for task in tasks:
            task.cancel()

    return lifespan


def _service(recommender: Recommender, models: Callable[[], list[dict]], not_ready: Callable[[], str | None]) -> APIRouter:
    """Routes about the service itself."""
    router = APIRouter()

    @router.get("/health/live")
    async def live() -> Response:
        """The process answers."""
        return JSON({"status": "live"})

    @router.get("/health/ready")
    async def ready() -> Response:
        """A model is loaded."""
        reason = not_ready()
        if reason is not None:
            return error_response(503, "not_ready", reason, headers={"Retry-After": "5"})
        assert recommender.version is not None
        bundle = recommender.version.bundle
        return JSON({"status": "ready", "model_version": bundle.version, "warnings": [bundle.key_problem] if bundle.key_problem else []})

    @router.get("/v1/models")
    async def list_models() -> Response:
        """Published versions, the one in use, and how often answers were degraded."""
        current = recommender.version.bundle.version if recommender.version is not None else None
        return JSON({"current": current, "versions": await asyncio.to_thread(models), "counts": recommender.metrics.counts()})

    @router.get("/", include_in_schema=False)
    async def home() -> Response:
        """A page for people."""
        return HTMLResponse(HOME_PAGE)

    return router
