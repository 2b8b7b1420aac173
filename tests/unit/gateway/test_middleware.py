"""What happens when a response cannot be sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chiasm.common.limits import Limits
from chiasm.gateway.rest.middleware import RequestMiddleware

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

# uvloop's words for a write to a connection that was reset.
_RESET = (
    "unable to perform operation on <TCPTransport closed=True reading=False 0x1>;"
    " the handler is closed"
)
_MISUSE = "Unexpected ASGI message 'http.response.start' sent."


async def _run(error: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def receive() -> Message:
        raise AssertionError("nothing is read")

    async def send(message: Message) -> None:
        raise RuntimeError(error)

    scope: Scope = {"type": "http", "method": "GET", "headers": []}
    await RequestMiddleware(app, Limits())(scope, receive, send)


async def test_a_client_that_has_left_is_no_error() -> None:
    await _run(_RESET)


async def test_a_wrong_message_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="Unexpected ASGI message"):
        await _run(_MISUSE)
