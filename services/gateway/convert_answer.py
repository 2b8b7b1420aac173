"""Translate answers to the messages of ``chat.proto``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.common.convert import modality_to_proto
from chiasm.v1 import chat_pb2, generator_pb2

from .convert_media_objects import receipt_to_proto

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chiasm.common.media import Modality

    from .chat_events import AnswerHead, ChatDelta, TokenLogprobs, Usage, WholeAnswer, WholeChoice

_FINISH_REASONS = {
    "": generator_pb2.FINISH_REASON_UNSPECIFIED,
    "stop": generator_pb2.FINISH_REASON_STOP,
    "length": generator_pb2.FINISH_REASON_LENGTH,
}


def answer_to_proto(head: AnswerHead, answer: WholeAnswer) -> chat_pb2.ChatCompletionResponse:
    """Return the message of a whole answer."""
    first, *more = answer.choices
    return chat_pb2.ChatCompletionResponse(
        request_id=head.request_id,
        model=head.model,
        created_s=head.created_s,
        text=first.text,
        finish_reason=_FINISH_REASONS[first.finish.reason],
        stop_string=first.finish.stop_string,
        stop_token_id=first.finish.stop_token_id,
        usage=usage_to_proto(answer.usage),
        token_ids=first.token_ids,
        logprobs=map(_logprobs_to_proto, first.logprobs),
        more_choices=map(_choice_to_proto, more),
        prompt_token_ids=[one.token_id for one in answer.prompt_logprobs],
        prompt_logprobs=map(_logprobs_to_proto, answer.prompt_logprobs),
    )


def _choice_to_proto(choice: WholeChoice) -> chat_pb2.ChatChoice:
    return chat_pb2.ChatChoice(
        text=choice.text,
        finish_reason=_FINISH_REASONS[choice.finish.reason],
        stop_string=choice.finish.stop_string,
        stop_token_id=choice.finish.stop_token_id,
        token_ids=choice.token_ids,
        logprobs=map(_logprobs_to_proto, choice.logprobs),
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
        index=delta.index,
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
        media=map(receipt_to_proto, usage.media),
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
