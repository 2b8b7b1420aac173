"""The end of the work on the media of a request."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, cast

import pytest

from chiasm.common.media import CacheStatus, Modality, ProcessingOptions, RequestContext
from chiasm.gateway.budgets import ByteBudget
from chiasm.gateway.chat_request import BytesSource, MediaItem
from chiasm.gateway.deadline import Deadline
from chiasm.gateway.encoder_client import ItemPlanned, ItemReady
from chiasm.gateway.media_batch import MediaBatch
from chiasm.gateway.media_task import MediaServices
from tests.fakes.embeddings import make_layout, make_ref

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from chiasm.gateway.encoder_client import EncodeEvent, EncoderClient

_WAIT_S = 5.0
_REF = make_ref()


class _Encoder:
    """Encodes until it is cancelled, and then to the end if it is deaf."""

    def __init__(self, *, is_deaf: bool = False) -> None:
        self._is_deaf = is_deaf
        self.num_begun = 0
        self.num_ended = 0

    async def encode(self, *_: object, **__: object) -> AsyncGenerator[EncodeEvent, None]:
        self.num_begun += 1
        try:
            with suppress(*([asyncio.CancelledError] if self._is_deaf else [])):
                await asyncio.Event().wait()
            yield ItemPlanned(_REF, make_layout(_REF), CacheStatus.MISS)
            yield ItemReady(CacheStatus.MISS)
        finally:
            self.num_ended += 1


def _batch_of_three(encoder: _Encoder, kept: ByteBudget) -> MediaBatch:
    items = [
        MediaItem(Modality.IMAGE, index, "part", "", ProcessingOptions(), BytesSource(b"picture"))
        for index in range(3)
    ]
    context = RequestContext(request_id="r", attempt_id="a", tenant="t")
    services = MediaServices(cast("EncoderClient", encoder), None, kept)
    return MediaBatch(items, context, services, Deadline.after(_WAIT_S))


async def _turn(num_turns: int) -> None:
    for _ in range(num_turns):
        await asyncio.sleep(0)


async def test_work_whose_cancellation_is_lost_does_not_wait_for_the_sink() -> None:
    encoder, kept = _Encoder(is_deaf=True), ByteBudget(100)

    async with asyncio.timeout(_WAIT_S), _batch_of_three(encoder, kept):
        await _turn(9)

    assert (encoder.num_begun, encoder.num_ended, kept.num_used) == (3, 3, 0)


@pytest.mark.parametrize("num_turns", range(6))
async def test_leaving_that_is_cancelled_ends_the_work_all_the_same(num_turns: int) -> None:
    encoder, kept = _Encoder(), ByteBudget(100)

    async def use() -> None:
        async with _batch_of_three(encoder, kept):
            await _turn(9)
            is_left.set()

    is_left = asyncio.Event()
    leaving = asyncio.create_task(use())
    await is_left.wait()
    await _turn(num_turns)
    leaving.cancel()
    await asyncio.wait([leaving], timeout=_WAIT_S)
    await _turn(9)

    assert (encoder.num_begun, encoder.num_ended, kept.num_used) == (3, 3, 0)
