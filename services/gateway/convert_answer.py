"""Translate answers to the messages of ``chat.proto``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.common.convert import modality_to_proto
from chiasm.v1 import chat_pb2, generator_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chiasm.common.media import Modality

    from .chat_events import AnswerHead, ChatDelta, TokenLogprobs, Usage, WholeAnswer

_FINISH_REASONS = {
    "": generator_pb2.FINISH_REASON_UNSPECIFIED,
    "stop": generator_pb2.FINISH_REASON_STOP,
    "length": generator_pb2.FINISH_REASON_LENGTH,
}


def answer_to_proto(head: AnswerHead, answer: WholeAnswer) -> chat_pb2.ChatCompletionResponse:
    """Return the message of a whole answer."""
    return chat_pb2.ChatCompletionResponse(
        request_id=head.request_id,
        model=head.model,
        created_s=head.created_s,
        text=answer.text,
        finish_reason=_FINISH_REASONS[answer.finish.reason],
        stop_string=answer.finish.stop_string,
        stop_token_id=answer.finish.stop_token_id,
        usage=usage_to_proto(answer.usage),
        token_ids=answer.token_ids,
        logprobs=map(_logprobs_to_proto, answer.logprobs),
    )


def delta_to_proto(head: AnswerHead, delta: ChatDelta) -> chat_pb2.StreamChatCompletionResponse:
    """Return the message of a piece of an answer, without usage."""
    finish = delta.finish
    return chat_pb2.StreamChatCompletionResponse(
        request_id=head.request_id,
        model=head.model,
        created_s=head.created_s,
        text=delta.text,
        token_ids=delta.token_ids,
        finish_reason=_FINISH_REASONS[finish.reason if finish else ""],
        stop_string=finish.stop_string if finish else "",
        stop_token_id=finish.stop_token_id if finish else None,
        logprobs=map(_logprobs_to_proto, delta.logprobs),
    )


def _logprobs_to_proto(logprobs: TokenLogprobs) -> generator_pb2.TokenLogprobs:
    return generator_pb2.TokenLogprobs(
        logprob=logprobs.logprob,
        rank=logprobs.rank,
        top_token_ids=logprobs.top_token_ids,
        top_logprobs=logprobs.top_logprobs,
    )


def usage_message(head: AnswerHead, usage: Usage) -> chat_pb2.StreamChatCompletionResponse:
    """Return the message that follows the last delta when the usage is asked for."""
    return chat_pb2.StreamChatCompletionResponse(
        request_id=head.request_id,
        model=head.model,
        created_s=head.created_s,
        usage=usage_to_proto(usage),
    )


def usage_to_proto(usage: Usage) -> chat_pb2.Usage:
    """Return the message of ``usage``."""
    return chat_pb2.Usage(
        prompt_tokens=usage.num_prompt_tokens,
        completion_tokens=usage.num_output_tokens,
        media_tokens=usage.num_media_tokens,
        cached_tokens=usage.num_cached_tokens,
    )


def model_to_proto(
    name: str, max_model_len: int, modalities: Iterable[Modality], created_s: int
) -> chat_pb2.Model:
    """Return the message of a served model."""
    return chat_pb2.Model(
        name=name,
        max_model_len=max_model_len,
        modalities=[modality_to_proto(modality) for modality in modalities],
        created_s=created_s,
    )
