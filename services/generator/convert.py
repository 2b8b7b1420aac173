"""Translate between the messages of ``generator.proto`` and the domain types of the generator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.common.convert import context_from_proto, digest_from_proto, span_from_proto
from chiasm.common.errors import InvalidRequestError
from chiasm.common.sampling import wishes_from_proto
from chiasm.generator.admission import GenerationRequest
from chiasm.generator.embedding_assembly import EmbeddingPiece
from chiasm.generator.engine.outputs import (
    Finished,
    FinishReason,
    NeedEmbedding,
    PromptLogprobs,
    TokenDelta,
)
from chiasm.generator.generation import Admitted, GenerationEvent
from chiasm.generator.span_tracker import EmbeddingFailed, EmbeddingReady, SpanUpdate
from chiasm.v1 import generator_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from chiasm.generator.engine.logprobs import TokenLogprobs
    from chiasm.generator.info import GeneratorInfo

MAX_PROMPT_TOKENS = 1 << 21
MAX_SPANS = 1024
MAX_ERROR_CHARS = 1024

_FINISH_REASON_TO_PROTO = {
    FinishReason.STOP: generator_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generator_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: generator_pb2.FINISH_REASON_CANCELLED,
}


async def read_start(messages: AsyncIterator[generator_pb2.GenerateRequest]) -> GenerationRequest:
    """Return the request that the first message of a call carries.

    Raises:
        InvalidRequestError: There is none, or a field of it is wrong.
    """
    async for message in messages:
        if message.WhichOneof("message") == "start":
            return start_from_proto(message.start)
        break
    raise InvalidRequestError("The first message of Generate must be `start`.", param="start")


async def read_updates(
    messages: AsyncIterator[generator_pb2.GenerateRequest],
) -> AsyncIterator[SpanUpdate]:
    """Yield what the messages after the first one say about embeddings.

    Raises:
        InvalidRequestError: A message is not one of those that may follow.
    """
    async for message in messages:
        yield update_from_proto(message)


def start_from_proto(message: generator_pb2.GenerateStart) -> GenerationRequest:
    """Return the request of a message; what depends on the model is not checked here."""
    if len(message.token_ids) > MAX_PROMPT_TOKENS or len(message.spans) > MAX_SPANS:
        raise InvalidRequestError(
            f"A prompt must have at most {MAX_PROMPT_TOKENS} tokens and {MAX_SPANS} spans.",
            reason="PROMPT_TOO_LONG",
            param="token_ids",
        )
    return GenerationRequest(
        context=context_from_proto(message.context),
        token_ids=tuple(message.token_ids),
        spans=tuple(span_from_proto(span) for span in message.spans),
        wishes=wishes_from_proto(message.sampling),
    )


def update_from_proto(message: generator_pb2.GenerateRequest) -> SpanUpdate:
    """Return what a later message says about an embedding."""
    match message.WhichOneof("message"):
        case "ready":
            return EmbeddingReady(_embedding_id(message.ready.embedding_id))
        case "failed":
            failed = message.failed
            return EmbeddingFailed(
                _embedding_id(failed.embedding_id),
                failed.reason[:MAX_ERROR_CHARS],
                failed.message[:MAX_ERROR_CHARS],
            )
        case "chunk":
            chunk = message.chunk
            return EmbeddingPiece(
                embedding_id=_embedding_id(chunk.embedding_id),
                tensor_index=chunk.tensor_index,
                offset=chunk.offset,
                data=chunk.data,
                is_last=chunk.is_last,
            )
        case _:
            raise InvalidRequestError(
                "A later message of Generate must be `ready`, `chunk` or `failed`.",
                param="message",
            )


def event_to_proto(event: GenerationEvent) -> generator_pb2.GenerateResponse:
    """Return the message of ``event``."""
    match event:
        case TokenDelta():
            return generator_pb2.GenerateResponse(delta=delta_to_proto(event))
        case PromptLogprobs():
            prompt = generator_pb2.PromptLogprobs(
                start=event.start, logprobs=map(_logprobs_to_proto, event.logprobs)
            )
            return generator_pb2.GenerateResponse(prompt=prompt)
        case Admitted():
            admitted = generator_pb2.Admitted(sequence_id=event.seq_id)
            return generator_pb2.GenerateResponse(admitted=admitted)
        case NeedEmbedding():
            need = generator_pb2.NeedEmbedding(embedding_id=event.embedding_id)
            return generator_pb2.GenerateResponse(need=need)
        case Finished():
            finished = generator_pb2.Finished(
                finish_reason=_FINISH_REASON_TO_PROTO[event.reason],
                stop_token_id=event.stop_token_id,
                num_prompt_tokens=event.num_prompt_tokens,
                num_output_tokens=event.num_output_tokens,
                num_cached_tokens=event.num_cached_tokens,
                index=event.index,
            )
            return generator_pb2.GenerateResponse(finished=finished)


def delta_to_proto(delta: TokenDelta) -> generator_pb2.TokenDelta:
    """Return the message of new tokens."""
    return generator_pb2.TokenDelta(
        token_ids=delta.token_ids,
        index=delta.index,
        logprobs=map(_logprobs_to_proto, delta.logprobs),
        num_cached_tokens=delta.num_cached_tokens,
    )


def _logprobs_to_proto(logprobs: TokenLogprobs) -> generator_pb2.TokenLogprobs:
    return generator_pb2.TokenLogprobs(
        logprob=logprobs.logprob,
        rank=logprobs.rank,
        top_token_ids=logprobs.top_token_ids,
        top_logprobs=logprobs.top_logprobs,
    )


def info_to_proto(info: GeneratorInfo) -> generator_pb2.GetGeneratorInfoResponse:
    """Return the message of ``info``."""
    return generator_pb2.GetGeneratorInfoResponse(
        model=info.model,
        max_model_len=info.max_model_len,
        vocab_size=info.vocab_size,
        hidden_size=info.hidden_size,
        block_size=info.block_size,
        num_blocks=info.num_blocks,
        num_used_blocks=info.num_used_blocks,
        eos_token_ids=info.eos_token_ids,
        version=info.version,
    )


def _embedding_id(value: bytes) -> bytes:
    return digest_from_proto(value, "embedding_id")
