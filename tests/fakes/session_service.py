"""A session on top of any ``Generate``: one task per request, one event per message."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

from chiasm.common.errors import ChiasmError
from chiasm.common.rpc_status import details_of
from chiasm.v1 import generator_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    Requests = AsyncIterator[generator_pb2.GenerateRequest]
    Generate = Callable[[Requests], AsyncGenerator[generator_pb2.GenerateResponse, None]]


class FakeSession:
    """Runs ``generate`` for every request of a session; pays no heed to credit.

    A ``generate`` that ends without ``finished`` ends the session.
    """

    def __init__(self, generate: Generate, stopped: asyncio.Queue[int]) -> None:
        """Run ``generate``; put into ``stopped`` the index of every answer that is stopped."""
        self._generate = generate
        self._stopped = stopped
        self._events: asyncio.Queue[generator_pb2.SessionEvent | None] = asyncio.Queue()
        self._inboxes: dict[int, asyncio.Queue[generator_pb2.GenerateRequest | None]] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def run(
        self, requests: AsyncIterator[generator_pb2.SessionRequest]
    ) -> AsyncIterator[generator_pb2.StepBatch]:
        """Yield a batch per event until the caller or a request ends the session."""
        reader = asyncio.create_task(self._read(requests))
        try:
            while (event := await self._events.get()) is not None:
                yield generator_pb2.StepBatch(events=[event])
        finally:
            tasks = [reader, *self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, requests: AsyncIterator[generator_pb2.SessionRequest]) -> None:
        async for request in requests:
            key = request.request_key
            match request.WhichOneof("message"):
                case "start":
                    inbox = self._inboxes[key] = asyncio.Queue()
                    inbox.put_nowait(generator_pb2.GenerateRequest(start=request.start.start))
                    if request.start.is_half_closed:
                        inbox.put_nowait(None)
                    self._tasks[key] = asyncio.create_task(self._run(key, inbox))
                case "update":
                    self._inboxes[key].put_nowait(request.update)
                case "half_close":
                    self._inboxes[key].put_nowait(None)
                case "stop":
                    self._stopped.put_nowait(request.stop.index)
                case "cancel":
                    self._tasks[key].cancel()
        self._events.put_nowait(None)

    async def _run(
        self, key: int, inbox: asyncio.Queue[generator_pb2.GenerateRequest | None]
    ) -> None:
        is_finished = False
        try:
            async with aclosing(self._generate(_drain(inbox))) as responses:
                async for response in responses:
                    is_finished = response.HasField("finished")
                    event = generator_pb2.SessionEvent(request_key=key, response=response)
                    self._events.put_nowait(event)
        except ChiasmError as error:
            details = details_of(error)
            self._events.put_nowait(generator_pb2.SessionEvent(request_key=key, error=details))
        else:
            if not is_finished:
                self._events.put_nowait(None)


async def _drain(inbox: asyncio.Queue[generator_pb2.GenerateRequest | None]) -> Requests:
    while (request := await inbox.get()) is not None:
        yield request
