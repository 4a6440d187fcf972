"""The calls that tell: events, items and users. Every one is answered once it is durable."""

import time
from collections.abc import Callable
from typing import Any, Protocol

from fastapi import APIRouter, Request
from fastapi.responses import Response

from raysys.errors import SchemaError
from raysys.events.erasure import erase_record, receipt
from raysys.events.log import Record
from raysys.serve.api import LIMITS, EventBody, EventsAnswer, EventsBody, ItemsBody
from raysys.serve.ingest import check_attributes, check_events, checked_id
from raysys.serve.metrics import Metrics
from raysys.serve.openapi import attributes_body, body_of, query_of
from raysys.serve.recommender import Recommender
from raysys.serve.replies import JSON, error_response, read_json, read_query


class Writer(Protocol):
    """Durable writes, wherever the log is."""

    async def write(self, records: list[Record]) -> list[bool]:
        """Durable and visible once this returns; False for an event seen before."""
        ...

    async def reject(self, entries: list[dict]) -> None:
        """Keep refused records in the dead-letter file."""
        ...

    async def held(self, user_id: str) -> list[Record]:
        """Everything that the log holds about a user."""
        ...

    def post(self, records: list[Record]) -> None:
        """Write without waiting."""
        ...


def telling_events(writer: Writer, clock: Callable[[], float], metrics: Metrics) -> APIRouter:
    """Routes of the events."""
    router = APIRouter()

    @router.post("/v1/events", response_model=EventsAnswer, openapi_extra=body_of(EventBody, EventsBody))
    async def events(request: Request) -> Response:
        """One event or a batch; a rejected record never blocks the others. Once answered, accepted events survive any crash."""
        started = time.perf_counter()
        records, rejected = check_events(body := await read_json(request), now := clock())
        fresh = await writer.write(records) if records else []
        if records:
            metrics.visible_ms.observe((time.perf_counter() - started) * 1000)
        for outcome, count in (("accepted", sum(fresh)), ("duplicate", len(fresh) - sum(fresh)), ("rejected", len(rejected))):
            if count:
                metrics.events.add(outcome, by=count)
        if rejected:
            batch = body["events"] if "events" in body else [body]
            await writer.reject([{**entry, "received": now, "record": batch[entry["index"]]} for entry in rejected])
        return JSON({"accepted": sum(fresh), "duplicates": len(fresh) - sum(fresh), "rejected": rejected})

    return router


def telling_items(recommender: Recommender, writer: Writer, clock: Callable[[], float]) -> APIRouter:
    """Routes of the items."""
    router = APIRouter()

    async def write(items: list[tuple[str, dict]], *, replace: bool) -> None:
        common = {"replace": replace, "received": clock()}
        await writer.write([{"kind": "item", "item_id": id_, "attributes": values, **common} for id_, values in items])

    def is_known(item_id: str) -> bool:
        recommender.sync_items()
        return recommender.catalogue.known(item_id)

    @router.put("/v1/items/{item_id}", openapi_extra=attributes_body())
    async def put_item(item_id: str, request: Request) -> Response:
        """Create an item or replace its attributes; recommendable within seconds."""
        attributes = check_attributes(await read_json(request), what="item")
        await write([(checked_id(item_id, "item_id"), attributes)], replace=True)
        return JSON({"item_id": item_id, "accepted": True})

    @router.patch("/v1/items/{item_id}", openapi_extra=attributes_body())
    async def patch_item(item_id: str, request: Request) -> Response:
        """Change some attributes; null removes one."""
        attributes = check_attributes(await read_json(request), what="item")
        if not is_known(checked_id(item_id, "item_id")):
            return error_response(404, "not_found", f"no item {item_id!r}; PUT creates one", "item_id")
        await write([(item_id, attributes)], replace=False)
        return JSON({"item_id": item_id, "accepted": True})

    @router.get("/v1/items/{item_id}")
    async def get_item(item_id: str) -> Response:
        """Attributes of an item."""
        if not is_known(item_id):
            return error_response(404, "not_found", f"no item {item_id!r}", "item_id")
        return JSON({"item_id": item_id, **recommender.catalogue.attributes(item_id)})

    @router.delete("/v1/items/{item_id}")
    async def delete_item(item_id: str) -> Response:
        """Never recommend this item again; a later PUT brings it back."""
        await writer.write([{"kind": "item_delete", "item_id": checked_id(item_id, "item_id"), "received": clock()}])
        return JSON({"item_id": item_id, "deleted": True})

    @router.post("/v1/items", openapi_extra=body_of(ItemsBody))
    async def post_items(request: Request) -> Response:
        """Create or replace many items: {"items": [{item_id, ...}]}."""
        accepted, rejected = _checked_items(await read_json(request))
        if accepted:
            await write(accepted, replace=True)
        return JSON({"accepted": len(accepted), "rejected": rejected})

    return router


def telling_users(recommender: Recommender, writer: Writer, clock: Callable[[], float]) -> APIRouter:
    """Routes of the users."""
    router = APIRouter()

    async def write(user_id: str, request: Request, *, replace: bool) -> Response:
        attributes = check_attributes(await read_json(request), what="user")
        record = {"kind": "user", "user_id": checked_id(user_id, "user_id"), "attributes": attributes, "replace": replace}
        await writer.write([{**record, "received": clock()}])
        return JSON({"user_id": user_id, "accepted": True})

    @router.put("/v1/users/{user_id}", openapi_extra=attributes_body())
    async def put_user(user_id: str, request: Request) -> Response:
        """Set a user's attributes."""
        return await write(user_id, request, replace=True)

    @router.patch("/v1/users/{user_id}", openapi_extra=attributes_body())
    async def patch_user(user_id: str, request: Request) -> Response:
        """Change some attributes; null removes one."""
        return await write(user_id, request, replace=False)

    @router.get("/v1/users/{user_id}", openapi_extra=query_of("log", kind="boolean"))
    async def get_user(user_id: str, request: Request) -> Response:
        """Everything that is held about a user; with `log=true` also what the event log holds, which reads all of it."""
        wanted = read_query(request, "log").get("log", "false")
        if wanted not in ("true", "false"):
            raise SchemaError(f"log: expected true or false, got {wanted[:20]!r}")
        held = recommender.held_about(user_id)
        return JSON({**held, "log": await writer.held(user_id)} if wanted == "true" else held)

    @router.delete("/v1/users/{user_id}")
    async def delete_user(user_id: str) -> Response:
        """Forget a user; the answer is a signed receipt."""
        record = erase_record(checked_id(user_id, "user_id"), clock())
        await writer.write([record])
        return JSON(receipt(record, *recommender.last_version_with(user_id)))

    return router


def _checked_items(body: Any) -> tuple[list[tuple[str, dict]], list[dict]]:
    """(id, attributes) of the good items of a bulk write, and {index, field, reason} of the others.

    Raises:
        SchemaError: the body as a whole is not what was expected.
    """
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
    return accepted, rejected
