"""Items over several encoders: spread, and encoded by another one when theirs dies."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from chiasm.common.errors import UnavailableError
from chiasm.common.grpc_client import EndpointPool
from chiasm.common.media import Modality, ProcessingOptions, RequestContext
from chiasm.gateway.budgets import RetryBudget
from chiasm.gateway.chat_request import BytesSource, MediaItem
from chiasm.gateway.deadline import Deadline
from chiasm.gateway.encoder_client import EncoderClient, ItemChunk, ItemPlanned, ItemReady
from tests.fakes.encoder_service import FakeEncoder, start_encoder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from chiasm.gateway.encoder_client import EncodeEvent

WAIT_S = 10.0
PLACEHOLDER_ID = 7
DIED = UnavailableError("It died.")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two encoders and the gateway's client of both."""

    encoders: tuple[FakeEncoder, FakeEncoder]
    client: EncoderClient

    async def encode(self, data: bytes, *, inline: bool = False) -> list[EncodeEvent]:
        """Have one picture encoded and return the events."""
        item = MediaItem(Modality.IMAGE, 0, "part", "", ProcessingOptions(), BytesSource(data))
        context = RequestContext(request_id="r", attempt_id="a", tenant="t", model="m")
        events = self.client.encode(item, context, Deadline.after(WAIT_S), inline=inline)
        return [event async for event in events]

    def sources(self) -> list[list[bytes]]:
        """Return what each encoder was sent."""
        return [encoder.sources for encoder in self.encoders]


@pytest_asyncio.fixture
async def pair() -> AsyncIterator[Pair]:
    encoders = FakeEncoder(PLACEHOLDER_ID), FakeEncoder(PLACEHOLDER_ID)
    started = [await start_encoder(encoder, "token") for encoder in encoders]
    pool = EndpointPool(",".join(f"127.0.0.1:{port}" for _, port in started), "token")
    await pool.start()
    async with asyncio.timeout(WAIT_S):
        while len(pool.serving_addresses) < len(encoders):
            await pool.wait_for_change()
    yield Pair(encoders, EncoderClient(pool, RetryBudget()))
    await pool.close()
    for server, _ in started:
        await server.stop(0)


async def test_items_that_are_encoded_at_one_time_are_spread(pair: Pair) -> None:
    for encoder in pair.encoders:
        encoder.ready.clear()
    calls = [asyncio.create_task(pair.encode(bytes([n]))) for n in range(4)]

    async with asyncio.timeout(WAIT_S):
        # No event says it: the fakes set one for all calls.
        while sum(map(len, pair.sources())) < len(calls):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    shares = [len(sources) for sources in pair.sources()]
    for encoder in pair.encoders:
        encoder.ready.set()
    await asyncio.gather(*calls)

    assert shares == [2, 2]


async def test_an_item_is_encoded_by_another_if_its_encoder_dies_after_the_plan(
    pair: Pair,
) -> None:
    # In turn, so that at least one of the two items goes to this encoder first.
    pair.encoders[0].late_errors = dict.fromkeys((b"a", b"b"), DIED)

    kinds = [[type(event) for event in await pair.encode(data)] for data in (b"a", b"b")]

    assert kinds == [[ItemPlanned, ItemReady]] * 2
    assert pair.encoders[0].sources
    assert pair.encoders[1].sources == [b"a", b"b"]


async def test_an_item_that_another_encoder_plans_otherwise_is_refused(pair: Pair) -> None:
    for encoder in pair.encoders:
        encoder.late_errors[b"a"] = DIED
    pair.encoders[1].id_of[b"a"] = b"x" * 32

    with pytest.raises(UnavailableError, match="The encoders disagree about the item"):
        await pair.encode(b"a")


async def test_an_embedding_of_which_a_part_was_passed_on_is_not_encoded_again(
    pair: Pair,
) -> None:
    for encoder in pair.encoders:
        encoder.last_errors[b"a"] = DIED
    events: list[EncodeEvent] = []

    with pytest.raises(UnavailableError, match="It died"):
        events += await pair.encode(b"a", inline=True)

    assert sum(len(sources) for sources in pair.sources()) == 1


async def test_an_inline_embedding_comes_after_its_plan(pair: Pair) -> None:
    kinds = [type(event) for event in await pair.encode(b"a", inline=True)]

    assert kinds == [ItemPlanned, ItemChunk, ItemReady]
