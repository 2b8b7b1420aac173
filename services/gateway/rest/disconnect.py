"""Stop working for a client that has gone away or no longer reads."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from starlette.types import Message, Receive, Send

SEND_TIMEOUT_S = 30.0

log = structlog.get_logger(__name__)


class ClientStalledError(Exception):
    """The client read nothing for ``SEND_TIMEOUT_S``; it is treated as gone."""


async def run_until_disconnect(
    receive: Receive, send: Send, work: Callable[[Send], Coroutine[Any, Any, None]]
) -> None:
    """Run ``work`` to its end, or cancel it when the client closes its connection.

    A client that does not read what is sent to it is treated as one that has gone away.

    Args:
        receive: ASGI channel of a request whose body has been read.
        send: ASGI channel of the response.
        work: Answers the request over the channel that it is given; lets
            ``ClientStalledError`` pass.

    Raises:
        BaseException: Whatever ``work`` raises.
    """

    async def send_in_time(message: Message) -> None:
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await send(message)
        except TimeoutError:
            raise ClientStalledError from None

    worker = asyncio.ensure_future(work(send_in_time))
    watcher = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            worker.result()
    except ClientStalledError:
        log.warning("client_stalled", timeout_s=SEND_TIMEOUT_S)
    finally:
        watcher.cancel()
        worker.cancel()
        await asyncio.gather(watcher, worker, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
