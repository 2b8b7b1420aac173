"""Ask a running stack over gRPC and REST."""

from __future__ import annotations

import base64
import io
import json
import random
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from chiasm.v1 import chat_pb2, generator_pb2, media_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

REQUEST_TIMEOUT_S = 50.0


def picture(seed: int, width: int, height: int) -> bytes:
    """Return the PNG file of a picture of random blocks, different for every seed."""
    blocks = random.Random(seed).randbytes(5 * 5 * 3)
    image = Image.frombytes("RGB", (5, 5), blocks).resize((width, height), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def chat_request(
    question: str, pictures: Sequence[bytes], num_tokens: int
) -> chat_pb2.ChatCompletionRequest:
    """Return a greedy request for exactly ``num_tokens`` tokens, pictures as raw bytes."""
    parts = [
        chat_pb2.ContentPart(media=chat_pb2.MediaPart(modality=media_pb2.MODALITY_IMAGE, data=data))
        for data in pictures
    ]
    parts.append(chat_pb2.ContentPart(text=question))
    return chat_pb2.ChatCompletionRequest(
        messages=[chat_pb2.ChatMessage(role=chat_pb2.CHAT_ROLE_USER, content=parts)],
        sampling=generator_pb2.SamplingParams(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True
        ),
    )


def chat_body(question: str, pictures: Sequence[bytes], num_tokens: int) -> dict[str, Any]:
    """Return the REST body of the same request, pictures as data URLs."""
    content: list[dict[str, Any]] = [
        {
            "type": "image_url",
            "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()},
        }
        for data in pictures
    ]
    content.append({"type": "text", "text": question})
    return {
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": num_tokens,
        "ignore_eos": True,
    }


def post_chat(base_url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send a plain chat completion and return the answer; raise ``HTTPError`` on an error."""
    request = urllib.request.Request(
        f"{base_url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


@dataclass(frozen=True, slots=True)
class Refusal:
    """How a request was refused: HTTP status, the envelope's error, and the retry header."""

    status: int
    error: dict[str, Any]
    retry_after: str | None


def refused_chat(base_url: str, body: dict[str, Any]) -> Refusal:
    """Send a plain chat completion that must be refused and return how it was."""
    try:
        answer = post_chat(base_url, body)
    except urllib.error.HTTPError as refusal:
        with refusal:
            error = json.load(refusal)["error"]
            return Refusal(refusal.code, error, refusal.headers.get("retry-after"))
    raise AssertionError(f"the request was answered: {answer}")


def stream_chat(base_url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Send a streamed chat completion and return its events up to ``[DONE]``."""
    return list(iterate_chat(base_url, body))


def iterate_chat(base_url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Send a streamed chat completion and yield its events as they come, up to ``[DONE]``."""
    request = urllib.request.Request(
        f"{base_url}/v1/chat/completions",
        data=json.dumps({**body, "stream": True}).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
        for line in response:
            payload = line.decode().strip().removeprefix("data: ")
            if payload == "[DONE]":
                return
            if payload:
                yield json.loads(payload)
    raise AssertionError("the stream ended without [DONE]")


def joined_text(events: Sequence[dict[str, Any]]) -> str:
    """Return the text of a stream's events."""
    return "".join(
        choice["delta"].get("content") or "" for event in events for choice in event["choices"]
    )
