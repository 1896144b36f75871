"""The outermost layer, which handles every request: limits, security headers, metrics and crashes."""

import logging
import time
import uuid
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trueup.api.auth import DEMO_HEADER
from trueup.api.errors import ApiError, render, unavailable
from trueup.api.views.metrics import NO_ROUTE, Metrics
from trueup.settings.api import ApiSettings

logger = logging.getLogger(__name__)

SECURITY_HEADERS = (
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "QUERY"})


class Edge:
    """Limits body sizes and concurrent requests, adds security headers, counts requests, answers a crash with 500."""

    def __init__(self, app: ASGIApp, *, settings: ApiSettings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._in_flight = 0
        pairs = SECURITY_HEADERS + ((DEMO_HEADER,) if settings.demo else ())
        self._headers = [(name.lower().encode(), value.encode()) for name, value in pairs]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(send, self._headers)
        started = time.perf_counter()
        self._in_flight += 1
        self._metrics.in_flight.inc()
        try:
            await self._answer(scope, receive, exchange)
        finally:
            self._in_flight -= 1
            self._metrics.in_flight.dec()
            route = getattr(scope.get("route"), "path", NO_ROUTE)
            method = scope["method"] if scope["method"] in METHODS else "other"
            # 499: the client disconnected before the answer began.
            self._metrics.count_request(method, route, exchange.status or 499, time.perf_counter() - started)

    async def _answer(self, scope: Scope, receive: Receive, exchange: "_Exchange") -> None:
        try:
            if self._in_flight > self._settings.max_requests:
                raise unavailable("The server is handling too many requests. Nothing was done; try again")
            await self._app(scope, self._bounded(scope, receive), exchange.send)
        except ApiError as error:
            await render(error)(scope, receive, exchange.send)
        except Exception:
            number = uuid.uuid4().hex[:12]
            logger.exception("request crashed error=%s method=%s path=%r", number, scope["method"], scope["path"])
            if exchange.status is not None:
                raise  # the answer has begun: the server can only close the connection
            problem = f"The request failed on the server. Its log names the cause, under error {number}"
            await render(ApiError(500, "internal_error", problem))(scope, receive, exchange.send)

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """Return a `receive` that refuses a body above the limit, by its declared length or while it is read."""
        limit = self._settings.max_body_bytes
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(limit)
        seen = 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise _too_large(limit)
            return message

        return bounded


class _Exchange:
    """The answer to one request. `status` None: the answer has not begun."""

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self._send = send
        self._headers = headers
        self.status: int | None = None

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = {name.lower() for name, _ in message["headers"]}
            # A page has a policy of its own, which allows its style and script.
            message["headers"] = [*message["headers"], *(pair for pair in self._headers if pair[0] not in own)]
        await self._send(message)


def _too_large(limit: int) -> ApiError:
    # The rest of the body stays unread, so the connection can't be reused.
    return ApiError(413, "body_too_large", f"The body is larger than {limit} bytes", headers={"Connection": "close"})
