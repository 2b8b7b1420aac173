"""Stream chat completions and time them as a client sees them."""

from __future__ import annotations

import base64
import io
import random
import time
from dataclasses import dataclass

import aiohttp
import orjson
from PIL import Image

REQUEST_TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one request; times in seconds since it was sent.

    Attributes:
        status: HTTP status; 0 if the connection broke.
        error: Error code and message; empty if the stream ended with a finish reason.
        num_tokens: Completion tokens by the server's usage.
    """

    status: int
    error: str
    text: str
    ttft_s: float
    total_s: float
    num_tokens: int

    @property
    def is_complete(self) -> bool:
        """Whether the stream ended with a finish reason and carried tokens."""
        return not self.error and self.num_tokens > 0


@dataclass(slots=True)
class _Progress:
    """What a stream has delivered so far."""

    text: str = ""
    ttft_s: float = 0.0
    num_tokens: int = 0
    is_finished: bool = False
    error: str = ""


async def stream_chat(
    session: aiohttp.ClientSession, base_url: str, body: dict[str, object]
) -> Answer:
    """Send ``body`` as a streamed chat completion and read the stream to its end."""
    start = time.perf_counter()
    progress = _Progress()
    status = 0
    payload = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with session.post(
            f"{base_url}/v1/chat/completions",
            data=orjson.dumps(payload),
            headers={"content-type": "application/json"},
            timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
        ) as response:
            status = response.status
            if status != 200:
                progress.error = (await response.text())[:300]
            else:
                async for line in response.content:
                    _read_line(line.strip(), progress, start)
    except (aiohttp.ClientError, TimeoutError) as error:
        progress.error = f"{type(error).__name__}: {error}"
    if not progress.error and not progress.is_finished:
        progress.error = "the stream ended without a finish reason"
    return Answer(
        status=status,
        error=progress.error,
        text=progress.text,
        ttft_s=progress.ttft_s,
        total_s=time.perf_counter() - start,
        num_tokens=progress.num_tokens,
    )


def picture_message(question: str, *pictures: bytes) -> list[dict[str, object]]:
    """Return the messages that ask ``question`` about ``pictures`` (PNG or JPEG files)."""
    parts: list[dict[str, object]] = [
        {"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def data_url(picture: bytes) -> str:
    """Return the data URL of a picture file."""
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def noise_picture(seed: int, width: int, height: int) -> bytes:
    """Return the PNG file of a picture of random blocks, different for every seed."""
    blocks = random.Random(seed).randbytes(8 * 8 * 3)
    picture = Image.frombytes("RGB", (8, 8), blocks).resize(
        (width, height), Image.Resampling.NEAREST
    )
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _read_line(line: bytes, progress: _Progress, start: float) -> None:
    if not line.startswith(b"data: ") or line == b"data: [DONE]":
        return
    event = orjson.loads(line[6:])
    if "error" in event:
        progress.error = str(event["error"])
        return
    if event.get("usage"):
        progress.num_tokens = event["usage"]["completion_tokens"]
    for choice in event.get("choices", []):
        piece = choice["delta"].get("content")
        if piece:
            progress.ttft_s = progress.ttft_s or time.perf_counter() - start
            progress.text += piece
        if choice.get("finish_reason"):
            progress.ttft_s = progress.ttft_s or time.perf_counter() - start
            progress.is_finished = True
