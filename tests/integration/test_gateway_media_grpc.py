"""The media RPCs of ``ChatService``, and receipts of chats over gRPC and REST."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest
import pytest_asyncio

from chiasm.v1 import chat_pb2, chat_pb2_grpc, media_pb2
from tests.fakes.encoder_service import NUM_IMAGE_TOKENS
from tests.fakes.generator_service import Script
from tests.harness.gateway import Gateway, image_part, run_gateway
from tests.harness.media_api import MediaApi, keep_in_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from chiasm.v1.chat_pb2_grpc import ChatServiceAsyncStub
    from tests.fakes.redis_server import RedisServer

pytestmark = pytest.mark.integration

_CAT = chat_pb2.MediaPart(modality=media_pb2.MODALITY_IMAGE, data=b"cat", uuid="cat")


@pytest_asyncio.fixture
async def gateway(tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[Gateway]:
    async with run_gateway(tmp_path, ["--redis-url", redis_server.url]) as running:
        running.say("fi", "ne")
        keep_in_store(running, tmp_path, redis_server.url)
        yield running


@pytest_asyncio.fixture
async def stub(gateway: Gateway) -> AsyncIterator[ChatServiceAsyncStub]:
    async with grpc.aio.insecure_channel(gateway.grpc_address) as channel:
        stub: ChatServiceAsyncStub = chat_pb2_grpc.ChatServiceStub(channel)
        yield stub


async def test_an_object_lives_from_put_to_delete(stub: ChatServiceAsyncStub) -> None:
    estimate = await stub.EstimateMedia(chat_pb2.EstimateMediaRequest(media=_CAT))
    put = await stub.PutMedia(chat_pb2.PutMediaRequest(media=_CAT, ttl_s=60))
    got = await stub.GetMedia(chat_pb2.GetMediaRequest(uuid="cat"))
    listed = await stub.ListMedia(chat_pb2.ListMediaRequest())
    await stub.DeleteMedia(chat_pb2.DeleteMediaRequest(uuid="cat"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetMedia(chat_pb2.GetMediaRequest(uuid="cat"))

    assert (estimate.tokens, estimate.num_pixels, estimate.queue_units) == (NUM_IMAGE_TOKENS, 3, 6)
    assert put.usage.cache == media_pb2.CACHE_STATUS_MISS
    assert put.usage.encode_ms == 3000
    assert (put.media.uuid, put.media.num_bytes, put.media.ttl_s) == ("cat", 3, 60)
    (in_list,) = listed.media
    for told in (got.media, in_list):
        # Counted from the seconds left: the clock may pass a second between two calls.
        assert abs(told.expires_s - put.media.expires_s) <= 1
        told.expires_s = put.media.expires_s
        assert told == put.media
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_forgetting_the_tenant_tells_how_much_that_was(stub: ChatServiceAsyncStub) -> None:
    await stub.PutMedia(chat_pb2.PutMediaRequest(media=_CAT))

    first = await stub.ForgetTenant(chat_pb2.ForgetTenantRequest())
    second = await stub.ForgetTenant(chat_pb2.ForgetTenantRequest())

    assert (first.num_forgotten, second.num_forgotten) == (1, 0)


@pytest.mark.parametrize(
    "request_",
    [
        chat_pb2.PutMediaRequest(),
        chat_pb2.PutMediaRequest(media=chat_pb2.MediaPart(uuid="cat")),
        chat_pb2.PutMediaRequest(media=chat_pb2.MediaPart(data=b"cat")),
        chat_pb2.PutMediaRequest(media=_CAT, ttl_s=0),
        chat_pb2.PutMediaRequest(media=_CAT, cache_salt="a/b"),
        chat_pb2.PutMediaRequest(media=_CAT, model="m" * 513),
    ],
)
async def test_a_malformed_put_is_refused(
    gateway: Gateway, stub: ChatServiceAsyncStub, request_: chat_pb2.PutMediaRequest
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.PutMedia(request_)

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert gateway.encoder.headers == []


def conversation(*uuids: str) -> chat_pb2.ChatCompletionRequest:
    """Return a request with one picture per uuid."""
    parts = [
        chat_pb2.ContentPart(
            media=chat_pb2.MediaPart(
                modality=media_pb2.MODALITY_IMAGE, data=uuid.encode(), uuid=uuid
            )
        )
        for uuid in uuids
    ]
    message = chat_pb2.ChatMessage(role=chat_pb2.CHAT_ROLE_USER, content=parts)
    return chat_pb2.ChatCompletionRequest(messages=[message])


async def test_a_chat_tells_of_its_media_in_their_order_if_asked(
    stub: ChatServiceAsyncStub,
) -> None:
    await stub.PutMedia(chat_pb2.PutMediaRequest(media=_CAT))
    request = conversation("dog", "cat", "owl")
    silent = await stub.ChatCompletion(request)
    await stub.ForgetTenant(chat_pb2.ForgetTenantRequest())
    await stub.PutMedia(chat_pb2.PutMediaRequest(media=_CAT))
    request.include_media_usage = True
    answer = await stub.ChatCompletion(request)

    assert list(silent.usage.media) == []
    hit, miss = media_pb2.CACHE_STATUS_HIT, media_pb2.CACHE_STATUS_MISS
    assert [(one.uuid, one.cache, one.encode_ms) for one in answer.usage.media] == [
        ("dog", miss, 3000),
        ("cat", hit, 0),
        ("owl", miss, 3000),
    ]
    assert sum(one.tokens for one in answer.usage.media) == answer.usage.media_tokens


async def test_a_stream_ends_with_the_receipts_if_asked(stub: ChatServiceAsyncStub) -> None:
    chat = conversation("dog")
    chat.include_media_usage = True

    messages = [
        message
        async for message in stub.StreamChatCompletion(
            chat_pb2.StreamChatCompletionRequest(request=chat)
        )
    ]

    assert [one.uuid for one in messages[-1].usage.media] == ["dog"]
    assert not any(message.HasField("usage") for message in messages[:-1])


async def test_rest_tells_of_media_if_asked_and_else_not(gateway: Gateway) -> None:
    content = [image_part(b"dog", uuid="dog"), image_part(b"owl")]
    silent = (await gateway.ask(content)).json()["usage"]
    await MediaApi(gateway).forget()
    told = (await gateway.ask(content, include_media_usage=True)).json()["usage"]

    assert "media" not in silent
    assert told["media"] == [
        {
            "uuid": uuid,
            "modality": "image",
            "tokens": NUM_IMAGE_TOKENS,
            "cache": "miss",
            "fetch_ms": 250.0,
            "decode_ms": 500.0,
            "encode_ms": 3000.0,
        }
        for uuid in ("dog", None)
    ]


async def test_a_rest_stream_tells_of_media_in_its_last_chunk_alone(gateway: Gateway) -> None:
    await gateway.ask([image_part(b"dog")])
    reply = await gateway.ask(
        [image_part(b"dog")],
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        include_media_usage=True,
    )

    *chunks, last = reply.chunks()
    assert [one["cache"] for one in last["usage"]["media"]] == ["hit"]
    assert last["choices"] == []
    assert not any("media" in chunk["usage"] for chunk in chunks)


async def test_an_embedding_that_travels_inline_says_so(gateway: Gateway) -> None:
    gateway.encoder.keep = None
    gateway.encoder.is_inline = True

    usage = (await gateway.ask([image_part(b"owl")], include_media_usage=True)).json()["usage"]

    assert [one["cache"] for one in usage["media"]] == ["inline"]


async def test_a_hit_that_was_evicted_says_how_it_came_in_the_end(gateway: Gateway) -> None:
    await gateway.ask([image_part(b"owl")])
    (first,) = gateway.generator.starts[0].spans
    gateway.generator.scripts.append(Script(deltas=[[65]], needs=(first.ref.embedding_id,)))

    usage = (await gateway.ask([image_part(b"owl")], include_media_usage=True)).json()["usage"]

    assert [one["cache"] for one in usage["media"]] == ["inline"]


async def test_every_item_is_counted_by_how_it_came(gateway: Gateway) -> None:
    async def counts() -> dict[str, float]:
        text = (await gateway.get("/metrics")).body.decode()
        name = 'chiasm_gateway_media_items_total{cache="%s",modality="image"} '
        return {
            status: float((text.partition(name % status)[2] or "0").split()[0])
            for status in ("hit", "miss", "inline")
        }

    before = await counts()
    await gateway.ask([image_part(b"owl")])
    await gateway.ask([image_part(b"owl")])
    gateway.encoder.keep = None
    gateway.encoder.is_inline = True
    await gateway.ask([image_part(b"dog")])
    after = await counts()

    assert {status: after[status] - before[status] for status in after} == {
        "hit": 1.0,
        "miss": 1.0,
        "inline": 1.0,
    }
