"""One request from admission to its end, with embeddings that come, miss, fail or never arrive."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from chiasm.common.errors import (
    ChiasmError,
    DeadlineExceededError,
    EmbeddingExpiredError,
    InvalidRequestError,
)
from chiasm.common.limits import Limits
from chiasm.common.media import (
    DataType,
    Embedding,
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
from chiasm.generator.admission import Admission, GenerationRequest
from chiasm.generator.embedding_assembly import EmbeddingPiece
from chiasm.generator.embedding_loader import EmbeddingLoader
from chiasm.generator.engine.async_engine import AsyncEngine
from chiasm.generator.engine.outputs import Finished, NeedEmbedding, TokenDelta
from chiasm.generator.engine.queue_budget import QueueBudget, QueueLimits
from chiasm.generator.generation import Admitted, GenerationService
from chiasm.generator.guides import Guides
from chiasm.generator.span_tracker import EmbeddingFailed, EmbeddingReady
from tests.fakes.embedding_source import FakeEmbeddingSource
from tests.fakes.generator_engine import BYTE_SPEC, EngineParts, expected_tokens

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from chiasm.generator.generation import GenerationEvent
    from chiasm.generator.span_tracker import SpanUpdate

TENANT = "tenant"
TOKEN_IDS = (1, 50, 50, 2)
ROWS = (100.0, 101.0)
EXPECTED = expected_tokens([1, 100, 101, 2], 5)
SPEC = TensorSpec(TensorRole.SPLICE, DataType.FLOAT32, (2, 1))
REF = EmbeddingRef(b"e" * 32, b"f" * 32, Modality.IMAGE, (SPEC,))
DATA = struct.pack("<2f", *ROWS)
EMBEDDING = Embedding(REF, [memoryview(DATA)])
SPAN = MediaSpan(1, REF, MediaLayout((TokenRun(50, 2, is_embedding=True),)), is_ready=True)
PIECE = EmbeddingPiece(REF.embedding_id, 0, 0, DATA, is_last=True)


class _NoThreads:
    def rest(self) -> None:
        """Do nothing."""


class _Updates:
    """What a caller says later; open until it is closed."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[SpanUpdate | None] = asyncio.Queue()

    def say(self, update: SpanUpdate) -> None:
        self._queue.put_nowait(update)

    def close(self) -> None:
        self._queue.put_nowait(None)

    def __aiter__(self) -> AsyncIterator[SpanUpdate]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[SpanUpdate]:
        while (update := await self._queue.get()) is not None:
            yield update


class _Setup:
    def __init__(self, span_wait_s: float = 5.0) -> None:
        self.parts = EngineParts(num_blocks=32)
        self.budget = QueueBudget(QueueLimits(100, 10_000, 1 << 20))
        self.engine = AsyncEngine(self.parts.engine, self.budget, _NoThreads())
        self.source = FakeEmbeddingSource()
        self.updates = _Updates()
        self.service = GenerationService(
            Admission(BYTE_SPEC, "tiny", 128, Limits()),
            self.engine,
            EmbeddingLoader(self.source, torch.float32, 1 << 20),
            Guides(None),
            span_wait_s,
        )

    def generate(
        self, *spans: MediaSpan, token_ids: tuple[int, ...] = TOKEN_IDS, max_tokens: int = 5
    ) -> AsyncGenerator[GenerationEvent, None]:
        request = GenerationRequest(
            context=RequestContext("request", "attempt", TENANT),
            token_ids=token_ids,
            spans=spans,
            wishes=SamplingWishes(max_tokens=max_tokens, temperature=0.0),
        )
        return self.service.generate(request, aiter(self.updates))

    async def fail(self, *spans: MediaSpan) -> ChiasmError:
        """Return the error of a request; everything it held must be free then."""
        with pytest.raises(ChiasmError) as failed:
            await _collect(self.generate(*spans))
        await self.expect_nothing_left()
        return failed.value

    async def expect_nothing_left(self) -> None:
        # A short request passes through the engine after every command given so far.
        closing = _Updates()
        self.updates, old = closing, self.updates
        await _collect(self.generate(token_ids=(9,), max_tokens=1))
        self.updates = old
        assert self.parts.blocks.num_used_blocks == 0
        assert self.parts.engine.num_sequences == 0
        assert self.engine.num_sequences == 0
        assert (self.budget.num_waiting, self.budget.embedding_bytes) == (0, 0)


@pytest.fixture
async def setup() -> AsyncIterator[_Setup]:
    setup = _Setup()
    setup.engine.start()
    yield setup
    await setup.engine.stop()


async def _collect(events: AsyncGenerator[GenerationEvent, None]) -> list[GenerationEvent]:
    async with contextlib.aclosing(events):
        return [event async for event in events]


def _tokens(events: list[GenerationEvent]) -> list[int]:
    return [token for event in events if isinstance(event, TokenDelta) for token in event.token_ids]


async def test_text_is_admitted_generated_and_finished(setup: _Setup) -> None:
    events = await _collect(setup.generate(token_ids=(1, 2, 3)))

    assert isinstance(events[0], Admitted)
    assert isinstance(events[-1], Finished)
    assert _tokens(events) == expected_tokens([1, 2, 3], 5)


async def test_ready_embedding_is_loaded_from_the_store(setup: _Setup) -> None:
    setup.source.put(TENANT, EMBEDDING)
    setup.updates.close()

    events = await _collect(setup.generate(SPAN))

    assert _tokens(events) == EXPECTED


async def test_same_embedding_in_two_spans_is_loaded_once(setup: _Setup) -> None:
    setup.source.put(TENANT, EMBEDDING)
    spans = (SPAN, replace(SPAN, offset=4))

    events = await _collect(setup.generate(*spans, token_ids=(1, 50, 50, 2, 50, 50)))

    assert _tokens(events) == expected_tokens([1, 100, 101, 2, 100, 101], 5)
    assert setup.source.num_gets == 1


async def test_generation_starts_when_the_caller_says_ready(setup: _Setup) -> None:
    events = setup.generate(replace(SPAN, is_ready=False))
    await anext(events)
    setup.source.put(TENANT, EMBEDDING)
    setup.updates.say(EmbeddingReady(REF.embedding_id))

    assert _tokens(await _collect(events)) == EXPECTED


async def test_missing_embedding_is_asked_for_and_taken_inline(setup: _Setup) -> None:
    events = setup.generate(SPAN)
    assert isinstance(await anext(events), Admitted)

    assert await anext(events) == NeedEmbedding(REF.embedding_id)
    setup.updates.say(PIECE)
    setup.updates.close()

    assert _tokens(await _collect(events)) == EXPECTED


async def test_embedding_is_asked_for_when_the_store_is_down(setup: _Setup) -> None:
    setup.source.is_down = True
    events = setup.generate(SPAN)
    await anext(events)

    assert await anext(events) == NeedEmbedding(REF.embedding_id)
    await events.aclose()


async def test_chunks_may_come_unasked_where_the_store_is_not_used(setup: _Setup) -> None:
    events = setup.generate(replace(SPAN, is_ready=False))
    await anext(events)
    half = len(DATA) // 2
    setup.updates.say(replace(PIECE, data=DATA[:half], is_last=False))
    setup.updates.say(replace(PIECE, offset=half, data=DATA[half:]))

    assert _tokens(await _collect(events)) == EXPECTED
    assert setup.source.num_gets == 0


async def test_text_does_not_wait_for_the_media_of_others(setup: _Setup) -> None:
    blocked = setup.generate(replace(SPAN, is_ready=False))
    await anext(blocked)

    setup.updates = _Updates()
    events = await _collect(setup.generate(token_ids=(7, 8)))

    assert _tokens(events) == expected_tokens([7, 8], 5)
    await blocked.aclose()


async def test_embedding_that_misses_again_after_being_needed_is_expired(setup: _Setup) -> None:
    events = setup.generate(SPAN)
    await anext(events)
    await anext(events)
    setup.updates.say(EmbeddingReady(REF.embedding_id))

    with pytest.raises(EmbeddingExpiredError):
        await _collect(events)

    await setup.expect_nothing_left()


async def test_caller_that_closes_with_a_span_not_ready_fails_its_request(setup: _Setup) -> None:
    setup.updates.close()

    error = await setup.fail(replace(SPAN, is_ready=False))

    assert isinstance(error, EmbeddingExpiredError)
    assert error.reason == "EMBEDDING_EXPIRED"


async def test_caller_that_closed_cannot_be_asked_for_an_embedding(setup: _Setup) -> None:
    setup.updates.close()

    assert isinstance(await setup.fail(SPAN), EmbeddingExpiredError)


async def test_span_that_never_arrives_times_out() -> None:
    setup = _Setup(span_wait_s=0.01)
    setup.engine.start()

    error = await setup.fail(replace(SPAN, is_ready=False))

    assert isinstance(error, DeadlineExceededError)
    assert error.reason == "SPAN_TIMEOUT"
    await setup.engine.stop()


async def test_failed_embedding_fails_its_request_with_the_callers_words(setup: _Setup) -> None:
    setup.updates.say(EmbeddingFailed(REF.embedding_id, "INVALID_MEDIA", "It is no image."))

    error = await setup.fail(replace(SPAN, is_ready=False))

    assert (error.reason, error.message) == ("INVALID_MEDIA", "It is no image.")


async def test_embedding_that_is_not_finite_fails_its_request(setup: _Setup) -> None:
    data = struct.pack("<2f", 1.0, float("nan"))
    setup.source.put(TENANT, Embedding(REF, [memoryview(data)]))

    error = await setup.fail(SPAN)

    assert error.reason == "INVALID_EMBEDDING"


async def test_embedding_of_no_span_is_refused(setup: _Setup) -> None:
    setup.updates.say(EmbeddingReady(b"x" * 32))

    assert isinstance(await setup.fail(replace(SPAN, is_ready=False)), InvalidRequestError)


async def test_wrong_chunk_fails_its_request(setup: _Setup) -> None:
    setup.updates.say(replace(PIECE, offset=1))

    assert (await setup.fail(replace(SPAN, is_ready=False))).reason == "INVALID_EMBEDDING"


@pytest.mark.parametrize("num_events", [1, 2, 3])
async def test_caller_that_goes_away_leaves_nothing(setup: _Setup, num_events: int) -> None:
    setup.source.put(TENANT, EMBEDDING)
    events = setup.generate(SPAN, max_tokens=100)
    for _ in range(num_events):
        await anext(events)

    await events.aclose()

    await setup.expect_nothing_left()


async def test_cancelled_task_that_waits_for_a_span_leaves_nothing(setup: _Setup) -> None:
    was_admitted = asyncio.Event()

    async def consume() -> None:
        events = setup.generate(replace(SPAN, is_ready=False))
        async with contextlib.aclosing(events):
            async for _ in events:
                was_admitted.set()

    task = asyncio.create_task(consume())
    await was_admitted.wait()

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    await setup.expect_nothing_left()


async def test_refused_request_is_not_queued(setup: _Setup) -> None:
    with pytest.raises(InvalidRequestError):
        await _collect(setup.generate(token_ids=(300,)))

    await setup.expect_nothing_left()
