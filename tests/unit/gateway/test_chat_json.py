"""JSON of chat requests: what is refused because it would change the answer, and what is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson
import pytest

from chiasm.common.errors import InvalidRequestError
from chiasm.common.limits import Limits
from chiasm.gateway.media_policy import MediaPolicy
from chiasm.gateway.rest.chat_json import parse_chat
from chiasm.gateway.rest.multipart import ChatBody

if TYPE_CHECKING:
    from chiasm.gateway.rest.chat_json import ParsedChat

HELLO = {"role": "user", "content": "hello"}


def parse(**fields: object) -> ParsedChat:
    document = orjson.dumps({"messages": [HELLO], **fields})
    return parse_chat(ChatBody(document), "r", Limits(), MediaPolicy())


@pytest.mark.parametrize(
    ("name", "neutral", "other"),
    [
        ("skip_special_tokens", True, False),
        ("include_stop_str_in_output", False, True),
        ("return_token_ids", False, True),
        ("documents", [], [{"text": "x"}]),
        ("tools", [], [{"type": "function"}]),
        ("echo", False, True),
    ],
)
def test_fields_that_would_change_the_answer_are_refused_unless_they_change_nothing(
    name: str, neutral: object, other: object
) -> None:
    assert parse(**{name: neutral}).ignored == ()
    assert parse(**{name: None}).ignored == ()

    with pytest.raises(InvalidRequestError, match=f"`{name}` is not supported yet") as caught:
        parse(**{name: other})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": ""}}},
            "response_format",
        ),
        ({"guided_regex": ""}, "guided_regex"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs"),
    ],
)
def test_a_guide_that_is_no_guide_is_refused_by_the_name_of_its_field(
    fields: dict[str, object], param: str
) -> None:
    with pytest.raises(InvalidRequestError, match="must not be empty") as caught:
        parse(**fields)
    assert caught.value.param == param


def test_stream_options_that_say_nothing_need_no_stream() -> None:
    assert not parse(stream_options={}).is_stream
    assert not parse(stream_options={"include_usage": None}).includes_usage


@pytest.mark.parametrize("number", [-1, -2])
def test_all_alternatives_are_not_offered(number: int) -> None:
    with pytest.raises(InvalidRequestError, match="must be a positive value or 0") as caught:
        parse(logprobs=True, top_logprobs=number)
    assert caught.value.param == "top_logprobs"
