"""Bodies in, bodies out: the JSON of the API, its one shape of errors, and which exception becomes which status."""

from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from raysys.errors import SchemaError, ServeOverloaded, StateError
from raysys.serve.api import LIMITS
from raysys.serve.ingest import first_problem
from raysys.serve.trouble import Trouble


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


async def read_json(request: Request) -> Any:
    """The parsed body.

    Raises:
        SchemaError: it is not JSON.
        BodyTooLarge: it goes on beyond the limit (a chunked body has no length for `Guard` to look at).
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LIMITS.max_body_bytes:
            raise BodyTooLarge
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise SchemaError(f"expected a JSON body, {error}") from None


def read_query(request: Request, *known: str) -> dict[str, str]:
    """The parameters of a GET.

    Raises:
        SchemaError: one is not known, and is refused like an unknown field.
    """
    given = dict(request.query_params)
    for name in given:
        if name not in known:
            raise SchemaError(f"{name}: unknown parameter {name!r}, expected {', '.join(known)}")
    return given


def install_error_replies(app: FastAPI, trouble: Trouble) -> None:
    """Translate exceptions into answers, here and nowhere else; those that are our fault are logged."""

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(ValidationError)
    async def invalid(request: Request, error: RequestValidationError | ValidationError) -> Response:
        field, message = first_problem(list(error.errors()))
        return error_response(400, "invalid", message, field)

    @app.exception_handler(SchemaError)
    async def schema_error(request: Request, error: SchemaError) -> Response:
        text = str(error)
        field, colon, _ = text.partition(":")
        return error_response(400, "invalid", text, field if colon and " " not in field else None)

    @app.exception_handler(BodyTooLarge)
    async def too_large(request: Request, error: BodyTooLarge) -> Response:
        return error_response(413, "too_large", f"expected a body of at most {LIMITS.max_body_bytes} bytes, got more")

    @app.exception_handler(ServeOverloaded)
    async def overloaded(request: Request, error: ServeOverloaded) -> Response:
        trouble.failed(503, "overloaded", error)
        return error_response(503, "overloaded", str(error), headers={"Retry-After": "1"})

    @app.exception_handler(StateError)
    async def broken_state(request: Request, error: StateError) -> Response:
        trouble.failed(503, "state_unavailable", error)
        return error_response(503, "state_unavailable", str(error), headers={"Retry-After": "5"})

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return error_response(404, "not_found", f"no such path {request.url.path!r}; the API is described at /docs")
        if error.status_code == 405:
            return error_response(405, "method_not_allowed", f"{request.method} is not offered at {request.url.path!r}; see /docs")
        return error_response(error.status_code, "error", str(error.detail))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        trouble.failed(500, "internal", error)
        # Starlette raises it again afterwards, so the replica's log has the traceback.
        return error_response(500, "internal", f"{type(error).__name__} while answering; the service's log says more")
