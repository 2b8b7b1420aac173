"""Stream one chat completion from any OpenAI-compatible server and time it."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

_MAX_ERROR_CHARS = 300


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server under measurement.

    Attributes:
        name: Its name in the table.
        url: Address without ``/v1``.
        model: The model's name in its requests.
        api_key: Sent as a bearer token, if there is one.
        max_concurrency: It is not measured in cells above; 0 for no bound.
    """

    name: str
    url: str
    model: str
    api_key: str = ""
    max_concurrency: int = 0

    def is_measured_at(self, concurrency: int) -> bool:
        """Return whether cells of ``concurrency`` are measured."""
        return not self.max_concurrency or concurrency <= self.max_concurrency


@dataclass(slots=True)
class Timing:
    """One request; times in seconds since it was sent.

    Attributes:
        arrivals_s: When each delta with text came.
        total_s: When the stream ended.
        num_tokens: Completion tokens by the server's usage; deltas where it tells none.
        error: Why the request failed; empty if it ended with a finish reason.
    """

    arrivals_s: list[float] = field(default_factory=list)
    total_s: float = 0.0
    num_tokens: int = 0
    error: str = ""
    is_finished: bool = False

    def gaps_s(self) -> list[float]:
        """Return the gaps between deltas with text."""
        pairs = zip(self.arrivals_s, self.arrivals_s[1:], strict=False)
        return [later - earlier for earlier, later in pairs]

    def time_per_token_s(self) -> float | None:
        """Return the mean time of a token behind the first; ``None`` if there is none."""
        if self.num_tokens < 2 or not self.arrivals_s:
            return None
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / (self.num_tokens - 1)


async def stream_chat(
    session: aiohttp.ClientSession, endpoint: Endpoint, body: dict[str, Any], timeout_s: float
) -> Timing:
    """Stream ``body`` from ``endpoint``; whatever fails is told in the timing's ``error``."""
    timing = Timing()
    start = time.perf_counter()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    payload = {**body, "model": endpoint.model, **options}
    try:
        async with asyncio.timeout(timeout_s):
            await _read_answer(session, endpoint, payload, timing, start)
    except TimeoutError:
        timing.error = f"no end after {timeout_s:g} s"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        timing.error = f"{type(error).__name__}: {error}"
    timing.total_s = time.perf_counter() - start
    timing.num_tokens = timing.num_tokens or len(timing.arrivals_s)
    if not timing.error and not timing.is_finished:
        timing.error = "the stream ended without a finish reason"
    return timing


async def _read_answer(
    session: aiohttp.ClientSession,
    endpoint: Endpoint,
    payload: dict[str, Any],
    timing: Timing,
    start: float,
) -> None:
    url = f"{endpoint.url.rstrip('/')}/v1/chat/completions"
    headers = {"authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    no_limit = aiohttp.ClientTimeout(total=None)  # the caller's deadline holds
    async with session.post(url, json=payload, headers=headers, timeout=no_limit) as response:
        if response.status != 200:
            text = await response.text()
            timing.error = f"status {response.status}: {text[:_MAX_ERROR_CHARS]}"
            return
        async for line in response.content:
            _read_line(line.strip(), timing, start)


def _read_line(line: bytes, timing: Timing, start: float) -> None:
    if not line.startswith(b"data:") or line == b"data: [DONE]":
        return
    event = json.loads(line[5:])
    if not isinstance(event, dict):
        raise ValueError("an event of the stream is no object")
    if event.get("error"):
        timing.error = str(event["error"])[:_MAX_ERROR_CHARS]
        return
    if event.get("usage"):
        timing.num_tokens = event["usage"].get("completion_tokens", 0)
    for choice in event.get("choices", []):
        if (choice.get("delta") or {}).get("content"):
            timing.arrivals_s.append(time.perf_counter() - start)
        timing.is_finished = timing.is_finished or bool(choice.get("finish_reason"))
