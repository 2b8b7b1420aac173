"""What answers cost: cached and counted tokens, where stop strings end them, in metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from prometheus_client import REGISTRY

from tests.fakes.generator_service import Script
from tests.harness.gateway import MODEL, run_gateway

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.harness.gateway import Gateway

pytestmark = pytest.mark.integration


@pytest_asyncio.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with run_gateway(tmp_path) as running:
        yield running


async def test_cached_tokens_are_told_from_the_first_token_and_at_a_stop_string(
    gateway: Gateway,
) -> None:
    deltas = [gateway.tokenizer.encode(text) for text in ("go", " on ", "STOP")]
    gateway.say(script=Script(deltas=deltas, num_cached_tokens=(3,), hangs=True))
    options = {"include_usage": True, "continuous_usage_stats": True}

    plain = await gateway.ask("x", stop="STOP")
    stream = await gateway.ask("x", stop="STOP", stream=True, stream_options=options)

    usages = [plain.json()["usage"], *(chunk["usage"] for chunk in stream.chunks())]
    assert {usage["prompt_tokens_details"]["cached_tokens"] for usage in usages} == {3}


async def test_cached_tokens_of_several_answers_are_those_of_the_first(gateway: Gateway) -> None:
    deltas = [gateway.tokenizer.encode(text) for text in ("a", "STOP", "b", "STOP")]
    script = Script(deltas=deltas, indices=(0, 0, 1, 1), num_cached_tokens=(3, 9), hangs=True)
    gateway.say(script=script)

    answer = (await gateway.ask("x", n=2, stop="STOP")).json()

    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 3


@pytest.mark.parametrize("is_stream", [False, True], ids=["plain", "stream"])
async def test_what_a_stopped_answer_costs_does_not_depend_on_how_its_tokens_come(
    gateway: Gateway, is_stream: bool
) -> None:
    tokens = gateway.tokenizer.encode("go STOP on and on")
    num_tokens = len(gateway.tokenizer.encode("go STOP"))
    options = {"stream_options": {"include_usage": True}} if is_stream else {}
    for deltas in ([[token] for token in tokens], [tokens]):
        gateway.say(script=Script(deltas=deltas, hangs=True))

        reply = await gateway.ask("x", stop="STOP", logprobs=True, stream=is_stream, **options)

        messages = reply.chunks() if is_stream else [reply.json()]
        choices = [choice for message in messages for choice in message["choices"]]
        told = [choice["logprobs"]["content"] for choice in choices if choice["logprobs"]]
        assert messages[-1]["usage"]["completion_tokens"] == num_tokens
        assert sum(map(len, told)) == num_tokens


async def test_metrics_tell_the_longest_of_several_answers(gateway: Gateway) -> None:
    name = "vllm:request_max_num_generation_tokens_sum"
    before = REGISTRY.get_sample_value(name, {"model_name": MODEL}) or 0.0
    tokens = gateway.tokenizer.encode("abc")
    gateway.say(script=Script(deltas=[tokens, tokens[:1], tokens], indices=(0, 1, 1)))

    await gateway.ask("What?", n=2)

    after = REGISTRY.get_sample_value(name, {"model_name": MODEL}) or 0.0
    assert after - before == len(tokens) + 1
