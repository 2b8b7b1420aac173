"""Messages of the contract and what they mean inside."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chiasm.common.convert import context_to_proto, span_to_proto
from chiasm.common.errors import InvalidRequestError
from chiasm.common.media import MediaSpan, RequestContext
from chiasm.common.sampling import SamplingWishes
from chiasm.generator.convert import (
    MAX_SPANS,
    event_to_proto,
    info_to_proto,
    read_start,
    read_updates,
    start_from_proto,
    update_from_proto,
)
from chiasm.generator.embedding_assembly import EmbeddingPiece
from chiasm.generator.engine.logprobs import TokenLogprobs
from chiasm.generator.engine.outputs import (
    Finished,
    FinishReason,
    NeedEmbedding,
    PromptLogprobs,
    TokenDelta,
)
from chiasm.generator.generation import Admitted
from chiasm.generator.info import GeneratorInfo
from chiasm.generator.span_tracker import EmbeddingFailed, EmbeddingReady
from chiasm.v1 import generator_pb2, media_pb2
from tests.fakes.embeddings import make_layout, make_ref

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CONTEXT = RequestContext("request", "attempt", "tenant", model="tiny")
ID = b"e" * 32


def _start(**fields: object) -> generator_pb2.GenerateStart:
    return generator_pb2.GenerateStart(
        context=context_to_proto(CONTEXT),
        token_ids=[1, 2, 3],
        **fields,  # type: ignore[arg-type]  # by name
    )


async def _stream(
    *messages: generator_pb2.GenerateRequest,
) -> AsyncIterator[generator_pb2.GenerateRequest]:
    for message in messages:
        yield message


def test_start_becomes_a_request() -> None:
    ref = make_ref()
    span = MediaSpan(1, ref, make_layout(ref), is_ready=True)

    request = start_from_proto(_start(spans=[span_to_proto(span)]))

    assert request.context == CONTEXT
    assert request.token_ids == (1, 2, 3)
    assert request.spans == (span,)
    assert request.wishes == SamplingWishes()


def test_sampling_fields_that_are_zero_are_not_absent() -> None:
    sampling = generator_pb2.SamplingParams(
        max_tokens=0, temperature=0.0, top_p=0.0, top_k=0, seed=0, stop_token_ids=[4]
    )

    wishes = start_from_proto(_start(sampling=sampling)).wishes

    assert wishes == SamplingWishes(0, 0.0, 0.0, 0, 0, (4,), ignore_eos=False)


def test_too_many_spans_are_refused_before_they_are_read() -> None:
    spans = [generator_pb2.MediaSpan()] * (MAX_SPANS + 1)

    with pytest.raises(InvalidRequestError, match="at most"):
        start_from_proto(_start(spans=spans))


async def test_first_message_must_be_start() -> None:
    ready = generator_pb2.GenerateRequest(ready=generator_pb2.EmbeddingReady(embedding_id=ID))

    for messages in (_stream(ready), _stream()):
        with pytest.raises(InvalidRequestError, match="must be `start`"):
            await read_start(messages)


async def test_start_may_not_come_twice() -> None:
    updates = read_updates(_stream(generator_pb2.GenerateRequest(start=_start())))

    with pytest.raises(InvalidRequestError, match="`ready`, `chunk` or `failed`"):
        await anext(updates)


def test_later_messages_become_updates() -> None:
    chunk = media_pb2.EmbeddingChunk(
        embedding_id=ID, tensor_index=1, offset=2, data=b"xy", is_last=True
    )
    failed = generator_pb2.EmbeddingFailed(embedding_id=ID, reason="R", message="m" * 5000)
    ready = generator_pb2.EmbeddingReady(embedding_id=ID)

    assert update_from_proto(generator_pb2.GenerateRequest(ready=ready)) == EmbeddingReady(ID)
    assert update_from_proto(generator_pb2.GenerateRequest(chunk=chunk)) == EmbeddingPiece(
        ID, 1, 2, b"xy", is_last=True
    )
    assert update_from_proto(generator_pb2.GenerateRequest(failed=failed)) == EmbeddingFailed(
        ID, "R", "m" * 1024
    )


def test_embedding_id_of_another_length_is_refused() -> None:
    ready = generator_pb2.EmbeddingReady(embedding_id=b"short")

    with pytest.raises(InvalidRequestError, match="embedding_id"):
        update_from_proto(generator_pb2.GenerateRequest(ready=ready))


def test_events_become_responses() -> None:
    finished = event_to_proto(Finished(FinishReason.STOP, 2, 10, 4)).finished

    assert event_to_proto(Admitted(5)).admitted.sequence_id == 5
    assert event_to_proto(NeedEmbedding(ID)).need.embedding_id == ID
    delta = event_to_proto(TokenDelta((1, 2), index=1, num_cached_tokens=8)).delta
    assert (list(delta.token_ids), delta.index, delta.num_cached_tokens) == ([1, 2], 1, 8)
    assert finished.finish_reason == generator_pb2.FINISH_REASON_STOP
    assert (finished.stop_token_id, finished.num_prompt_tokens) == (2, 10)
    assert finished.num_output_tokens == 4


def test_prompt_logprobs_become_a_message() -> None:
    told = (TokenLogprobs(-0.5, 2, (3,), (-0.25,)), TokenLogprobs(-2.0, 1))

    message = event_to_proto(PromptLogprobs(7, told)).prompt

    assert message.start == 7
    assert [(one.logprob, one.rank) for one in message.logprobs] == [(-0.5, 2), (-2.0, 1)]
    assert list(message.logprobs[0].top_token_ids) == [3]
    assert list(message.logprobs[0].top_logprobs) == [-0.25]


def test_stop_token_is_absent_where_none_was_sampled() -> None:
    finished = event_to_proto(Finished(FinishReason.LENGTH, None, 10, 4)).finished

    assert finished.finish_reason == generator_pb2.FINISH_REASON_LENGTH
    assert not finished.HasField("stop_token_id")


def test_info_becomes_a_message_field_by_field() -> None:
    info = GeneratorInfo("tiny", 128, 320, 64, 16, 8, 2, (0, 2), "1.0")

    message = info_to_proto(info)

    assert (message.model, message.max_model_len, message.vocab_size) == ("tiny", 128, 320)
    assert (message.hidden_size, message.block_size, message.num_blocks) == (64, 16, 8)
    assert (message.num_used_blocks, list(message.eos_token_ids)) == (2, [0, 2])
    assert message.version == "1.0"
