"""What is checked before a request is read: key, size and load."""

import hmac

from fastapi.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from raysys.serve.api import LIMITS
from raysys.serve.openapi import STATIC_URL
from raysys.serve.replies import error_response

KEY_VARIABLE = "RAYSYS_API_KEY"
OPEN_PATHS = ("/health/live", "/health/ready", "/docs", "/openapi.json", "/")
"""Answered without a key, and also under overload."""


class Guard:
    """Key, body size and load, before anything is read. Plain ASGI: Starlette's own wrapper costs as much as a whole answer.

    Args:
        app: what is guarded.
        expected_key: empty for no check.
        max_in_flight: requests at once.
    """

    def __init__(self, app: ASGIApp, expected_key: bytes, max_in_flight: int):
        self.app, self.expected_key, self.max_in_flight = app, expected_key, max_in_flight
        self.in_flight = self.bytes_in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        # A chunked body has no length; it counts as the largest that will be read.
        size = headers.get(b"content-length", b"%d" % LIMITS.max_body_bytes if b"transfer-encoding" in headers else b"0")
        refusal = self._refusal(scope, headers, size)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        self.in_flight += 1
        self.bytes_in_flight += int(size)
        try:
            await self.app(scope, receive, send)
        finally:
            self.in_flight -= 1
            self.bytes_in_flight -= int(size)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes], size: bytes) -> Response | None:
        is_open = scope["path"] in OPEN_PATHS or scope["path"].startswith(f"{STATIC_URL}/")
        if self.expected_key and not is_open:
            if not hmac.compare_digest(headers.get(b"x-api-key", b""), self.expected_key):
                return error_response(401, "unauthorized", "expected a valid key in the X-API-Key header")
        if self.in_flight >= self.max_in_flight and not is_open:
            message = f"expected at most {self.max_in_flight} requests at once; retry in a second"
            return error_response(503, "overloaded", message, headers={"Retry-After": "1"})
        if not size.isdigit() or int(size) > LIMITS.max_body_bytes:
            shown = size.decode("latin-1")[:20]
            return error_response(413, "too_large", f"expected a body of at most {LIMITS.max_body_bytes} bytes, got {shown}")
        if self.bytes_in_flight + int(size) > LIMITS.max_bodies_bytes:
            message = f"expected at most {LIMITS.max_bodies_bytes} bytes of bodies at once; retry in a second"
            return error_response(503, "overloaded", message, headers={"Retry-After": "1"})
        return None
