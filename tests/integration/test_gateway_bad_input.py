"""What a client does wrong is answered with a 4xx that names it, and nobody else notices."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from chiasm.common.errors import InvalidRequestError, MediaFetchError, TooLargeError
from tests.harness.gateway import MODEL, image_part, run_gateway

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from tests.harness.gateway import Gateway

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

FLAGS = ["--limit-mm-per-prompt", "image=2", "--max-body-bytes", "200000"]
TEXT = [{"role": "user", "content": "hi"}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    async with run_gateway(tmp_path_factory.mktemp("gateway"), FLAGS) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def gateway(shared_gateway: Gateway) -> AsyncIterator[Gateway]:
    """Yield the gateway, and check afterwards that it answers others."""
    shared_gateway.forget()
    shared_gateway.say("fine")
    yield shared_gateway
    assert (await shared_gateway.ask("still there?")).status == 200


def data_url(data: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": data}}


FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": None}, "messages", "messages must be an array, got null."),
    ({"messages": []}, "messages", "There must be 1 to 4096 messages, got 0."),
    ({"messages": ["hi"]}, "messages[0]", "messages[0] must be an object, got a string."),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "must be one of"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "must be a string or an array"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "got an integer"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "content parts"),
    ({"temperature": -1}, "temperature", "temperature must be non-negative, got -1."),
    ({"temperature": 101}, "temperature", "temperature must be at most 100, got 101."),
    ({"temperature": 1e300}, "temperature", "temperature must be at most 100"),
    ({"temperature": "hot"}, "temperature", "temperature must be a number, got a string."),
    ({"temperature": True}, "temperature", "temperature must be a number, got a boolean."),
    ({"top_p": 0}, "top_p", "top_p must be in (0, 1], got 0."),
    ({"top_p": 1.5}, "top_p", "top_p must be in (0, 1], got 1.5."),
    ({"top_k": -2}, "top_k", "top_k must be 0 (disable), or at least 1, got -2."),
    ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, got 0."),
    ({"max_completion_tokens": -3}, "max_completion_tokens", "must be at least 1, got -3."),
    ({"max_tokens": 513}, "max_tokens", "max_tokens=513 cannot be greater than max_model_len=512."),
    ({"max_tokens": 1.5}, "max_tokens", "max_tokens must be an integer, got a number."),
    ({"seed": 2**64}, "seed", "seed must be an integer, got a number."),
    ({"n": 17}, "n", "n must be between 1 and 16, got 17."),
    ({"n": 0}, "n", "n must be at least 1, got 0."),
    ({"n": -1}, "n", "n must be at least 1, got -1."),
    ({"n": 10**6}, "n", "n must be between 1 and 16"),
    ({"n": "1"}, "n", "n must be an integer, got a string."),
    ({"stop": [5]}, "stop", "stop must hold strings only."),
    ({"stop": [""]}, "stop", "A stop string must have 1 to 256 characters, got 0."),
    ({"stop": "x" * 257}, "stop", "A stop string must have 1 to 256 characters, got 257."),
    ({"stop": ["x"] * 17}, "stop", "stop must have at most 16 strings, got 17."),
    ({"stop_token_ids": [1000]}, "stop_token_ids", "below the vocabulary size 1000, got 1000."),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "stop_token_ids must hold token ids."),
    ({"stream": "yes"}, "stream", "stream must be a boolean, got a string."),
    (
        {"stream_options": {"include_usage": True}},
        "stream_options",
        "can only be defined when `stream=True`.",
    ),
    ({"cache_salt": ""}, "cache_salt", "'cache_salt' must be a non-empty string if provided."),
    ({"cache_salt": "a/b"}, "cache_salt", "must be at most 128 characters"),
    ({"priority": 2**31}, "priority", "priority must be between"),
    ({"chat_template": "x"}, "chat_template", "Refused request with untrusted chat template."),
    ({"chat_template_kwargs": {"a": [1]}}, "chat_template_kwargs.a", "must hold booleans"),
    ({"chat_template_kwargs": {"n": 1e9}}, "chat_template_kwargs.n", "must hold booleans"),
    ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs", "must not set"),
    ({"logprobs": 1}, "logprobs", "logprobs must be a boolean, got an integer."),
    ({"top_logprobs": 2}, "top_logprobs", "when using `top_logprobs`, `logprobs` must be set to"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "must be a positive value or 0."),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "greater than max allowed: 20"),
    ({"min_p": 1.5}, "min_p", "min_p must be in [0, 1], got 1.5."),
    ({"repetition_penalty": 0}, "repetition_penalty", "must be greater than zero, got 0."),
    ({"presence_penalty": 3}, "presence_penalty", "must be in [-2, 2], got 3."),
    ({"frequency_penalty": "x"}, "frequency_penalty", "must be a number, got a string."),
    ({"logit_bias": {"x": 1}}, "logit_bias", "logit_bias must have token ids as its keys."),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "must have token ids as its keys."),
    ({"logit_bias": {"1": "x"}}, "logit_bias", "logit_bias must have numbers as its values."),
    ({"logit_bias": {"1000": 1}}, "logit_bias", "below the vocabulary size 1000, got 1000."),
    ({"bad_words": [1]}, "bad_words", "bad_words must hold strings only."),
    ({"bad_words": [" "]}, "bad_words", "bad_words must hold words, got an empty one."),
    ({"allowed_token_ids": []}, "allowed_token_ids", "is not None and empty!"),
    ({"allowed_token_ids": [1000]}, "allowed_token_ids", "below the vocabulary size 1000"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "must be a positive value or 0."),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "greater than max allowed: 20"),
    ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs", "when `stream=True`."),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "must be at least 1, or -1"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "must be at least 1, or -1"),
    ({"truncate_prompt_tokens": 513}, "truncate_prompt_tokens", "than max_model_len (512)."),
    ({"truncation_side": "top"}, "truncation_side", "must be 'left' or 'right'."),
    ({"truncation_side": []}, "truncation_side", "must be a string, got an array."),
    ({"truncation_side": {}}, "truncation_side", "must be a string, got an object."),
    ({"min_tokens": -1}, "min_tokens", "must be greater than or equal to 0, got -1."),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "less than or equal to max_tokens=4"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_object or json_schema."),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
        "needs a schema.",
    ),
    ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex", "must be a string"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least one."),
    ({"structured_outputs": {"tag": 1}}, "structured_outputs.tag", "`tag` is not supported."),
    ({"guided_choice": ["a", 1]}, "guided_choice", "must hold strings, at least one."),
    ({"structured_outputs": {"regex": ""}}, "structured_outputs", "must not be empty."),
    (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
        "You can only use one kind of constraints",
    ),
    ({"request_id": "a b"}, "request_id", "request_id must have 1 to 128 characters"),
]


@pytest.mark.parametrize(("fields", "param", "text"), FIELDS, ids=lambda value: str(value)[:40])
async def test_a_wrong_field_is_named(
    gateway: Gateway, fields: Mapping[str, Any], param: str, text: str
) -> None:
    reply = await gateway.post({"model": MODEL, "messages": TEXT, **fields})

    assert reply.status == 400, reply.body
    assert reply.error["param"] == param
    assert text in str(reply.error["message"])
    assert reply.error["type"] == "BadRequestError"


PARTS: list[tuple[object, str, str]] = [
    ({"type": "hologram"}, ".type", "Unsupported chat content part type: 'hologram'. Supported"),
    ({"type": 5}, ".type", "Invalid 'type' field in multimodal part."),
    ({"picture": 1}, ".type", "Missing 'type' field in multimodal part."),
    (7, "", "must be an object, got an integer."),
    ({"type": "text"}, ".text", "must be a string, got null."),
    ({"type": "image_url", "image_url": "data:,x"}, ".image_url", "must be an object with a url"),
    ({"type": "image_url", "image_url": None}, "", "multi_modal_uuids['image'][0] is missing."),
    ({"type": "image_url", "image_url": {"url": 5}}, ".image_url.url", "must be a string"),
    (data_url("data:image/png;base64"), "", "missing ',' separator."),
    (data_url("data:image/png,abc"), "", "Only base64 data URLs are supported for now."),
    (data_url("data:image/png;base64,@@@@"), "", "is not valid base64"),
    (data_url("data:image/png;base64,YWJ"), "", "is not valid base64"),
    (data_url("data:image/png;base64,"), "", "The data URL has no content."),
    (image_part(b"x", uuid=""), ".uuid", "A uuid must not be empty."),
    (image_part(b"x", uuid="é"), ".uuid", "A uuid must have 1 to 512 characters"),
    (image_part(b"x", uuid="u" * 513), ".uuid", "A uuid must have 1 to 512 characters"),
    (image_part(b"x", min_pixels=0), ".min_pixels", "min_pixels must be between 1 and"),
    (image_part(b"x", min_pixels=9, max_pixels=5), ".min_pixels", "must not be above max_pixels."),
    (
        {"type": "video_url", "video_url": {"url": "http://a/b"}},
        "",
        "At most 0 video(s) may be provided in one prompt.",
    ),
    (
        {"type": "input_audio", "input_audio": {"data": "YWJj", "format": "wav"}},
        "",
        "At most 0 audio(s) may be provided in one prompt.",
    ),
]


@pytest.mark.parametrize(("part", "suffix", "text"), PARTS, ids=lambda value: str(value)[:40])
async def test_a_wrong_part_is_named(
    gateway: Gateway, part: object, suffix: str, text: str
) -> None:
    messages = [
        {"role": "system", "content": "x"},
        {"role": "user", "content": ["look", part]},
    ]

    reply = await gateway.post({"model": MODEL, "messages": messages})

    assert reply.status == 400, reply.body
    assert reply.error["param"] == f"messages[1].content[1]{suffix}"
    assert text in str(reply.error["message"])


async def test_one_image_more_than_the_limit_is_refused_and_the_limit_is_not(
    gateway: Gateway,
) -> None:
    two = [image_part(b"a"), image_part(b"b")]

    assert (await gateway.ask(two)).status == 200
    reply = await gateway.ask([*two, image_part(b"c")])

    assert reply.status == 400
    assert reply.error["param"] == "messages[0].content[2]"
    assert reply.error["message"] == (
        "At most 2 image(s) may be provided in one prompt."
        " Set `--limit-mm-per-prompt` to increase this limit."
    )


ENCODER_ERRORS = [
    (InvalidRequestError("Failed to load image: truncated.", reason="INVALID_MEDIA"), 400),
    (MediaFetchError("Failed to fetch media from URL: HTTP 404 error"), 422),
    (TooLargeError("Image dimensions 9x9 exceed the maximum."), 413),
]


@pytest.mark.parametrize(("error", "status"), ENCODER_ERRORS, ids=["broken", "fetch", "large"])
async def test_what_the_encoder_refuses_names_the_part(
    gateway: Gateway, error: InvalidRequestError, status: int
) -> None:
    gateway.encoder.errors[b"bad"] = error

    reply = await gateway.ask([image_part(b"good"), image_part(b"bad")])

    assert reply.status == status
    assert reply.error["message"] == error.message
    assert reply.error["param"] == "messages[0].content[1]"
    assert reply.error["code"] == error.reason.lower()
    assert gateway.generator.starts == []


async def test_an_unknown_model_is_not_found(gateway: Gateway) -> None:
    reply = await gateway.post({"model": "gpt-9", "messages": TEXT})

    assert reply.status == 404
    assert reply.error == {
        "message": f"The model `gpt-9` does not exist. Valid aliases: {MODEL}.",
        "type": "NotFoundError",
        "param": "model",
        "code": "model_not_found",
    }


async def test_a_text_too_long_is_refused_before_anything_is_encoded(gateway: Gateway) -> None:
    reply = await gateway.ask([image_part(b"a"), {"type": "text", "text": "x " * 600}])

    assert reply.status == 400
    assert reply.error["param"] == "input_tokens"
    assert reply.error["code"] == "prompt_too_long"
    assert str(reply.error["message"]).startswith(
        "This model's maximum context length is 512 tokens. However, your prompt contains "
    )
    assert gateway.encoder.headers == []


async def test_a_text_of_too_many_characters_is_refused_before_it_is_encoded(
    gateway: Gateway,
) -> None:
    reply = await gateway.ask("x" * 50_000)

    assert reply.status == 400
    assert reply.error["param"] == "input_text"
    assert "50000 characters" in str(reply.error["message"])


async def test_a_prompt_may_fill_the_context_but_for_one_token(gateway: Gateway) -> None:
    await gateway.ask([image_part(b"a")])
    room = 512 - len(gateway.generator.starts[0].token_ids)
    assert (await gateway.ask([image_part(b"a"), "0" * (room - 1)])).status == 200
    assert gateway.generator.starts[1].sampling.max_tokens == 1

    full = await gateway.ask([image_part(b"a"), "0" * room])
    over = await gateway.ask([image_part(b"a"), "0" * (room + 1)])

    assert "plus the number of requested output tokens (at least 1)" in full.error["message"]
    assert "is longer than the maximum model length of 512" in over.error["message"]


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"\xff", b'{"a":' * 5000, b'"\\ud800"', b"", b"null"], ids=repr
)
async def test_a_body_that_is_no_json_object_is_refused(gateway: Gateway, body: bytes) -> None:
    reply = await gateway.post(None, data=body)

    assert reply.status == 400
    assert str(reply.error["message"]).startswith("The body ")


async def test_a_wrong_content_type_is_refused(gateway: Gateway) -> None:
    reply = await gateway.post({}, {"content-type": "text/plain"})

    assert reply.status == 400
    assert reply.error["message"] == "Unsupported Media Type: Only 'application/json' is allowed"


async def test_a_body_over_the_limit_is_refused_at_the_limit(gateway: Gateway) -> None:
    frame = len(json.dumps({"model": MODEL, "messages": TEXT, "user": ""}))
    within = {"model": MODEL, "messages": TEXT, "user": "x" * (200_000 - frame)}
    over = {"model": MODEL, "messages": TEXT, "user": "x" * (200_001 - frame)}

    assert (await gateway.post(within)).status == 200
    assert (await gateway.post(over)).status == 413


async def test_a_body_without_length_is_refused_when_it_grows_over_the_limit(
    gateway: Gateway,
) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield b"x" * 10_000

    url = f"{gateway.url}/v1/chat/completions"
    headers = {"content-type": "application/json"}
    async with gateway.http.post(url, data=endless(), headers=headers) as response:
        assert response.status == 413
        assert (await response.json())["error"]["code"] == "too_large"


async def test_a_body_that_does_not_arrive_in_time_is_the_client_s_fault(tmp_path: Path) -> None:
    async def slowly() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)

    async with run_gateway(tmp_path, ["--body-timeout-s", "0.2"]) as gateway:
        headers = {"content-type": "application/json"}
        url = f"{gateway.url}/v1/chat/completions"
        async with gateway.http.post(url, data=slowly(), headers=headers) as response:
            assert response.status == 408
            assert (await response.json())["error"]["code"] == "body_timeout"


async def test_template_variables_nested_too_deeply_are_named(gateway: Gateway) -> None:
    nested = b'{"a":' * 300 + b"1" + b"}" * 300
    messages = b'"messages":[{"role":"user","content":"x"}]'

    reply = await gateway.post(
        None, data=b'{"chat_template_kwargs":' + nested + b"," + messages + b"}"
    )

    assert reply.status == 400
    assert reply.error["param"] == "chat_template_kwargs"


async def test_a_media_item_over_its_limit_is_too_large(tmp_path: Path) -> None:
    async with run_gateway(tmp_path) as gateway:
        gateway.say("fine")
        content = "A" * (4 * ((33 << 20) // 3))
        reply = await gateway.ask([data_url(f"data:image/png;base64,{content}")])

    assert reply.status == 413
    assert reply.error["param"] == "messages[0].content[0]"


async def test_a_large_image_arrives_whole(tmp_path: Path) -> None:
    data = bytes(range(256)) * 12_000
    async with run_gateway(tmp_path) as gateway:
        gateway.say("fine")
        reply = await gateway.ask([image_part(data)])

        assert reply.status == 200
        assert gateway.encoder.sources == [data]


@pytest.mark.parametrize("path", ["/nope", "/v1/nope", "/v1/chat/completions/", "/V1/models"])
async def test_an_unknown_route_is_not_found_in_the_envelope(gateway: Gateway, path: str) -> None:
    reply = await gateway.get(path)

    assert reply.status in (404, 405)
    assert set(reply.error) == {"message", "type", "param", "code"}


async def test_a_wrong_method_is_refused_in_the_envelope(gateway: Gateway) -> None:
    reply = await gateway.get("/v1/chat/completions")

    assert reply.status == 405
    assert reply.error["code"] == "method_not_allowed"
    assert reply.headers["allow"] == "POST"


async def test_base64_of_any_length_is_checked_strictly(gateway: Gateway) -> None:
    text = base64.b64encode(b"picture").decode()
    assert (await gateway.ask([data_url(f"data:;base64,{text}")])).status == 200
    assert (await gateway.ask([data_url(f"data:;base64,{text[:-1]}")])).status == 400
    assert (await gateway.ask([data_url(f"data:;base64, {text}")])).status == 400
