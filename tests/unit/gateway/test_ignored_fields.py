"""Fields without effect: all are listed, wherever they stand, as far as a header holds them."""

from __future__ import annotations

import orjson
import pytest

from chiasm.common.limits import Limits
from chiasm.gateway.media_policy import MediaPolicy
from chiasm.gateway.rest.chat_json import parse_chat
from chiasm.gateway.rest.ignored_fields import MAX_LISTED_CHARS, list_ignored
from chiasm.gateway.rest.multipart import ChatBody

URL = "http://a/b"


def ignored(*messages: object, **fields: object) -> tuple[str, ...]:
    document = orjson.dumps({"messages": messages, **fields})
    return parse_chat(ChatBody(document), "r", Limits(), MediaPolicy()).ignored


def ignored_of_part(part: object) -> tuple[str, ...]:
    return ignored({"role": "user", "content": ["x", part]})


@pytest.mark.parametrize(
    ("part", "path"),
    [
        ({"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}, "cache_control"),
        ({"text": "x", "foo": 1}, "foo"),
        ({"type": "image_url", "image_url": {"url": URL}, "foo": 1}, "foo"),
        ({"type": "image_url", "image_url": {"url": URL, "foo": 1}}, "image_url.foo"),
        ({"type": "input_audio", "input_audio": {"data": "eA==", "rate": 1}}, "input_audio.rate"),
        ({"type": "video", "video": [{"type": "image_url", "url": URL, "at": 1}]}, "video[0].at"),
        (
            {"type": "video", "video": [{"image_url": {"url": URL, "at": 1}}]},
            "video[0].image_url.at",
        ),
        (
            {
                "type": "image_embeds",
                "image_embeds": {"dtype": "float32", "shape": [1], "data": "AAAAAA==", "foo": 1},
            },
            "image_embeds.foo",
        ),
    ],
)
def test_unknown_field_of_a_part_is_listed_by_its_path(part: object, path: str) -> None:
    assert ignored_of_part(part) == (f"messages[0].content[1].{path}",)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "x"},
        {"type": "refusal", "refusal": "x"},
        {"type": "image_url", "image_url": {"url": URL, "detail": "low"}, "uuid": "u"},
        {"type": "image_url", "image_url": None, "uuid": "u", "max_pixels": 5},
        {"type": "input_audio", "input_audio": {"data": "eA==", "format": "mp3"}},
        {"type": "video", "video": [{"type": "image_url", "image_url": URL}, {"url": URL}, URL]},
        {"type": "video_url", "video_url": {"url": URL, "fps": 1}, "num_frames": None},
    ],
)
def test_known_fields_of_a_part_are_not_listed(part: object) -> None:
    assert ignored_of_part(part) == ()


def test_calls_of_tools_in_the_history_are_listed() -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    history = [
        {"role": "user", "content": "x", "name": "anna"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "x", "tool_call_id": "1"},
    ]

    assert ignored(*history) == ("messages[1].tool_calls", "messages[2].tool_call_id")


def test_unknown_field_of_a_response_format_is_listed_but_not_what_is_always_so() -> None:
    schema = {"name": "n", "strict": True, "schema": {"type": "object"}}
    hello = {"role": "user", "content": "x"}

    assert ignored(hello, response_format={"type": "json_schema", "json_schema": schema}) == ()
    assert ignored(
        hello,
        response_format={
            "type": "json_schema",
            "json_schema": {**schema, "description": "d"},
            "foo": 1,
        },
    ) == ("response_format.foo", "response_format.json_schema.description")
    assert ignored(hello, response_format={"type": "text", "foo": 1}) == ("response_format.foo",)


def test_unknown_field_of_stream_options_is_listed() -> None:
    options = {"include_usage": True, "foo": 1}
    assert ignored({"role": "user", "content": "x"}, stream=True, stream_options=options) == (
        "stream_options.foo",
    )


def test_a_list_too_long_for_a_header_ends_in_dots() -> None:
    fits = list_ignored(["x" * 100] * 20)
    cut = list_ignored(["x" * 100] * 21)

    assert fits == ("x" * 100,) * 20
    assert cut == (*fits, "...")
    assert len(", ".join(cut)) <= MAX_LISTED_CHARS
    assert len(", ".join(list_ignored("x" for _ in range(5000)))) <= MAX_LISTED_CHARS


def test_names_that_a_header_cannot_carry_are_changed_and_cut() -> None:
    assert list_ignored(["a b,\r\né", "y" * 500]) == ("a?b????", "y" * 128)
