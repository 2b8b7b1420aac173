"""Bounds on what one request may have, from both sides."""

from __future__ import annotations

import pytest

from chiasm.common.errors import TooLargeError
from chiasm.common.limits import Limits
from chiasm.gateway.convert import chat_request_from_proto
from chiasm.gateway.media_policy import MediaPolicy
from chiasm.v1 import chat_pb2


def chat_of(*num_parts: int) -> chat_pb2.ChatCompletionRequest:
    """Return a request with a message for each number of parts."""
    return chat_pb2.ChatCompletionRequest(
        messages=[
            chat_pb2.ChatMessage(
                role=chat_pb2.CHAT_ROLE_USER, content=[chat_pb2.ContentPart(text="")] * count
            )
            for count in num_parts
        ]
    )


def test_parts_of_all_messages_count_together() -> None:
    limits = Limits(max_content_parts=4, max_request_parts=6)

    request = chat_request_from_proto(chat_of(4, 2), limits, MediaPolicy())

    assert request.num_parts == 6
    with pytest.raises(TooLargeError, match="7 content parts is over the limit of 6") as caught:
        chat_request_from_proto(chat_of(4, 2, 1), limits, MediaPolicy())
    assert caught.value.param == "messages[2].content"
