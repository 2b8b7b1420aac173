"""A call that its peer ended early tells the peer's status, however much was being sent."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from chiasm.common.errors import OverloadedError
from chiasm.common.grpc_client import error_from_rpc, open_channel
from chiasm.common.grpc_stream import finish_sending, send
from chiasm.v1 import encoder_pb2, encoder_pb2_grpc, media_pb2
from tests.fakes.encoder_service import FakeEncoder, start_encoder

TOKEN = "t" * 40
NUM_CALLS = 20


async def feed(call: grpc.aio.StreamStreamCall) -> bool:  # type: ignore[type-arg]  # any messages
    header = encoder_pb2.EncodeHeader(url="x", modality=media_pb2.MODALITY_IMAGE)
    await send(call, encoder_pb2.EncodeRequest(header=header))
    for _ in range(8):
        if not await send(call, encoder_pb2.EncodeRequest(chunk=bytes(100_000))):
            return False
    await finish_sending(call)
    return True


async def test_the_status_of_a_peer_that_refuses_during_an_upload_is_kept() -> None:
    encoder = FakeEncoder(5)
    server, port = await start_encoder(encoder, TOKEN)
    async with open_channel(f"127.0.0.1:{port}", TOKEN) as channel:
        stub = encoder_pb2_grpc.EncoderServiceStub(channel)
        for _ in range(NUM_CALLS):
            encoder.refusals.append(OverloadedError("Full."))
            call = stub.Encode(timeout=5)
            feeder = asyncio.create_task(feed(call))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await anext(aiter(call))
            assert isinstance(error_from_rpc(caught.value), OverloadedError)
            await feeder
    await server.stop(0)


async def test_what_was_sent_arrives() -> None:
    encoder = FakeEncoder(5)
    server, port = await start_encoder(encoder, TOKEN)
    async with open_channel(f"127.0.0.1:{port}", TOKEN) as channel:
        call = encoder_pb2_grpc.EncoderServiceStub(channel).Encode(timeout=5)
        assert await feed(call)
        kinds = [response.WhichOneof("message") async for response in call]
    await server.stop(0)
    assert kinds == ["planned", "ready"]
    assert encoder.sources == [bytes(800_000)]


async def test_sending_after_the_end_says_so() -> None:
    encoder = FakeEncoder(5)
    server, port = await start_encoder(encoder, TOKEN)
    async with open_channel(f"127.0.0.1:{port}", TOKEN) as channel:
        call = encoder_pb2_grpc.EncoderServiceStub(channel).Encode(timeout=5)
        await feed(call)
        assert [response async for response in call]
        assert not await send(call, encoder_pb2.EncodeRequest(chunk=b"late"))
        await finish_sending(call)
    await server.stop(0)
