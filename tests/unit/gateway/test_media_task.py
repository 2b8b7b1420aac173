"""The end of the work on one media item."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, cast

from chiasm.common.media import CacheStatus, Modality, ProcessingOptions, RequestContext
from chiasm.gateway.budgets import ByteBudget
from chiasm.gateway.chat_request import BytesSource, MediaItem
from chiasm.gateway.deadline import Deadline
from chiasm.gateway.encoder_client import ItemPlanned, ItemReady
from chiasm.gateway.media_task import MediaServices, MediaTask
from tests.fakes.embeddings import make_layout, make_ref

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from chiasm.gateway.encoder_client import EncodeEvent, EncoderClient

_WAIT_S = 5.0
_REF = make_ref()


class _DeafEncoder:
    """Encodes to the end when it is cancelled."""

    def __init__(self) -> None:
        self.has_begun = asyncio.Event()

    async def encode(self, *_: object, **__: object) -> AsyncGenerator[EncodeEvent, None]:
        self.has_begun.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        yield ItemPlanned(_REF, make_layout(_REF), CacheStatus.MISS)
        yield ItemReady(CacheStatus.MISS)


async def test_closing_waits_for_nobody_to_connect_though_a_cancellation_is_lost() -> None:
    encoder, kept = _DeafEncoder(), ByteBudget(100)
    task = MediaTask(
        MediaItem(Modality.IMAGE, 0, "part", "", ProcessingOptions(), BytesSource(b"picture")),
        RequestContext(request_id="r", attempt_id="a", tenant="t"),
        MediaServices(cast("EncoderClient", encoder), None, kept),
        set(),
        Deadline.after(_WAIT_S),
    )
    await encoder.has_begun.wait()

    async with asyncio.timeout(_WAIT_S):
        await task.close()

    assert not task.has_source
    assert kept.num_used == 0
