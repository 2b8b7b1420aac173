"""Real clients: the openai package over REST, a stub over gRPC; keys and tenants for both."""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Any

import grpc
import openai
import pytest
import pytest_asyncio

from chiasm.common.errors import (
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnauthenticatedError,
)
from chiasm.common.grpc_client import error_from_rpc, open_channel
from chiasm.v1 import chat_pb2, chat_pb2_grpc, generator_pb2, media_pb2
from tests.fakes.encoder_service import NUM_IMAGE_TOKENS
from tests.fakes.generator_service import Script
from tests.harness.gateway import MODEL, image_part, run_gateway

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.harness.gateway import Gateway

pytestmark = pytest.mark.integration

WAIT_S = 5.0


@pytest_asyncio.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    keys = tmp_path / "keys"
    keys.write_text("# tenants\nacme acme-key\n", encoding="utf-8")
    flags = ["--api-key", "key-1,key-2", "--api-keys-file", str(keys)]
    async with run_gateway(tmp_path, flags) as running:
        running.say("A red", " circle.")
        yield running


@pytest_asyncio.fixture
async def client(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    base_url = f"{gateway.url}/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key="key-1", max_retries=0) as running:
        yield running


@pytest_asyncio.fixture
async def stub(gateway: Gateway) -> AsyncIterator[chat_pb2_grpc.ChatServiceAsyncStub]:
    async with open_channel(gateway.grpc_address, None) as channel:
        yield chat_pb2_grpc.ChatServiceStub(channel)


def message(*parts: str | dict[str, Any]) -> list[Any]:
    content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
    return [{"role": "user", "content": content}]


async def test_openai_gets_a_plain_answer_about_a_picture(
    gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=message(image_part(b"pixels"), "What?"), temperature=0, max_tokens=9
    )

    assert answer.choices[0].message.content == "A red circle."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(gateway.generator.starts[0].token_ids)
    sampling = gateway.generator.starts[0].sampling
    assert (sampling.max_tokens, sampling.temperature) == (9, 0.0)


async def test_openai_gets_a_stream_with_usage(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=message("What?"),
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]

    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "A red circle."
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0


async def test_openai_lists_models(client: openai.AsyncOpenAI) -> None:
    models = [model.id async for model in client.models.list()]
    assert models == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL


async def test_openai_maps_every_error_to_its_class(
    gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    async def ask(**fields: Any) -> None:
        await client.chat.completions.create(**{"model": MODEL, "messages": message("x"), **fields})

    with pytest.raises(openai.BadRequestError) as refused:
        await ask(temperature=-1)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as unknown:
        await ask(model="other")
    assert unknown.value.code == "model_not_found"
    gateway.encoder.errors[b"a"] = ConflictError("Bound to other content.")
    with pytest.raises(openai.ConflictError) as conflict:
        await ask(messages=message(image_part(b"a")))
    assert conflict.value.response.headers["x-should-retry"] == "false"
    gateway.generator.script = Script(error=OverloadedError("Full."))
    with pytest.raises(openai.InternalServerError) as full:
        await ask()
    assert full.value.status_code == 503
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="wrong").models.list()


async def test_openai_raises_when_a_stream_breaks(
    gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    gateway.generator.script = Script(deltas=[[65]], error=OverloadedError("Full."))

    stream = await client.chat.completions.create(model=MODEL, messages=message("x"), stream=True)
    with pytest.raises(openai.APIError, match=r"Full\."):
        async for _ in stream:
            pass


KEYS = [(None, 401), ("Bearer wrong", 401), ("Basic key-1", 401), ("bearer key-2", 200)]


@pytest.mark.parametrize(("authorization", "status"), KEYS)
async def test_a_key_opens_every_v1_route(
    gateway: Gateway, authorization: str | None, status: int
) -> None:
    headers = {"authorization": authorization} if authorization else {}

    models = await gateway.get("/v1/models", headers)
    chat = await gateway.post({"messages": message("x")}, headers)

    assert (models.status, chat.status) == (status, status)
    assert (await gateway.get("/health")).status == 200


@pytest.mark.parametrize(("key", "tenant"), [("key-1", "default"), ("acme-key", "acme")])
async def test_a_key_tells_the_tenant(gateway: Gateway, key: str, tenant: str) -> None:
    await gateway.post({"messages": message("x")}, {"authorization": f"Bearer {key}"})
    assert gateway.generator.starts[0].context.tenant == tenant


def grpc_request(*parts: chat_pb2.ContentPart, **fields: Any) -> chat_pb2.ChatCompletionRequest:
    user = chat_pb2.ChatMessage(role=chat_pb2.CHAT_ROLE_USER, content=parts)
    return chat_pb2.ChatCompletionRequest(messages=[user], **fields)


def text_part(text: str) -> chat_pb2.ContentPart:
    return chat_pb2.ContentPart(text=text)


def bytes_part(data: bytes) -> chat_pb2.ContentPart:
    media = chat_pb2.MediaPart(modality=media_pb2.MODALITY_IMAGE, data=data)
    return chat_pb2.ContentPart(media=media)


METADATA = (("authorization", "Bearer key-1"),)


async def test_grpc_gets_the_same_answer_as_rest(
    gateway: Gateway, stub: chat_pb2_grpc.ChatServiceAsyncStub
) -> None:
    request = grpc_request(bytes_part(b"pixels"), text_part("What?"), request_id="call-1")

    answer = await stub.ChatCompletion(request, timeout=WAIT_S, metadata=METADATA)
    await gateway.post(
        {"messages": message(image_part(b"pixels"), "What?")}, {"authorization": "Bearer key-1"}
    )

    assert (answer.text, answer.request_id, answer.model) == ("A red circle.", "call-1", MODEL)
    assert answer.finish_reason == generator_pb2.FINISH_REASON_STOP
    assert answer.usage.media_tokens == NUM_IMAGE_TOKENS
    over_grpc, over_rest = gateway.generator.starts
    assert over_grpc.token_ids == over_rest.token_ids
    assert over_grpc.sampling == over_rest.sampling


async def test_grpc_takes_data_urls(
    gateway: Gateway, stub: chat_pb2_grpc.ChatServiceAsyncStub
) -> None:
    url = f"data:image/png;base64,{base64.b64encode(b'pixels').decode()}"
    media = chat_pb2.MediaPart(modality=media_pb2.MODALITY_IMAGE, url=url)
    request = grpc_request(chat_pb2.ContentPart(media=media))

    await stub.ChatCompletion(request, timeout=WAIT_S, metadata=METADATA)

    assert gateway.encoder.sources == [b"pixels"]


async def test_grpc_streams_deltas_and_the_usage(
    stub: chat_pb2_grpc.ChatServiceAsyncStub,
) -> None:
    request = chat_pb2.StreamChatCompletionRequest(
        request=grpc_request(text_part("x")), include_usage=True
    )
    *deltas, usage = [
        response
        async for response in stub.StreamChatCompletion(request, timeout=WAIT_S, metadata=METADATA)
    ]

    assert "".join(delta.text for delta in deltas) == "A red circle."
    assert deltas[-1].finish_reason == generator_pb2.FINISH_REASON_STOP
    assert usage.usage.completion_tokens == sum(len(delta.token_ids) for delta in deltas)


async def test_grpc_lists_models(stub: chat_pb2_grpc.ChatServiceAsyncStub) -> None:
    response = await stub.ListModels(
        chat_pb2.ListModelsRequest(), timeout=WAIT_S, metadata=METADATA
    )
    (model,) = response.models
    assert (model.name, list(model.modalities)) == (MODEL, [media_pb2.MODALITY_IMAGE])


@pytest.mark.parametrize(
    ("request_", "metadata", "kind"),
    [
        (grpc_request(), METADATA, InvalidRequestError),
        (grpc_request(text_part("x"), model="other"), METADATA, NotFoundError),
        (grpc_request(text_part("x"), stop=[""]), METADATA, InvalidRequestError),
        (grpc_request(bytes_part(b"")), METADATA, InvalidRequestError),
        (grpc_request(text_part("x")), (), UnauthenticatedError),
    ],
    ids=["no part", "model", "stop", "no bytes", "no key"],
)
async def test_grpc_tells_errors_by_status_and_details(
    stub: chat_pb2_grpc.ChatServiceAsyncStub,
    request_: chat_pb2.ChatCompletionRequest,
    metadata: tuple[tuple[str, str], ...],
    kind: type[Exception],
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ChatCompletion(request_, timeout=WAIT_S, metadata=metadata)
    assert type(error_from_rpc(caught.value)) is kind


async def test_a_cancelled_grpc_call_cancels_its_generation(
    gateway: Gateway, stub: chat_pb2_grpc.ChatServiceAsyncStub
) -> None:
    gateway.generator.script = Script(deltas=[[65]], hangs=True)
    call = stub.StreamChatCompletion(
        chat_pb2.StreamChatCompletionRequest(request=grpc_request(text_part("x"))),
        timeout=WAIT_S,
        metadata=METADATA,
    )
    await asyncio.wait_for(gateway.generator.started.wait(), WAIT_S)

    call.cancel()

    assert await asyncio.wait_for(gateway.generator.cancelled.wait(), WAIT_S)
