"""A gateway that is stopped: what runs may end in time, and is told if it does not."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING

import grpc
import pytest

from chiasm.common.errors import UnavailableError
from chiasm.common.grpc_client import error_from_rpc, open_channel
from chiasm.v1 import chat_pb2, chat_pb2_grpc
from tests.fakes.generator_service import Script
from tests.harness.gateway import MODEL, run_gateway

if TYPE_CHECKING:
    from pathlib import Path

    from tests.harness.gateway import Gateway

    StreamCall = grpc.aio.UnaryStreamCall[
        chat_pb2.StreamChatCompletionRequest, chat_pb2.StreamChatCompletionResponse
    ]

pytestmark = pytest.mark.integration

WAIT_S = 5.0


def stream_request() -> chat_pb2.StreamChatCompletionRequest:
    part = chat_pb2.ContentPart(text="x")
    message = chat_pb2.ChatMessage(role=chat_pb2.CHAT_ROLE_USER, content=[part])
    request = chat_pb2.ChatCompletionRequest(model=MODEL, messages=[message])
    return chat_pb2.StreamChatCompletionRequest(request=request)


async def read_all(call: StreamCall) -> None:
    while isinstance(await call.read(), chat_pb2.StreamChatCompletionResponse):
        pass


async def stop_after_start(gateway: Gateway) -> asyncio.Task[None]:
    await asyncio.wait_for(gateway.generator.started.wait(), WAIT_S)
    return asyncio.create_task(gateway.server.stop())


@pytest.mark.parametrize("is_stream", [False, True], ids=["plain", "stream"])
async def test_an_answer_that_outlasts_the_drain_ends_with_an_error(
    tmp_path: Path, is_stream: bool
) -> None:
    async with run_gateway(tmp_path, ["--drain-s", "0.3"]) as gateway:
        gateway.generator.script = Script(deltas=[[65]], hangs=True)
        asking = asyncio.create_task(gateway.ask("x", stream=is_stream))
        stopping = await stop_after_start(gateway)
        reply = await asyncio.wait_for(asking, WAIT_S)
        await stopping

    if is_stream:
        *_, error, done = reply.events()
        assert done == "[DONE]"
        assert json.loads(error)["error"]["code"] == "draining"
    else:
        assert (reply.status, reply.error["code"]) == (503, "draining")
        assert reply.headers["retry-after"] == "1"
    assert gateway.generator.cancelled.is_set()


async def test_an_answer_over_grpc_has_the_same_time_to_drain(tmp_path: Path) -> None:
    async with run_gateway(tmp_path, ["--drain-s", "1.5"]) as gateway:
        gateway.generator.script = Script(deltas=[[65]], hangs=True)
        channel = open_channel(gateway.grpc_address, None)
        stub: chat_pb2_grpc.ChatServiceAsyncStub = chat_pb2_grpc.ChatServiceStub(channel)
        call = stub.StreamChatCompletion(stream_request(), timeout=60.0)
        await call.read()
        start_s = time.monotonic()
        stopping = await stop_after_start(gateway)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(read_all(call), WAIT_S)
        assert time.monotonic() - start_s >= 1.4
        await stopping
        await channel.close()

    error = error_from_rpc(caught.value)
    assert isinstance(error, UnavailableError)
    assert error.reason == "DRAINING"


async def test_no_grpc_call_is_taken_while_draining(tmp_path: Path) -> None:
    async with run_gateway(tmp_path, ["--drain-s", "1"]) as gateway:
        gateway.generator.script = Script(deltas=[[65]], hangs=True)
        asking = asyncio.create_task(gateway.ask("x"))
        stopping = await stop_after_start(gateway)
        await asyncio.sleep(0.3)
        async with open_channel(gateway.grpc_address, None) as channel:
            stub: chat_pb2_grpc.ChatServiceAsyncStub = chat_pb2_grpc.ChatServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ListModels(chat_pb2.ListModelsRequest(), timeout=WAIT_S)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not asking.done()
        await stopping
        await asking
