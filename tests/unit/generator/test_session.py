"""Many requests over one call: credit, cancel, half-close, errors, deadlines, an end that frees."""

from __future__ import annotations

import asyncio
import struct
from typing import TYPE_CHECKING

import pytest

from chiasm.common.errors import (
    ChiasmError,
    DeadlineExceededError,
    EmbeddingExpiredError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
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
from chiasm.generator.admission import GenerationRequest
from chiasm.generator.embedding_assembly import EmbeddingPiece
from chiasm.generator.engine.outputs import (
    Finished,
    FinishReason,
    NeedEmbedding,
    PromptLogprobs,
    TokenDelta,
)
from chiasm.generator.generation import Admitted
from chiasm.generator.session_messages import (
    CancelRequest,
    GrantCredit,
    HalfClose,
    RefuseRequest,
    StartRequest,
    StopAnswer,
    UpdateSpan,
)
from tests.fakes.generator_engine import expected_tokens
from tests.harness.session import WAIT_S, SessionSetup, is_over

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


MANY_TOKENS = 60
ROWS = (100.0, 101.0)
SPEC = TensorSpec(TensorRole.SPLICE, DataType.FLOAT32, (2, 1))
REF = EmbeddingRef(b"e" * 32, b"f" * 32, Modality.IMAGE, (SPEC,))
SPAN = MediaSpan(1, REF, MediaLayout((TokenRun(50, 2, is_embedding=True),)), is_ready=False)
PIECE = EmbeddingPiece(REF.embedding_id, 0, 0, struct.pack("<2f", *ROWS), is_last=True)


@pytest.fixture
async def setup() -> AsyncIterator[SessionSetup]:
    setup = SessionSetup()
    setup.engine.start()
    yield setup
    await setup.close()


async def test_requests_are_interleaved_and_each_gets_its_own_tokens(setup: SessionSetup) -> None:
    keys = range(1, 31)
    for key in keys:
        setup.start(key, max_tokens=10)

    await setup.until_over(*keys)

    for key in keys:
        assert isinstance(setup.events[key][0], Admitted)
        assert isinstance(setup.events[key][-1], Finished)
        assert setup.tokens(key) == setup.expected(key, 10)
    assert any(len({event.key for event in batch}) > 1 for batch in setup.batches)
    await setup.until_free()


async def test_request_without_credit_waits_and_the_others_go_on(setup: SessionSetup) -> None:
    setup.start(1, max_tokens=MANY_TOKENS, credit=3)
    setup.start(2, max_tokens=MANY_TOKENS)

    await setup.until_over(2)

    assert setup.tokens(2) == setup.expected(2, MANY_TOKENS)
    assert setup.tokens(1) == setup.expected(1, 3)
    setup.say(GrantCredit(((1, 7), (99, 1))))
    await setup.until_tokens(1, 10)
    assert setup.tokens(1) == setup.expected(1, 10)
    setup.say(GrantCredit(((1, MANY_TOKENS),)))
    await setup.until_over(1)
    assert setup.tokens(1) == setup.expected(1, MANY_TOKENS)


async def test_tokens_that_waited_for_credit_come_in_one_delta(setup: SessionSetup) -> None:
    setup.start(1, max_tokens=20, credit=1)
    setup.start(2, max_tokens=MANY_TOKENS)
    await setup.until_over(2)

    setup.say(GrantCredit(((1, 50),)))
    await setup.until_over(1)

    deltas = [event for event in setup.events[1] if isinstance(event, TokenDelta)]
    assert [len(delta.token_ids) for delta in deltas] == [1, 19]


async def test_prompt_is_told_of_once_for_all_answers(setup: SessionSetup) -> None:
    setup.start(1, num_prompt_logprobs=1, num_sequences=3)
    await setup.until_over(1)

    told = [event for event in setup.events[1] if isinstance(event, PromptLogprobs)]

    num_prompt_tokens = len(setup.prompt(1))
    assert [one.start for one in told] == [1]
    assert len(told[0].logprobs) == num_prompt_tokens - 1
    first_delta = next(i for i, one in enumerate(setup.events[1]) if isinstance(one, TokenDelta))
    assert setup.events[1].index(told[0]) < first_delta


async def test_stopped_answer_ends_at_once_and_the_others_go_on(setup: SessionSetup) -> None:
    setup.start(1, max_tokens=MANY_TOKENS, credit=6, num_sequences=3)
    await setup.until_tokens(1, 6)

    setup.say(StopAnswer(1, 0), StopAnswer(1, 0), StopAnswer(1, 7), StopAnswer(2, 0))
    await setup.until_finished(1, 1)
    num_live = setup.engine.num_sequences
    setup.say(GrantCredit(((1, 1000),)))
    await setup.until_finished(1, 3)

    ends = [event for event in setup.events[1] if isinstance(event, Finished)]
    assert [(end.index, end.reason) for end in ends] == [
        (0, FinishReason.CANCELLED),
        (1, FinishReason.LENGTH),
        (2, FinishReason.LENGTH),
    ]
    assert num_live == 2
    assert setup.tokens(1, index=2) == setup.expected(1, MANY_TOKENS)
    assert len(setup.tokens(1, index=0)) <= 6
    await setup.until_free()


async def test_other_answers_get_the_embedding_that_comes_after_the_first_was_stopped(
    setup: SessionSetup,
) -> None:
    setup.start(1, spans=(SPAN,), num_sequences=3)
    await setup.next_batch()
    setup.say(StopAnswer(1, 0))
    await setup.until_finished(1, 1)
    while setup.engine.num_sequences > 2:
        await asyncio.to_thread(lambda: None)

    held = setup.budget.embedding_bytes
    setup.say(UpdateSpan(1, PIECE))
    await setup.until_finished(1, 3)

    assert held == REF.num_bytes
    assert len(setup.tokens(1, index=1)) == 5
    assert setup.tokens(1, index=1) == setup.tokens(1, index=2)
    await setup.until_free()


async def test_answer_that_had_ended_before_it_was_stopped_keeps_its_reason(
    setup: SessionSetup,
) -> None:
    setup.start(1, max_tokens=4, credit=1, num_sequences=2)
    setup.start(2, max_tokens=MANY_TOKENS)
    await setup.until_over(2)

    setup.say(StopAnswer(1, 0), GrantCredit(((1, 1000),)))
    await setup.until_finished(1, 2)

    ends = [event for event in setup.events[1] if isinstance(event, Finished)]
    assert {end.reason for end in ends} == {FinishReason.LENGTH}
    assert len(setup.tokens(1, index=0)) <= 1
    assert setup.tokens(1, index=1) == setup.expected(1, 4)


async def test_cancelled_request_is_silent_and_its_blocks_are_free(setup: SessionSetup) -> None:
    setup.start(1, max_tokens=100, credit=2)
    await setup.until_tokens(1, 2)

    setup.say(CancelRequest(1), CancelRequest(1), GrantCredit(((1, 100),)))
    setup.start(2)
    await setup.until_over(2)

    assert not is_over(setup.events[1])
    assert setup.session.num_requests == 0
    await setup.until_free()


async def test_request_cancelled_before_it_was_admitted_leaves_nothing(setup: SessionSetup) -> None:
    for key in range(1, 60):
        setup.start(key, max_tokens=100)
        setup.say(CancelRequest(key))
    setup.start(100)

    await setup.until_over(100)

    assert set(setup.events) == {100}
    await setup.until_free()


async def test_refused_request_gets_its_error_and_the_others_go_on(setup: SessionSetup) -> None:
    setup.start(1, max_tokens=5)
    wrong = InvalidRequestError("A span is wrong.", param="spans[0]")
    setup.say(RefuseRequest(2, wrong))
    request = GenerationRequest(RequestContext("r", "a", "tenant"), (), (), SamplingWishes())
    setup.say(StartRequest(3, request, 60.0, 1, is_half_closed=True))

    await setup.until_over(1, 2, 3)

    assert setup.events[2] == [wrong]
    (refusal,) = setup.events[3]
    assert isinstance(refusal, InvalidRequestError)
    assert setup.tokens(1) == setup.expected(1, 5)


async def test_bug_in_the_engine_is_shown_as_a_fixed_text(setup: SessionSetup) -> None:
    setup.parts.decoder.failing_token = setup.prompt(1)[0]
    setup.start(1)

    await setup.until_over(1)

    error = setup.events[1][-1]
    assert isinstance(error, ChiasmError)
    assert "request 1" in error.message
    assert "fake decoder" not in error.message


async def test_deadline_ends_a_request_that_nobody_reads(setup: SessionSetup) -> None:
    setup.start(1, max_tokens=100, credit=1, deadline_s=0.02)

    await setup.until_over(1)

    assert isinstance(setup.events[1][-1], DeadlineExceededError)
    assert setup.tokens(1) in ([], setup.expected(1, 1))
    await setup.until_free()


async def test_embedding_arrives_in_a_chunk_of_the_session(setup: SessionSetup) -> None:
    setup.start(1, spans=(SPAN,))
    setup.start(2)
    await setup.until_over(2)
    setup.say(UpdateSpan(1, PIECE), HalfClose(1))

    await setup.until_over(1)

    assert setup.tokens(1) == expected_tokens([2, 100, 101, 2], 5)


async def test_embedding_that_is_missing_is_asked_for_without_credit(setup: SessionSetup) -> None:
    ready = MediaSpan(SPAN.offset, SPAN.ref, SPAN.layout, is_ready=True)
    setup.start(1, spans=(ready,), credit=1)
    async with asyncio.timeout(WAIT_S):
        while NeedEmbedding(REF.embedding_id) not in setup.events[1]:
            await setup.next_batch()

    setup.say(UpdateSpan(1, PIECE), GrantCredit(((1, 10),)))

    await setup.until_over(1)
    assert setup.tokens(1) == expected_tokens([2, 100, 101, 2], 5)


@pytest.mark.parametrize("is_half_closed", [True, False], ids=["at the start", "later"])
async def test_half_close_with_a_span_missing_ends_the_request(
    setup: SessionSetup, is_half_closed: bool
) -> None:
    setup.start(1, spans=(SPAN,), is_half_closed=is_half_closed)
    if not is_half_closed:
        setup.say(HalfClose(1))

    await setup.until_over(1)

    assert isinstance(setup.events[1][-1], EmbeddingExpiredError)
    await setup.until_free()


async def test_more_chunk_bytes_than_embeddings_have_end_the_request(setup: SessionSetup) -> None:
    setup.start(1, spans=(SPAN,))
    big = EmbeddingPiece(REF.embedding_id, 0, 0, b"x" * (5 << 20), is_last=False)
    setup.say(UpdateSpan(1, big))

    await setup.until_over(1)

    assert isinstance(setup.events[1][-1], InvalidRequestError)
    await setup.until_free()


async def test_key_in_use_ends_the_session_and_frees_everything(setup: SessionSetup) -> None:
    setup.start(1, max_tokens=100, credit=1)
    setup.start(1)

    with pytest.raises(InvalidRequestError):
        await asyncio.wait_for(setup.reader, WAIT_S)

    await setup.until_free()


async def test_session_ends_after_its_last_request_when_the_caller_says_no_more(
    setup: SessionSetup,
) -> None:
    setup.start(1, max_tokens=20)
    setup.say(None)

    await asyncio.wait_for(setup.reader, WAIT_S)

    assert setup.tokens(1) == setup.expected(1, 20)


async def test_draining_service_refuses_new_requests_and_ends_the_session(
    setup: SessionSetup,
) -> None:
    setup.start(1, max_tokens=20, credit=1)
    await setup.until_tokens(1, 1)

    setup.service.drain()
    setup.start(2)
    await setup.until_over(2)
    setup.say(GrantCredit(((1, 100),)))
    await asyncio.wait_for(setup.reader, WAIT_S)

    error = setup.events[2][-1]
    assert isinstance(error, UnavailableError)
    assert error.reason == "DRAINING"
    assert setup.tokens(1) == setup.expected(1, 20)


async def test_full_queue_refuses_one_request_and_keeps_the_session(setup: SessionSetup) -> None:
    keys = range(1, 121)
    for key in keys:
        setup.start(key, max_tokens=1, spans=(SPAN,))
    refused = 120 - 100
    async with asyncio.timeout(WAIT_S):
        while sum(map(is_over, setup.events.values())) < refused:
            await setup.next_batch()

    errors = [events[-1] for events in setup.events.values() if is_over(events)]
    assert all(isinstance(error, OverloadedError) for error in errors)
    assert setup.session.num_requests == 100


async def test_caller_that_goes_away_frees_all_its_requests(setup: SessionSetup) -> None:
    tasks = asyncio.all_tasks()
    keys = range(1, 41)
    for key in keys:
        setup.start(key, max_tokens=100, credit=1, spans=(SPAN,) if key % 2 else ())
    await setup.until_tokens(2, 1)

    setup.reader.cancel()
    await asyncio.gather(setup.reader, return_exceptions=True)

    assert setup.session.num_requests == 0
    assert asyncio.all_tasks() <= tasks
    await setup.until_free()


async def test_storm_of_cancels_leaves_no_task_and_no_sequence(setup: SessionSetup) -> None:
    setup.start(1000)
    await setup.until_over(1000)
    tasks = asyncio.all_tasks()
    for key in range(1, 91):
        setup.start(key, max_tokens=100, spans=(SPAN,) if key % 3 == 0 else ())
    await setup.until_tokens(1, 1)

    setup.say(*(CancelRequest(key) for key in range(1, 91)))
    setup.start(1001)
    await setup.until_over(1001)

    assert setup.session.num_requests == 0
    await setup.until_free()
    await setup.until_only(tasks)
