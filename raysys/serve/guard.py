"""What is checked before a request is read: key, rate, size and load; and how it was answered, for the metrics."""

from fastapi.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raysys.serve.api import LIMITS
from raysys.serve.keys import Keys
from raysys.serve.metrics import Metrics
from raysys.serve.openapi import STATIC_URL
from raysys.serve.rate import RateLimit
from raysys.serve.replies import error_response

OPEN_PATHS = ("/health/live", "/health/ready", "/docs", "/openapi.json", "/")
"""Answered without a key, and also under overload."""


class Guard:
    """Key, rate, body size and load, before anything is read. Plain ASGI: Starlette's own wrapper costs as much as a whole answer.

    Args:
        app: what is guarded.
        keys: who may call.
        limit: how often.
        max_in_flight: requests at once.
        metrics: counts answers and refusals.
    """

    def __init__(self, app: ASGIApp, keys: Keys, limit: RateLimit, max_in_flight: int, metrics: Metrics):
        self.app, self.keys, self.limit, self.max_in_flight, self.metrics = app, keys, limit, max_in_flight, metrics
        self.in_flight = self.bytes_in_flight = 0
        metrics.before_export.append(lambda: metrics.in_flight.set(self.in_flight))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.responses.add(str(message["status"]))
            await send(message)

        headers = dict(scope["headers"])
        # A chunked body has no length; it counts as the largest that will be read.
        size = headers.get(b"content-length", b"%d" % LIMITS.max_body_bytes if b"transfer-encoding" in headers else b"0")
        refusal = self._refusal(scope, headers, size)
        if refusal is not None:
            await refusal(scope, receive, counted)
            return
        self.in_flight += 1
        self.bytes_in_flight += int(size)
        try:
            await self.app(scope, receive, counted)
        except Exception:  # answered further out, where nobody counts
            self.metrics.responses.add("500")
            raise
        finally:
            self.in_flight -= 1
            self.bytes_in_flight -= int(size)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes], size: bytes) -> Response | None:
        is_open = scope["path"] in OPEN_PATHS or scope["path"].startswith(f"{STATIC_URL}/")
        client = None
        if self.keys.required and not is_open:
            client = self.keys.owner(headers.get(b"x-api-key", b""))
            if client is None:
                return self._refused(401, "unauthorized", "expected a valid key in the X-API-Key header")
        if not is_open:
            wait_s = self.limit.wait_s(client or _address(scope, headers))
            if wait_s:
                message = f"expected at most {self.limit.rate.per_s:g} requests a second; retry in {wait_s} s"
                return self._refused(429, "rate_limited", message, retry_s=wait_s)
        if self.in_flight >= self.max_in_flight and not is_open:
            return self._refused(503, "overloaded", f"expected at most {self.max_in_flight} requests at once; retry in a second", retry_s=1)
        if not size.isdigit() or int(size) > LIMITS.max_body_bytes:
            shown = size.decode("latin-1")[:20]
            return self._refused(413, "too_large", f"expected a body of at most {LIMITS.max_body_bytes} bytes, got {shown}")
        if self.bytes_in_flight + int(size) > LIMITS.max_bodies_bytes:
            message = f"expected at most {LIMITS.max_bodies_bytes} bytes of bodies at once; retry in a second"
            return self._refused(503, "overloaded", message, retry_s=1)
        return None

    def _refused(self, status: int, kind: str, message: str, *, retry_s: int | None = None) -> Response:
        self.metrics.refused.add(kind)
        return error_response(status, kind, message, headers={"Retry-After": str(retry_s)} if retry_s else None)


def _address(scope: Scope, headers: dict[bytes, bytes]) -> bytes:
    """Where a request comes from: what the nearest proxy said last, else the peer, which behind HAProxy is HAProxy."""
    forwarded = headers.get(b"x-forwarded-for", b"").rpartition(b",")[2].strip()[:64]
    return forwarded or (scope.get("client") or ("",))[0].encode()
