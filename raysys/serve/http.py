"""The HTTP API as a FastAPI app over a `Recommender` and a writer. No Ray here, so it is tested without it."""

import hmac
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from raysys.errors import SchemaError, ServeOverloaded, StateError
from raysys.events.log import Record
from raysys.serve.api import LIMITS, AnswerBody, EventBody, EventsAnswer, EventsBody, ItemsBody, RankBody, RecommendBody
from raysys.serve.ingest import ImpressionBuffer, check_attributes, check_events, first_problem
from raysys.serve.openapi import STATIC_URL, attributes_body, body_of, described_app, query_of
from raysys.serve.recommender import Recommender

KEY_VARIABLE = "RAYSYS_API_KEY"
OPEN_PATHS = ("/health/live", "/health/ready", "/docs", "/openapi.json", "/")
HOME_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>raysys</title>
<style>body{font:16px/1.5 system-ui;max-width:42em;margin:4em auto;padding:0 1em}</style>
<h1>raysys</h1><p>A real-time recommender. Ask <code>POST /v1/recommend</code>, tell <code>POST /v1/events</code>.</p>
<p><a href="/docs">The API</a> &middot; <a href="/v1/models">models</a> &middot; <a href="/health/ready">ready?</a></p></html>"""


class Writer(Protocol):
    """Durable writes, wherever the log is."""

    async def write(self, records: list[Record]) -> list[bool]:
        """Durable and visible once this returns; False for an event seen before."""
        ...

    async def reject(self, entries: list[dict]) -> None:
        """Keep refused records in the dead-letter file."""
        ...

    async def erase(self, user_id: str) -> dict:
        """Forget a user; the signed receipt."""
        ...

    def post(self, records: list[Record]) -> None:
        """Write without waiting."""
        ...


class JSON(Response):
    """An orjson body."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Serialise; NaN becomes null."""
        return orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS, default=str)


def error_response(status: int, kind: str, message: str, field: str | None = None, headers: dict | None = None) -> JSON:
    """The one shape of errors."""
    return JSON({"error": {"type": kind, "field": field, "message": message}}, status_code=status, headers=headers)


class BodyTooLarge(Exception):
    """More bytes came than a body may have."""


class Guard:
    """Key, body size and load, before anything is read. Plain ASGI: Starlette's own wrapper costs as much as a whole answer.

    Args:
        app: what is guarded.
        expected_key: empty for no check.
        max_in_flight: requests at once.
    """

    def __init__(self, app: ASGIApp, expected_key: bytes, max_in_flight: int):
        self.app, self.expected_key, self.max_in_flight = app, expected_key, max_in_flight
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        self.in_flight += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.in_flight -= 1

    def _refusal(self, scope: Scope) -> Response | None:
        headers = dict(scope["headers"])
        is_open = scope["path"] in OPEN_PATHS or scope["path"].startswith(f"{STATIC_URL}/")
        if self.expected_key and not is_open:
            if not hmac.compare_digest(headers.get(b"x-api-key", b""), self.expected_key):
                return error_response(401, "unauthorized", "expected a valid key in the X-API-Key header")
        if self.in_flight >= self.max_in_flight and not is_open:
            message = f"expected at most {self.max_in_flight} requests at once; retry in a second"
            return error_response(503, "overloaded", message, headers={"Retry-After": "1"})
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > LIMITS.max_body_bytes:
            shown = length.decode("latin-1")[:20]
            return error_response(413, "too_large", f"expected a body of at most {LIMITS.max_body_bytes} bytes, got {shown}")
        return None


def create_app(
    recommender: Recommender,
    writer: Writer,
    *,
    models: Callable[[], list[dict]],
    not_ready: Callable[[], str | None],
    clock: Callable[[], float] = time.time,
    api_key: str | None = None,
    max_in_flight: int = 150,
) -> FastAPI:
    """All calls of the API.

    Args:
        recommender: answers.
        writer: takes events, items and users.
        models: versions for `GET /v1/models`.
        not_ready: the reason why `/health/ready` says 503, None when ready.
        clock: UTC epoch seconds now.
        max_in_flight: requests worked on at once; more are answered with 503 and Retry-After.
        api_key: expected in `X-API-Key`; default from the environment, no check without one.
    """
    app = described_app()
    app.state.recommender = recommender
    expected_key = (api_key or os.environ.get(KEY_VARIABLE) or "").encode()
    impressions = ImpressionBuffer(writer.post)
    state = recommender.state

    app.add_middleware(Guard, expected_key=expected_key, max_in_flight=max_in_flight)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        field, message = first_problem(list(error.errors()))
        return error_response(400, "invalid", message, field)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return error_response(404, "not_found", f"no such path {request.url.path!r}; the API is described at /docs")
        if error.status_code == 405:
            return error_response(405, "method_not_allowed", f"{request.method} is not offered at {request.url.path!r}; see /docs")
        return error_response(error.status_code, "error", str(error.detail))

    @app.exception_handler(SchemaError)
    async def schema_error(request: Request, error: SchemaError) -> Response:
        text = str(error)
        field, colon, _ = text.partition(":")
        return error_response(400, "invalid", text, field if colon and " " not in field else None)

    @app.exception_handler(ServeOverloaded)
    async def overloaded(request: Request, error: ServeOverloaded) -> Response:
        return error_response(503, "overloaded", str(error), headers={"Retry-After": "1"})

    @app.exception_handler(StateError)
    async def broken_state(request: Request, error: StateError) -> Response:
        return error_response(503, "state_unavailable", str(error), headers={"Retry-After": "5"})

    @app.exception_handler(BodyTooLarge)
    async def too_large(request: Request, error: BodyTooLarge) -> Response:
        return error_response(413, "too_large", f"expected a body of at most {LIMITS.max_body_bytes} bytes, got more")

    async def parse(request: Request) -> Any:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > LIMITS.max_body_bytes:  # a chunked body has no length for `Guard` to look at
                raise BodyTooLarge
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise SchemaError(f"expected a JSON body, {error}") from None

    async def answer(request: Request, kind: type[BaseModel], handle: Callable[[Any], Awaitable[dict]]) -> Response:
        try:
            body = kind.model_validate(await parse(request))
        except ValidationError as error:
            field, message = first_problem(error.errors())
            return error_response(400, "invalid", message, field)
        result = await handle(body)
        impressions.add(result)
        return JSON(result)

    @app.post("/v1/recommend", response_model=AnswerBody, openapi_extra=body_of(RecommendBody))
    async def recommend(request: Request) -> Response:
        """Personal recommendations for a user, a session or an inline history."""
        return await answer(request, RecommendBody, recommender.recommend)

    def query(request: Request, *known: str) -> dict[str, str]:
        """Parameters of a GET; an unknown one is refused like an unknown field."""
        given = dict(request.query_params)
        for name in given:
            if name not in known:
                raise SchemaError(f"{name}: unknown parameter {name!r}, expected {', '.join(known)}")
        return given

    @app.get("/v1/recommend/{user_id}", response_model=AnswerBody, openapi_extra=query_of("n", "k", "top_k", "offset"))
    async def recommend_user(user_id: str, request: Request) -> Response:
        """The same for one user, by GET."""
        try:
            body = RecommendBody.model_validate({**query(request, "n", "k", "top_k", "offset"), "user_id": user_id})
        except ValidationError as error:
            field, message = first_problem(error.errors())
            return error_response(400, "invalid", message, field)
        result = await recommender.recommend(body)
        impressions.add(result)
        return JSON(result)

    @app.post("/v1/rank", response_model=AnswerBody, openapi_extra=body_of(RankBody))
    async def rank(request: Request) -> Response:
        """The given candidates in the user's order."""
        return await answer(request, RankBody, recommender.rank)

    @app.get("/v1/items/{item_id}/similar", response_model=AnswerBody, openapi_extra=query_of("n"))
    async def similar(item_id: str, request: Request) -> Response:
        """Items that go with one item."""
        text = query(request, "n").get("n", "10")
        if not text.isdecimal() or not 1 <= int(text) <= LIMITS.max_n:
            return error_response(400, "invalid", f"expected a whole number from 1 to {LIMITS.max_n}, got {text[:20]!r}", "n")
        return JSON(await recommender.similar(item_id, int(text)))

    @app.post("/v1/events", response_model=EventsAnswer, openapi_extra=body_of(EventBody, EventsBody))
    async def events(request: Request) -> Response:
        """One event or a batch; a rejected record never blocks the others. Once answered, accepted events survive any crash."""
        records, rejected = check_events(body := await parse(request), clock())
        fresh = await writer.write(records) if records else []
        if rejected:
            batch = body["events"] if "events" in body else [body]
            await writer.reject([{**entry, "record": batch[entry["index"]]} for entry in rejected])
        return JSON({"accepted": sum(fresh), "duplicates": len(fresh) - sum(fresh), "rejected": rejected})

    async def write_items(items: list[tuple[str, dict]], *, replace: bool) -> None:
        records = [{"kind": "item", "item_id": item_id, "attributes": values, "replace": replace} for item_id, values in items]
        await writer.write(records)

    def checked_id(item_id: Any, field: str) -> str:
        if isinstance(item_id, int) and not isinstance(item_id, bool):
            item_id = str(item_id)
        if not isinstance(item_id, str) or not 0 < len(item_id.encode()) <= LIMITS.max_id_length:
            raise SchemaError(f"{field}: expected an id of 1 to {LIMITS.max_id_length} bytes, got {item_id!r:.80}")
        return item_id

    @app.put("/v1/items/{item_id}", openapi_extra=attributes_body())
    async def put_item(item_id: str, request: Request) -> Response:
        """Create an item or replace its attributes; recommendable within seconds."""
        attributes = check_attributes(await parse(request), what="item")
        await write_items([(checked_id(item_id, "item_id"), attributes)], replace=True)
        return JSON({"item_id": item_id, "accepted": True})

    @app.patch("/v1/items/{item_id}", openapi_extra=attributes_body())
    async def patch_item(item_id: str, request: Request) -> Response:
        """Change some attributes; null removes one."""
        attributes = check_attributes(await parse(request), what="item")
        recommender.sync_items()
        if not recommender.catalogue.known(checked_id(item_id, "item_id")):
            return error_response(404, "not_found", f"no item {item_id!r}; PUT creates one", "item_id")
        await write_items([(item_id, attributes)], replace=False)
        return JSON({"item_id": item_id, "accepted": True})

    @app.post("/v1/items", openapi_extra=body_of(ItemsBody))
    async def post_items(request: Request) -> Response:
        """Create or replace many items: {"items": [{item_id, ...}]}."""
        body = await parse(request)
        items = body.get("items") if isinstance(body, dict) else None
        if not isinstance(items, list) or not items or len(body) > 1:
            raise SchemaError('items: expected {"items": [...]} with at least one item')
        if len(items) > LIMITS.max_batch:
            raise SchemaError(f"items: expected at most {LIMITS.max_batch} items a request, got {len(items)}")
        accepted, rejected = [], []
        for index, item in enumerate(items):
            try:
                if not isinstance(item, dict):
                    raise SchemaError(f"expected an object, got {type(item).__name__}")
                item_id = checked_id(item.get("item_id"), "item_id")
                attributes = check_attributes({name: value for name, value in item.items() if name != "item_id"}, what="item")
                accepted.append((item_id, attributes))
            except SchemaError as error:
                field, colon, reason = str(error).partition(": ")
                rejected.append({"index": index, "field": field if colon else None, "reason": reason if colon else field})
        if accepted:
            await write_items(accepted, replace=True)
        return JSON({"accepted": len(accepted), "rejected": rejected})

    @app.get("/v1/items/{item_id}")
    async def get_item(item_id: str) -> Response:
        """Attributes of an item."""
        recommender.sync_items()
        if not recommender.catalogue.known(item_id):
            return error_response(404, "not_found", f"no item {item_id!r}", "item_id")
        return JSON({"item_id": item_id, **recommender.catalogue.attributes(item_id)})

    @app.delete("/v1/items/{item_id}")
    async def delete_item(item_id: str) -> Response:
        """Never recommend this item again; a later PUT brings it back."""
        await writer.write([{"kind": "item_delete", "item_id": checked_id(item_id, "item_id")}])
        return JSON({"item_id": item_id, "deleted": True})

    async def write_user(user_id: str, request: Request, *, replace: bool) -> Response:
        attributes = check_attributes(await parse(request), what="user")
        record = {"kind": "user", "user_id": checked_id(user_id, "user_id"), "attributes": attributes, "replace": replace}
        await writer.write([record])
        return JSON({"user_id": user_id, "accepted": True})

    @app.put("/v1/users/{user_id}", openapi_extra=attributes_body())
    async def put_user(user_id: str, request: Request) -> Response:
        """Set a user's attributes."""
        return await write_user(user_id, request, replace=True)

    @app.patch("/v1/users/{user_id}", openapi_extra=attributes_body())
    async def patch_user(user_id: str, request: Request) -> Response:
        """Change some attributes; null removes one."""
        return await write_user(user_id, request, replace=False)

    @app.get("/v1/users/{user_id}")
    async def get_user(user_id: str) -> Response:
        """Everything that is held about a user."""
        erased = state.erased(user_id)
        version = recommender.version
        learnt = None if erased or version is None else version.bundle.histories.lookup(user_id)
        events = [
            {"item_id": event.item_id, "event": event.event, "timestamp": event.timestamp, "value": event.value}
            for event in state.history(user_id)
        ]
        training = []
        if learnt is not None and version is not None:
            ids, names = version.catalogue.item_ids, version.bundle.events
            training = [{"item_id": ids[i], "event": names[e], "timestamp": int(t)} for i, e, t in zip(*learnt, strict=True)]
        return JSON({"user_id": user_id, "attributes": state.user(user_id) or {}, "events": events, "training_events": training})

    @app.delete("/v1/users/{user_id}")
    async def delete_user(user_id: str) -> Response:
        """Forget a user; the answer is a signed receipt."""
        return JSON(await writer.erase(checked_id(user_id, "user_id")))

    @app.get("/health/live")
    async def live() -> Response:
        """The process answers."""
        return JSON({"status": "live"})

    @app.get("/health/ready")
    async def ready() -> Response:
        """A model is loaded."""
        reason = not_ready()
        if reason is not None:
            return error_response(503, "not_ready", reason, headers={"Retry-After": "5"})
        assert recommender.version is not None
        bundle = recommender.version.bundle
        return JSON({"status": "ready", "model_version": bundle.version, "warnings": [bundle.key_problem] if bundle.key_problem else []})

    @app.get("/v1/models")
    async def list_models() -> Response:
        """Published versions, the one in use, and how often answers were degraded."""
        current = recommender.version.bundle.version if recommender.version is not None else None
        return JSON({"current": current, "versions": models(), "counts": dict(recommender.counts)})

    @app.get("/", include_in_schema=False)
    async def home() -> Response:
        return HTMLResponse(HOME_PAGE)

    return app
