"""Clients that go away or do not read: the work for them is cancelled."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from chiasm.gateway.rest import disconnect
from chiasm.gateway.rest.disconnect import run_until_disconnect

if TYPE_CHECKING:
    import pytest
    from starlette.types import Message, Send


async def never_receive() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def never_read(message: Message) -> None:
    del message
    await asyncio.Event().wait()


async def test_a_client_that_does_not_read_is_treated_as_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(disconnect, "SEND_TIMEOUT_S", 0.05)
    events: list[str] = []

    async def work(send: Send) -> None:
        try:
            await send({"type": "http.response.body"})
            events.append("sent")
        finally:
            events.append("ended")

    await asyncio.wait_for(run_until_disconnect(never_receive, never_read, work), 5.0)

    assert events == ["ended"]


async def test_work_for_a_client_that_left_is_cancelled() -> None:
    events: list[str] = []
    has_begun = asyncio.Event()

    async def leave() -> Message:
        await has_begun.wait()
        return {"type": "http.disconnect"}

    async def work(send: Send) -> None:
        has_begun.set()
        try:
            await send({"type": "http.response.body"})
        finally:
            events.append("ended")

    await asyncio.wait_for(run_until_disconnect(leave, never_read, work), 5.0)

    assert events == ["ended"]
