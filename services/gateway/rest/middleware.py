"""Give every request an id and measure it, without touching its body."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING

from chiasm.common.logging import bind_request_id
from chiasm.common.metrics import HTTP_REQUEST_DURATION_SECONDS, HTTP_REQUESTS

from ..convert import is_request_id

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from chiasm.common.limits import Limits

_HEADER = b"x-request-id"
# What uvloop says of a write to a connection that was reset a moment ago.
_RESET = "the handler is closed"


class RequestMiddleware:
    """Takes ``x-request-id`` or makes one, sends it back, and counts the request by its route."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its id."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = self._request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        bind_request_id(request_id)
        start_s = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (_HEADER, request_id.encode())]
                message = {**message, "headers": headers}
            try:
                await send(message)
            except RuntimeError as error:
                # The server drops messages to clients that have left, once it knows.
                if _RESET not in str(error):
                    raise

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            _count(scope, status, time.monotonic() - start_s)

    def _request_id(self, scope: Scope) -> str:
        for key, value in scope["headers"]:
            if key == _HEADER:
                text: str = value.decode("latin-1")
                if is_request_id(text, self._limits):
                    return text
        return uuid.uuid4().hex


def _count(scope: Scope, status: int, seconds: float) -> None:
    route = scope.get("route")
    handler = getattr(route, "path", "none")
    method = scope["method"] if route is not None else "none"
    HTTP_REQUESTS.labels(method, handler, f"{status // 100}xx").inc()
    HTTP_REQUEST_DURATION_SECONDS.labels(method, handler).observe(seconds)
