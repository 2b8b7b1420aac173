"""The gateway's sessions: shared, broken, opened again, left by many, read slowly by one."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import torch

from chiasm.common.errors import (
    ChiasmError,
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    TooLargeError,
    UnavailableError,
)
from chiasm.common.grpc_client import EndpointPool
from chiasm.common.limits import Limits
from chiasm.common.media import (
    DataType,
    EmbeddingRef,
    MediaLayout,
    MediaSpan,
    Modality,
    RequestContext,
    TensorRole,
    TensorSpec,
    TokenRun,
)
from chiasm.common.sampling import SamplingWishes
from chiasm.gateway.budgets import RetryBudget
from chiasm.gateway.deadline import Deadline
from chiasm.gateway.generator_client import GenerateStart, GeneratorClient, TokensAdded
from chiasm.gateway.session_pool import SessionPool
from chiasm.generator.admission import Admission
from chiasm.generator.embedding_loader import EmbeddingLoader
from chiasm.generator.engine.async_engine import AsyncEngine
from chiasm.generator.engine.queue_budget import QueueBudget, QueueLimits
from chiasm.generator.generation import GenerationService
from chiasm.generator.guides import Guides
from chiasm.generator.info import GeneratorInfo
from chiasm.generator.servicer import GeneratorServicer
from chiasm.v1 import media_pb2
from tests.fakes.generator_engine import BYTE_SPEC, EngineParts, expected_tokens
from tests.fakes.generator_service import FakeGenerator, Script, start_generator

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from chiasm.common.grpc_server import GrpcServer
    from chiasm.gateway.generator_client import GenerateCall

pytestmark = pytest.mark.integration

TOKEN = "t" * 32
WAIT_S = 5.0
PROMPT = [1, 2, 3]


class _NoThreads:
    def rest(self) -> None:
        """Do nothing."""


class _Generator:
    """The real servicer over the fake model."""

    def __init__(self) -> None:
        self.parts = EngineParts(num_blocks=1000, max_running=64)
        self.budget = QueueBudget(QueueLimits(1000, 100_000, 1 << 20))
        self.engine = AsyncEngine(self.parts.engine, self.budget, _NoThreads())
        self.service = GenerationService(
            Admission(BYTE_SPEC, "tiny", 500, Limits()),
            self.engine,
            EmbeddingLoader(None, torch.float32, 1 << 20),
            Guides(None),
            span_wait_s=WAIT_S,
        )
        info = GeneratorInfo("tiny", 500, 256, 1, 4, 1000, 0, (0,), "0")
        self.servicer = GeneratorServicer(self.service, lambda: info)

    async def until_free(self) -> None:
        async with asyncio.timeout(WAIT_S):
            while self.parts.engine.num_sequences or self.engine.num_sequences:
                await asyncio.to_thread(lambda: None)
        assert self.parts.blocks.num_used_blocks == 0


@asynccontextmanager
async def run_client(*ports: int) -> AsyncIterator[tuple[GeneratorClient, EndpointPool]]:
    pool = EndpointPool(",".join(f"127.0.0.1:{port}" for port in ports), TOKEN, peer="generator")
    client = GeneratorClient(pool, RetryBudget())
    await client.start()
    try:
        await pool.wait_until_serving(WAIT_S)
        yield client, pool
    finally:
        await client.close()


@pytest.fixture
async def fake() -> AsyncIterator[tuple[FakeGenerator, int, GrpcServer]]:
    generator = FakeGenerator()
    generator.script = Script(deltas=[[7], [8]])
    server, port = await start_generator(generator, TOKEN)
    yield generator, port, server
    await server.stop(0)


@pytest.fixture
async def real() -> AsyncIterator[tuple[_Generator, int]]:
    generator = _Generator()
    generator.engine.start()
    server, port = await start_generator(generator.servicer, TOKEN)
    yield generator, port
    await server.stop(0)
    await generator.engine.stop()


def start(client: GeneratorClient, *, max_tokens: int = 10, timeout_s: float = 60) -> GenerateCall:
    prompt = GenerateStart(
        context=RequestContext("request", "attempt", "tenant"),
        token_ids=PROMPT,
        spans=(),
        sampling=SamplingWishes(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
    )
    return client.generate(prompt, Deadline(time.monotonic() + timeout_s))


async def read(call: GenerateCall) -> list[int]:
    tokens: list[int] = []
    async for event in call:
        if isinstance(event, TokensAdded):
            tokens.extend(event.token_ids)
    return tokens


async def ask(client: GeneratorClient, *, max_tokens: int = 10) -> list[int]:
    async with start(client, max_tokens=max_tokens) as call:
        return await read(call)


async def test_many_requests_share_one_session(
    fake: tuple[FakeGenerator, int, GrpcServer],
) -> None:
    generator, port, _ = fake
    async with run_client(port) as (client, _):
        answers = await asyncio.gather(*(ask(client) for _ in range(50)))

    assert answers == [[7, 8]] * 50
    assert generator.num_sessions == 1


@pytest.mark.parametrize(
    "error",
    [
        OverloadedError("Full.", retry_after_s=2.5),
        InvalidRequestError("No.", reason="PROMPT_TOO_LONG", param="input_tokens"),
        ChiasmError("A bug."),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_error_of_one_request_comes_as_it_was_raised(
    fake: tuple[FakeGenerator, int, GrpcServer], error: ChiasmError
) -> None:
    generator, port, _ = fake
    generator.scripts.append(Script(deltas=[[1]], error=error))
    async with run_client(port) as (client, _):
        with pytest.raises(type(error)) as failed:
            await ask(client)
        assert await ask(client) == [7, 8]

    shown = failed.value
    assert (shown.message, shown.reason, shown.param, shown.retry_after_s) == (
        *(error.message, error.reason, error.param, error.retry_after_s),
    )
    assert generator.num_sessions == 1


async def test_broken_session_fails_what_has_begun_and_the_next_request_opens_another(
    fake: tuple[FakeGenerator, int, GrpcServer],
) -> None:
    generator, port, _ = fake
    generator.scripts.extend([Script(deltas=[[1]], hangs=True), Script(breaks_off=True)])
    async with run_client(port) as (client, pool):
        async with start(client) as call:
            assert await anext(call) == TokensAdded((1,))
            for broken in (ask(client), read(call)):
                with pytest.raises(UnavailableError, match="broke off"):
                    await broken
        await pool.wait_until_serving(WAIT_S)
        assert await ask(client) == [7, 8]

    assert generator.num_sessions == 2


async def test_session_that_is_refused_is_opened_again_for_the_same_request(
    fake: tuple[FakeGenerator, int, GrpcServer],
) -> None:
    generator, port, _ = fake
    generator.session_errors.append(UnavailableError("Not yet."))
    async with run_client(port) as (client, _):
        assert await ask(client) == [7, 8]

    assert generator.num_sessions == 2


async def test_endpoint_whose_session_broke_is_passed_over(
    fake: tuple[FakeGenerator, int, GrpcServer],
) -> None:
    _, port, server = fake
    other = FakeGenerator()
    other.script = Script(deltas=[[5]])
    other_server, other_port = await start_generator(other, TOKEN)
    async with run_client(port, other_port) as (client, pool):
        async with asyncio.timeout(WAIT_S):
            while len(pool.serving_addresses) < 2:
                await pool.wait_for_change()
        await server.stop(0)
        assert [await ask(client) for _ in range(4)] == [[5]] * 4
        assert pool.serving_addresses == (f"127.0.0.1:{other_port}",)
    await other_server.stop(0)


async def test_sessions_that_break_at_once_are_not_opened_without_end(
    fake: tuple[FakeGenerator, int, GrpcServer],
) -> None:
    generator, port, _ = fake
    generator.session_errors.extend([OverloadedError("No session.")] * 100)
    async with run_client(port) as (client, _):
        for _ in range(20):
            with pytest.raises(ChiasmError):
                await ask(client)

    assert 3 <= generator.num_sessions <= 6


async def test_request_larger_than_a_message_ends_alone(
    fake: tuple[FakeGenerator, int, GrpcServer],
) -> None:
    _, port, _ = fake
    async with run_client(port) as (client, _):
        huge = GenerateStart(
            context=RequestContext("request", "attempt", "tenant"),
            token_ids=[1 << 31] * (4 << 20),
            spans=(),
            sampling=SamplingWishes(max_tokens=1),
        )
        async with start(client) as other:
            with pytest.raises(TooLargeError):
                async with client.generate(huge, Deadline.after(60)):
                    pass
            assert await read(other) == [7, 8]


async def test_generator_that_hangs_is_bounded_by_the_deadline(
    fake: tuple[FakeGenerator, int, GrpcServer],
) -> None:
    generator, port, _ = fake
    generator.script = Script(hangs=True)
    async with run_client(port) as (client, _):
        async with start(client, timeout_s=0.1) as call:
            with pytest.raises(DeadlineExceededError):
                await read(call)
        await asyncio.wait_for(generator.cancelled.wait(), WAIT_S)


async def test_chunks_are_cut_and_do_not_outrun_their_start(
    fake: tuple[FakeGenerator, int, GrpcServer],
) -> None:
    generator, port, _ = fake
    spec = TensorSpec(TensorRole.SPLICE, DataType.FLOAT32, (1, 1))
    ref = EmbeddingRef(b"e" * 32, b"f" * 32, Modality.IMAGE, (spec,))
    layout = MediaLayout((TokenRun(2, 1, is_embedding=True),))
    prompt = GenerateStart(
        context=RequestContext("request", "attempt", "tenant"),
        token_ids=PROMPT,
        spans=(MediaSpan(1, ref, layout, is_ready=False),),
        sampling=SamplingWishes(max_tokens=1),
    )
    data = bytes(range(256)) * (10 << 10)
    chunk = media_pb2.EmbeddingChunk(embedding_id=b"e" * 32, data=data, is_last=True)
    async with (
        run_client(port) as (client, _),
        client.generate(prompt, Deadline.after(60)) as call,
    ):
        await call.send_chunk(chunk)
        assert await read(call) == [7, 8]

    assert generator.chunk_ids == [b"e" * 32]
    assert [len(chunk.data) for chunk in generator.chunks] == [1 << 20, 1 << 20, 1 << 19]
    assert b"".join(chunk.data for chunk in generator.chunks) == data


async def test_new_session_takes_over_from_an_old_one_without_a_break(
    fake: tuple[FakeGenerator, int, GrpcServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, port, _ = fake
    async with run_client(port) as (client, _):
        sessions = SessionPool(max_age_s=-1.0)
        monkeypatch.setattr(client, "_sessions", sessions)
        generator.scripts.append(Script(deltas=[[1]], hangs=True))
        async with start(client) as old:
            assert await anext(old) == TokensAdded((1,))
            assert await ask(client) == [7, 8]
        async with asyncio.timeout(WAIT_S):
            while sessions.num_sessions > 1:
                await asyncio.to_thread(lambda: None)
        await sessions.close()

    assert generator.num_sessions == 2


async def test_slow_reader_stalls_only_itself(real: tuple[_Generator, int]) -> None:
    generator, port = real
    expected = expected_tokens(PROMPT, 480)
    async with run_client(port) as (client, _), start(client, max_tokens=480) as slow:
        first = await anext(slow)
        assert isinstance(first, TokensAdded)
        assert await ask(client, max_tokens=480) == expected

        rest = await read(slow)

    assert [*first.token_ids, *rest] == expected
    await generator.until_free()


async def test_storm_of_leavers_frees_everything_and_keeps_the_session(
    real: tuple[_Generator, int],
) -> None:
    generator, port = real
    async with run_client(port) as (client, _):
        expected = expected_tokens(PROMPT, 10)
        assert await ask(client) == expected
        tasks = [asyncio.create_task(ask(client, max_tokens=480)) for _ in range(100)]
        async with asyncio.timeout(WAIT_S):
            while generator.engine.num_sequences < 50:
                await asyncio.to_thread(lambda: None)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

        await generator.until_free()
        assert await ask(client) == expected
        assert client._sessions.num_sessions == 1


async def test_gateway_that_goes_away_frees_all_its_sequences(real: tuple[_Generator, int]) -> None:
    generator, port = real
    async with run_client(port) as (client, _):
        calls = [start(client, max_tokens=480) for _ in range(20)]
        for call in calls:
            await call.__aenter__()
        await asyncio.gather(*(anext(call) for call in calls))
        num_running = generator.engine.num_sequences
        await client.close()
        await generator.until_free()
        for call in calls:
            await call.__aexit__(None, None, None)
    assert num_running > 0
    assert generator.engine.num_sequences == 0
