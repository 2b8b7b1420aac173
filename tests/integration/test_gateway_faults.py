"""Late, lost and dead: what the gateway does when its peers do not do as planned."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from chiasm.common.errors import InvalidRequestError, OverloadedError, UnavailableError
from chiasm.v1 import encoder_pb2
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
    async with run_gateway(tmp_path) as running:
        running.say("fine")
        yield running


def chat(content: object, **fields: object) -> bytes:
    messages = [{"role": "user", "content": content}]
    return json.dumps({"model": MODEL, "messages": messages, **fields}).encode()


async def test_the_generator_starts_before_the_embedding_is_ready(gateway: Gateway) -> None:
    gateway.encoder.ready.clear()
    asking = asyncio.create_task(gateway.ask([image_part(b"a")]))

    await asyncio.wait_for(gateway.generator.started.wait(), WAIT_S)
    assert not gateway.generator.starts[0].spans[0].is_ready
    gateway.encoder.ready.set()

    assert (await asking).status == 200
    assert gateway.generator.ready_ids == [gateway.encoder.ref(b"a").embedding_id]


async def test_an_embedding_that_the_store_cannot_take_travels_inline_once(
    gateway: Gateway,
) -> None:
    gateway.encoder.is_inline = True

    reply = await gateway.ask([image_part(b"same"), image_part(b"same"), image_part(b"other")])

    assert reply.status == 200
    expected = {gateway.encoder.ref(data).embedding_id for data in (b"same", b"other")}
    assert set(gateway.generator.chunk_ids) == expected
    assert len(gateway.generator.chunk_ids) == 2


async def test_an_embedding_that_was_lost_is_encoded_again_and_sent_inline(
    gateway: Gateway,
) -> None:
    lost = gateway.encoder.ref(b"a").embedding_id
    gateway.generator.scripts.append(Script(deltas=[[65]], needs=(lost,)))

    reply = await gateway.ask([image_part(b"a")])

    assert reply.status == 200
    deliveries = [header.delivery for header in gateway.encoder.headers]
    assert deliveries == [encoder_pb2.DELIVERY_STORE, encoder_pb2.DELIVERY_INLINE]
    assert gateway.encoder.sources == [b"a", b"a"]
    assert gateway.generator.chunk_ids == [lost]


async def test_an_embedding_lost_twice_ends_the_request(gateway: Gateway) -> None:
    lost = gateway.encoder.ref(b"a").embedding_id
    gateway.generator.scripts.append(Script(deltas=[[65]], needs=(lost, lost)))

    reply = await gateway.ask([image_part(b"a")])

    assert reply.status == 503
    assert reply.headers["retry-after"] == "1"
    assert reply.error["code"] == "embedding_expired"
    assert reply.error["param"] == "messages[0].content[0]"


async def test_a_source_that_was_not_kept_cannot_be_encoded_again(tmp_path: Path) -> None:
    async with run_gateway(tmp_path, ["--max-kept-source-bytes", "0"]) as gateway:
        lost = gateway.encoder.ref(b"a").embedding_id
        gateway.generator.scripts.append(Script(deltas=[[65]], needs=(lost,)))

        reply = await gateway.ask([image_part(b"a")])

    assert reply.status == 503
    assert reply.error["message"] == "The embedding was evicted; please try again."


async def test_a_failure_after_the_plan_ends_the_request_with_its_own_error(
    gateway: Gateway,
) -> None:
    error = InvalidRequestError("Failed to load image: truncated.", reason="INVALID_MEDIA")
    gateway.encoder.late_errors[b"bad"] = error
    gateway.encoder.ready.clear()
    asking = asyncio.create_task(gateway.ask(["see", image_part(b"bad")]))
    await asyncio.wait_for(gateway.generator.started.wait(), WAIT_S)
    gateway.encoder.ready.set()

    reply = await asking

    assert reply.status == 400
    assert reply.error["message"] == error.message
    assert reply.error["param"] == "messages[0].content[1]"
    (failure,) = gateway.generator.failures
    assert failure.reason == "INVALID_MEDIA"


async def test_an_encoder_that_fails_late_leaves_the_generator_in_use(gateway: Gateway) -> None:
    gateway.encoder.late_errors[b"a"] = UnavailableError("The encoder is gone.")

    assert (await gateway.ask([image_part(b"a")])).status == 503
    assert len(gateway.generator.starts) == 1
    assert (await gateway.ask("only text")).status == 200


@pytest.mark.parametrize("is_stream", [False, True], ids=["plain", "stream"])
async def test_a_client_that_leaves_cancels_its_generation(
    gateway: Gateway, is_stream: bool
) -> None:
    gateway.generator.script = Script(deltas=[[65]], hangs=True)
    asking = asyncio.create_task(gateway.ask("go on", stream=is_stream))
    await asyncio.wait_for(gateway.generator.started.wait(), WAIT_S)

    asking.cancel()

    assert await asyncio.wait_for(gateway.generator.cancelled.wait(), WAIT_S)


async def test_the_first_failure_cancels_the_other_items(gateway: Gateway) -> None:
    gateway.encoder.ready.clear()
    gateway.encoder.errors[b"bad"] = InvalidRequestError("broken")

    reply = await gateway.ask([image_part(b"good"), image_part(b"bad")])

    assert reply.status == 400
    await asyncio.wait_for(gateway.encoder.cancelled.wait(), WAIT_S)


async def test_a_generator_that_dies_ends_the_stream_with_an_error_event(
    gateway: Gateway,
) -> None:
    gateway.generator.script = Script(deltas=[[65], [66]], hangs=True)
    url = f"{gateway.url}/v1/chat/completions"
    headers = {"content-type": "application/json"}
    async with gateway.http.post(url, data=chat("x", stream=True), headers=headers) as response:
        first = await response.content.readuntil(b"\n\n")
        assert b'"role":"assistant"' in first
        await gateway.generator_server.stop(0)
        rest = (await response.content.read()).decode()

    *_, error, done, end = rest.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert json.loads(error.removeprefix("data: "))["error"]["type"] == "ServiceUnavailableError"


async def test_an_error_of_the_generator_before_the_first_token_is_a_status(
    gateway: Gateway,
) -> None:
    gateway.generator.script = Script(error=OverloadedError("Full.", retry_after_s=2.5))

    for is_stream in (False, True):
        reply = await gateway.ask("x", stream=is_stream)
        assert reply.status == 503
        assert reply.headers["retry-after"] == "3"
        assert reply.error["code"] == "overloaded"


async def test_a_generator_that_breaks_off_without_finishing_is_an_error(
    gateway: Gateway,
) -> None:
    gateway.generator.script = Script(deltas=[[65]], breaks_off=True)

    reply = await gateway.ask("x", stream=True)

    *_, error, done = reply.events()
    assert done == "[DONE]"
    assert json.loads(error)["error"]["message"] == "The generator broke off."


async def test_a_generator_that_refuses_at_once_is_asked_again(gateway: Gateway) -> None:
    gateway.generator.refusals.append(UnavailableError("Draining.", reason="DRAINING"))

    assert (await gateway.ask("x")).status == 200


async def test_an_encoder_that_refuses_at_once_is_asked_again(gateway: Gateway) -> None:
    gateway.encoder.refusals.append(UnavailableError("Draining.", reason="DRAINING"))

    assert (await gateway.ask([image_part(b"a")])).status == 200


async def test_text_goes_on_without_an_encoder_and_images_are_refused(gateway: Gateway) -> None:
    await gateway.encoder_server.stop(0)

    reply = await gateway.ask([image_part(b"a")])

    assert reply.status == 503
    assert reply.headers["retry-after"] == "1"
    assert (await gateway.ask("only text")).status == 200
    ready = await gateway.get("/ready")
    assert (ready.status, ready.json()["missing"]) == (503, ["encoder"])
    assert (await gateway.get("/health")).status == 200


@pytest.mark.parametrize("is_stream", [False, True], ids=["plain", "stream"])
async def test_the_client_s_read_timeout_bounds_the_wait(gateway: Gateway, is_stream: bool) -> None:
    gateway.generator.script = Script(hangs=True)
    headers = {"x-stainless-read-timeout": "0.2", "content-type": "application/json"}
    url = f"{gateway.url}/v1/chat/completions"

    async with gateway.http.post(
        url, data=chat("x", stream=is_stream), headers=headers
    ) as response:
        assert response.status == 504
        assert (await response.json())["error"]["code"] == "deadline_exceeded"


async def test_the_request_timeout_ends_a_stream_with_an_error_event(tmp_path: Path) -> None:
    async with run_gateway(tmp_path, ["--request-timeout-s", "0.5"]) as gateway:
        gateway.generator.script = Script(deltas=[[65]], hangs=True)
        reply = await gateway.ask("x", stream=True)

    *_, error, done = reply.events()
    assert done == "[DONE]"
    assert json.loads(error)["error"]["code"] == "deadline_exceeded"


async def test_an_encoder_that_never_plans_is_a_timeout(tmp_path: Path) -> None:
    async with run_gateway(tmp_path, ["--request-timeout-s", "0.5"]) as gateway:
        gateway.encoder.planned.clear()
        reply = await gateway.ask([image_part(b"a")])

    assert reply.status == 504
