"""Bad input through the whole stack: a 4xx each, other requests untouched, no process lost.

The same requests go over REST and gRPC; the messages are vLLM's where it has one.
"""

from __future__ import annotations

import base64
import json
import socket
import threading
import urllib.error
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from chiasm.v1 import chat_pb2, chat_pb2_grpc, generator_pb2, media_pb2
from tests.fakes.checkpoints import make_qwen2_vl
from tests.harness import chat
from tests.harness.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

SERVICES = ("redis", "encoder-0", "generator", "gateway")
GOOD_PICTURE = chat.picture(1, 64, 64)
IMAGE_PARAM = "messages[0].content[0]"


@dataclass(frozen=True, slots=True)
class BadRequest:
    """A REST body and what must come back for it."""

    name: str
    body: dict[str, Any]
    status: int
    message: str
    param: str = ""


def with_url(url: object, **part: object) -> dict[str, Any]:
    body = chat.chat_body("What?", [GOOD_PICTURE], 4)
    body["messages"][0]["content"][0]["image_url"] = {"url": url}
    body["messages"][0]["content"][0].update(part)
    return body


def with_bytes(data: bytes) -> dict[str, Any]:
    return with_url("data:image/png;base64," + base64.b64encode(data).decode())


def text_with(**fields: object) -> dict[str, Any]:
    return {**chat.chat_body("What?", [], 4), **fields}


def with_part(part: dict[str, Any]) -> dict[str, Any]:
    return text_with(messages=[{"role": "user", "content": [part]}])


BAD_REQUESTS = [
    BadRequest("empty file", with_bytes(b""), 400, "", IMAGE_PARAM),
    BadRequest("text file", with_bytes(b"hello" * 50), 400, "cannot identify image", IMAGE_PARAM),
    BadRequest(
        "truncated file", with_bytes(GOOD_PICTURE[:-40]), 400, "Failed to load image", IMAGE_PARAM
    ),
    BadRequest(
        "header only", with_bytes(GOOD_PICTURE[:33]), 400, "Failed to load image", IMAGE_PARAM
    ),
    BadRequest("wrong base64", with_url("data:image/png;base64,@@@@"), 400, "", IMAGE_PARAM),
    BadRequest(
        "no comma", with_url("data:image/png;base64"), 400, "missing ',' separator", IMAGE_PARAM
    ),
    BadRequest(
        "not base64",
        with_url("data:image/png,abc"),
        400,
        "Only base64 data URLs are supported",
        IMAGE_PARAM,
    ),
    BadRequest(
        "other scheme",
        with_url("ftp://example.com/a.png"),
        400,
        "The URL must be either a HTTP, data or file URL.",
        IMAGE_PARAM,
    ),
    BadRequest("loopback", with_url("http://127.0.0.1:9/a.png"), 400, "", IMAGE_PARAM),
    BadRequest("backslash", with_url("http://allowed.com\\@127.0.0.1/"), 400, "", IMAGE_PARAM),
    BadRequest("null without uuid", with_url(None), 400, "", IMAGE_PARAM),
    BadRequest(
        "unknown uuid",
        with_part({"type": "image_url", "image_url": None, "uuid": "unknown"}),
        400,
        "Cache miss for image at index 0 but data is not provided.",
        IMAGE_PARAM,
    ),
    BadRequest(
        "unknown part",
        with_part({"type": "smell"}),
        400,
        "Unsupported chat content part type: 'smell'",
        IMAGE_PARAM,
    ),
    BadRequest(
        "broken video",
        with_part({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}),
        400,
        "Failed to load video: it is no MP4, QuickTime, WebM, Matroska or AVI file",
        IMAGE_PARAM,
    ),
    BadRequest(
        "sound",
        with_part({"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,AAAA"}}),
        400,
        "At most 0 audio(s) may be provided in one prompt.",
        IMAGE_PARAM,
    ),
    BadRequest(
        "too many",
        chat.chat_body("What?", [GOOD_PICTURE] * 4, 4),
        400,
        "At most 3 image(s) may be provided in one prompt.",
        "",
    ),
    BadRequest(
        "long prompt",
        text_with(messages=[{"role": "user", "content": "word " * 4000}]),
        400,
        "maximum context length is 2048 tokens",
        "",
    ),
    BadRequest(
        "unknown model", text_with(model="nope"), 404, "The model `nope` does not exist.", "model"
    ),
    BadRequest("messages not a list", text_with(messages="hi"), 400, "", "messages"),
    BadRequest("no messages", text_with(messages=[]), 400, "", "messages"),
    BadRequest(
        "text not a string",
        text_with(messages=[{"role": "user", "content": 5}]),
        400,
        "",
        "messages[0].content",
    ),
    BadRequest("temperature", text_with(temperature=-1), 400, "temperature", "temperature"),
    BadRequest("temperature text", text_with(temperature="hot"), 400, "", "temperature"),
    BadRequest("top_p", text_with(top_p=0), 400, "top_p", "top_p"),
    BadRequest("top_k", text_with(top_k=-7), 400, "top_k", "top_k"),
    BadRequest("max_tokens", text_with(max_tokens=0), 400, "max_tokens", "max_tokens"),
    BadRequest(
        "max_tokens large",
        text_with(max_tokens=10**6),
        400,
        "max_tokens=1000000 cannot be greater than max_model_len=2048",
        "max_tokens",
    ),
    BadRequest("n", text_with(n=10**6), 400, "", "n"),
    BadRequest("stop", text_with(stop=["x"] * 1000), 400, "", "stop"),
]

# In bounds, and far beyond what anybody means: logits that overflow have no probabilities.
EXTREME_WISHES: list[dict[str, Any]] = [
    {"temperature": 1, "repetition_penalty": 1.4e-45},
    {"temperature": 1, "repetition_penalty": 1.4e-45, "top_p": 0.9},
    {"temperature": 2e-5, "repetition_penalty": 1e-38},
    {
        "temperature": 1,
        "repetition_penalty": 3e38,
        "allowed_token_ids": [5],
        "logit_bias": {"5": -100},
    },
]


@dataclass(slots=True)
class Watched:
    """A stack, and its process ids at the start."""

    stack: Stack
    pids: dict[str, int] = field(default_factory=dict)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    model = make_qwen2_vl(tmp_path_factory.mktemp("model"))
    stack = Stack(model, ["--dtype", "float32", "--limit-mm-per-prompt", "image=3"])
    yield Watched(stack, {name: stack.pid(name) for name in SERVICES})
    assert stack.stop() == 0


@pytest.mark.parametrize("bad", BAD_REQUESTS, ids=lambda bad: bad.name)
def test_a_bad_request_over_rest_is_refused_with_message_and_param(
    watched: Watched, bad: BadRequest
) -> None:
    refusal = chat.refused_chat(watched.stack.base_url, bad.body)

    error = refusal.error
    assert refusal.status == bad.status, error
    assert bad.message in error["message"]
    assert error["message"]
    assert "0x" not in error["message"]
    assert (error["param"] or "").startswith(bad.param)


@pytest.mark.parametrize("bad", BAD_REQUESTS, ids=lambda bad: bad.name)
def test_a_bad_request_streamed_is_refused_before_or_in_the_stream(
    watched: Watched, bad: BadRequest
) -> None:
    status, message = bad.status, ""
    try:
        events = chat.stream_chat(watched.stack.base_url, bad.body)
        message = events[-1]["error"]["message"]
    except urllib.error.HTTPError as refused:
        with refused:
            status, message = refused.code, json.load(refused)["error"]["message"]

    assert status == bad.status
    assert bad.message in message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", ""),
        (b"not an image" * 20, "cannot identify image"),
        (GOOD_PICTURE[:-40], "Failed to load image"),
    ],
    ids=["empty", "text", "truncated"],
)
def test_bad_bytes_over_grpc_are_an_invalid_argument(
    watched: Watched, data: bytes, message: str
) -> None:
    part = chat_pb2.MediaPart(modality=media_pb2.MODALITY_IMAGE, data=data)
    request = chat_pb2.ChatCompletionRequest(
        messages=[
            chat_pb2.ChatMessage(
                role=chat_pb2.CHAT_ROLE_USER, content=[chat_pb2.ContentPart(media=part)]
            )
        ],
        sampling=generator_pb2.SamplingParams(max_tokens=4),
    )
    with grpc.insecure_channel(watched.stack.grpc_address) as channel:
        stub = chat_pb2_grpc.ChatServiceStub(channel)
        with pytest.raises(grpc.RpcError) as raised:
            stub.ChatCompletion(request, timeout=chat.REQUEST_TIMEOUT_S)

    assert isinstance(raised.value, grpc.Call)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in (raised.value.details() or "")


def test_a_running_answer_is_untouched_by_bad_requests_beside_it(watched: Watched) -> None:
    url = watched.stack.base_url
    body = chat.chat_body("What is this?", [GOOD_PICTURE], 300)
    alone = chat.joined_text(chat.stream_chat(url, body))
    running = chat.iterate_chat(url, body)
    events = [next(running)]

    for bad in BAD_REQUESTS[:8]:
        assert chat.refused_chat(url, bad.body).status == bad.status
    events += running

    assert chat.joined_text(events) == alone


def test_a_running_answer_is_untouched_by_extreme_wishes_beside_it(watched: Watched) -> None:
    url = watched.stack.base_url
    body = chat.chat_body("What is this?", [GOOD_PICTURE], 600)
    alone = chat.joined_text(chat.stream_chat(url, body))
    running = chat.iterate_chat(url, body)
    events = [next(running)]

    for wishes in EXTREME_WISHES:
        answer = chat.post_chat(url, {**text_with(max_tokens=8), **wishes})
        assert answer["choices"][0]["finish_reason"] in ("stop", "length")
    events += running

    assert chat.joined_text(events) == alone


def test_clients_that_leave_with_requests_queued_are_no_errors(watched: Watched) -> None:
    host, port = watched.stack.base_url.removeprefix("http://").split(":")
    for stay_s in (0.01, 0.02, 0.05, 0.1):
        with ExitStack() as clients:
            for _ in range(20):
                client = clients.enter_context(socket.create_connection((host, int(port))))
                client.sendall(20 * b"GET /v1/media HTTP/1.1\r\nHost: x\r\n\r\n")
            # Nothing can be waited for: some answers are to be on their way when all leave.
            threading.Event().wait(stay_s)
    assert chat.post_chat(watched.stack.base_url, text_with())["choices"]

    assert [line for line in watched.stack.lines if "Traceback" in line] == []


def test_every_process_outlived_the_bad_requests(watched: Watched) -> None:
    assert {name: watched.stack.pid(name) for name in SERVICES} == watched.pids
