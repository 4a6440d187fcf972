"""The description of the API: `/openapi.json`, and a page at `/docs` that loads nothing from other hosts.

Handlers read their bodies themselves (one parse with orjson, our own error shape), so FastAPI cannot
see what they take; it is told here.
"""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from raysys import __version__
from raysys.serve.api import ErrorBody, EventBody, EventsBody, ItemsBody, RankBody, RecommendBody
from raysys.serve.request import DEADLINE_HEADER, MAX_DEADLINE_MS

STATIC_URL = "/static-offline-docs"
"""Where the page's script and style come from."""
REQUEST_BODIES = (RecommendBody, RankBody, EventBody, EventsBody, ItemsBody)
REF = "#/components/schemas/{model}"
ATTRIBUTES = {
    "type": "object",
    "description": "attributes, flat: text, numbers, true or false, lists; null removes one",
    "additionalProperties": True,
    "example": {"title": "A new film", "categories": ["Comedy"], "available": True},
}


def described_app(lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]]) -> FastAPI:
    """An app without calls yet; what its description will say of errors and request bodies is set."""
    app = FastAPIOffline(
        title="raysys",
        version=__version__,
        description="Real-time recommendations: ask, tell, and see the next answer change.",
        responses={status: {"model": ErrorBody} for status in (400, 401, 404, 413, 429, 503)},
        redirect_slashes=False,
        redoc_url=None,
        lifespan=lifespan,
        static_url=STATIC_URL,
    )
    generated = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schemas = generated()["components"]["schemas"]
            _, definitions = models_json_schema([(model, "validation") for model in REQUEST_BODIES], ref_template=REF)
            schemas.update(definitions["$defs"])
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def body_of(*models: type[BaseModel]) -> dict:
    """`openapi_extra` of a call that takes one of the models as JSON."""
    references = [{"$ref": REF.format(model=model.__name__)} for model in models]
    return _body(references[0] if len(references) == 1 else {"anyOf": references})


def attributes_body() -> dict:
    """`openapi_extra` of a call that takes the attributes of an item or a user."""
    return _body(ATTRIBUTES)


def query_of(*names: str, kind: str = "integer") -> dict:
    """`openapi_extra` of a call with query parameters of one JSON type, whole numbers by default."""
    return {"parameters": [{"name": name, "in": "query", "required": False, "schema": {"type": kind}} for name in names]}


def with_deadline(extra: dict) -> dict:
    """`openapi_extra` of a call that also heeds the client's deadline."""
    header = {
        "name": DEADLINE_HEADER,
        "in": "header",
        "required": False,
        "description": "milliseconds within which an answer is of use; stages that would be later are left out and the answer says so",
        "schema": {"type": "integer", "minimum": 1, "maximum": MAX_DEADLINE_MS},
    }
    return {**extra, "parameters": [*extra.get("parameters", ()), header]}


def _body(schema: dict) -> dict:
    return {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}}
