"""Messages of clients: what is bounded, and by how much."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chiasm.common.errors import InvalidRequestError, TooLargeError
from chiasm.common.limits import Limits
from chiasm.gateway.convert import chat_request_from_proto
from chiasm.gateway.media_policy import MediaPolicy
from chiasm.v1 import chat_pb2, generator_pb2

if TYPE_CHECKING:
    from chiasm.gateway.chat_request import ChatRequest

LIMITS = Limits()
HELLO = chat_pb2.ChatMessage(
    role=chat_pb2.CHAT_ROLE_USER, content=[chat_pb2.ContentPart(text="hello")]
)


def convert(**fields: object) -> ChatRequest:
    message = chat_pb2.ChatCompletionRequest(**{"messages": [HELLO], **fields})  # type: ignore[arg-type]  # by name
    return chat_request_from_proto(message, LIMITS, MediaPolicy())


@pytest.mark.parametrize("num_sequences", [0, 1, LIMITS.max_bad_words])
def test_bad_words_have_a_bound_as_words_and_as_tokens_together(num_sequences: int) -> None:
    word = generator_pb2.TokenSequence(token_ids=[1])
    sampling = generator_pb2.SamplingParams(bad_words=[word] * num_sequences)
    num_words = LIMITS.max_bad_words - num_sequences

    request = convert(bad_words=["word"] * num_words, sampling=sampling)

    assert len(request.bad_words) + len(request.sampling.bad_words) == LIMITS.max_bad_words
    with pytest.raises(TooLargeError, match="129 bad words") as caught:
        convert(bad_words=["word"] * (num_words + 1), sampling=sampling)
    assert caught.value.param == "bad_words"


@pytest.mark.parametrize("name", ["john.doe", "José", "a b", "n" * 64])
def test_an_author_may_have_any_name(name: str) -> None:
    message = chat_pb2.ChatMessage(role=HELLO.role, content=HELLO.content, name=name)
    assert convert(messages=[message]).messages[0].name == name


def test_name_of_an_author_has_a_bound() -> None:
    message = chat_pb2.ChatMessage(role=HELLO.role, content=HELLO.content, name="n" * 65)
    with pytest.raises(InvalidRequestError, match="at most 64 characters, got 65") as caught:
        convert(messages=[message])
    assert caught.value.param == "messages[0].name"


def test_template_variables_that_are_null_are_not_set() -> None:
    request = convert(template_kwargs_json=b'{"enable_thinking": null, "level": 0}')
    assert request.template_variables == {"level": 0}


def test_parts_of_all_messages_count_together() -> None:
    limits = Limits(max_content_parts=4, max_request_parts=6)
    part = chat_pb2.ContentPart(text="")

    def read(*num_parts: int) -> ChatRequest:
        messages = [chat_pb2.ChatMessage(role=HELLO.role, content=[part] * n) for n in num_parts]
        message = chat_pb2.ChatCompletionRequest(messages=messages)
        return chat_request_from_proto(message, limits, MediaPolicy())

    assert read(4, 2).num_parts == 6
    with pytest.raises(TooLargeError, match="7 content parts is over the limit of 6") as caught:
        read(4, 2, 1)
    assert caught.value.param == "messages[2].content"
