"""The workloads of ``chiasm bench`` and one measured cell of them."""

from __future__ import annotations

import asyncio
import base64
import io
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from chiasm.cli.bench_client import Endpoint, Timing, stream_chat

FLOOD = "text-under-flood"
WORKLOADS = ("text", "image-new", "image-same", "image-four", FLOOD)
FLOOD_STREAMS, FLOOD_CLIENTS = 2, 4
FLOOD_TOKENS = 32  # a server that waits for every picture needs seconds for each
WORDS = ("river", "stone", "light", "paper", "green", "seven", "under", "north")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What requests look like; ``image_size`` is the side of a picture in pixels."""

    num_requests: int = 4
    input_tokens: int = 128
    output_tokens: int = 64
    image_size: int = 448
    ignores_eos: bool = True
    timeout_s: float = 300.0


@dataclass(slots=True)
class CellResult:
    """One endpoint in one cell of one round; all times in seconds.

    ``time_per_token_s`` is the median over requests of their mean behind the first token; ``itl``
    are gaps between deltas, of all requests.
    """

    ttft_s: float = 0.0
    time_per_token_s: float = 0.0
    itl_p99_s: float = 0.0
    itl_max_s: float = 0.0
    tokens_per_s: float = 0.0
    flood_images_per_s: float = 0.0
    errors: list[str] = field(default_factory=list)


class RequestSource:
    """Makes request bodies; no new picture is made twice."""

    def __init__(self, seed: int, sizes: Sizes) -> None:
        """Take the seed of all pictures and words."""
        self._random = random.Random(seed)
        self._sizes = sizes
        self._same = self._picture()

    def body(self, workload: str) -> dict[str, Any]:
        """Return the next request of ``workload``."""
        pictures = {"image-new": 1, "image-four": 4}.get(workload, 0)
        urls = [self._picture() for _ in range(pictures)]
        if workload == "image-same":
            urls = [self._same]
        words = " ".join(self._random.choices(WORDS, k=self._sizes.input_tokens))
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content: Any = [*parts, {"type": "text", "text": words}] if parts else words
        stop = {"ignore_eos": True} if self._sizes.ignores_eos else {}
        return {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._sizes.output_tokens,
            "temperature": 0,
            **stop,
        }

    def _picture(self) -> str:
        from PIL import Image  # noqa: PLC0415 - not in the gateway's install

        side = self._sizes.image_size
        grain = Image.frombytes("RGB", (56, 56), self._random.randbytes(56 * 56 * 3))
        buffer = io.BytesIO()
        grain.resize((side, side)).save(buffer, "JPEG", quality=90)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


async def measure_cell(
    endpoint: Endpoint, workload: str, concurrency: int, source: RequestSource, sizes: Sizes
) -> CellResult:
    """Run one cell against ``endpoint``; its flood stops with the last text stream."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(body: dict[str, Any]) -> Timing:
            return await stream_chat(session, endpoint, body, sizes.timeout_s)

        async def flood() -> None:
            while True:
                done.append(await ask({**source.body("image-new"), "max_tokens": 1}))
                if done[-1].error:
                    await asyncio.sleep(0.2)  # a dead server is not dialled in a tight loop

        async def text_or_picture(body: dict[str, Any]) -> Timing:
            async with slots:
                return await ask(body)

        done: list[Timing] = []
        is_flood = workload == FLOOD
        slots = asyncio.Semaphore(concurrency)
        count = concurrency if is_flood else max(sizes.num_requests, concurrency)
        bodies = [source.body("text" if is_flood else workload) for _ in range(count)]
        for body in bodies if is_flood else ():
            body["max_tokens"] = min(FLOOD_TOKENS, body["max_tokens"])
        start = time.perf_counter()
        tasks = [asyncio.create_task(flood()) for _ in range(FLOOD_CLIENTS * is_flood)]
        timings = await asyncio.gather(*(text_or_picture(body) for body in bodies))
        seconds = time.perf_counter() - start
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    result = summarise(timings, seconds)
    result.flood_images_per_s = sum(not timing.error for timing in done) / seconds
    result.errors += [f"flood: {timing.error}" for timing in done if timing.error]
    return result


def summarise(timings: list[Timing], seconds: float) -> CellResult:
    """Return the figures of requests that together took ``seconds``."""
    good = [timing for timing in timings if not timing.error]
    result = CellResult(errors=[timing.error for timing in timings if timing.error])
    if not good:
        return result
    firsts = [timing.arrivals_s[0] if timing.arrivals_s else timing.total_s for timing in good]
    gaps = sorted(gap for timing in good for gap in timing.gaps_s()) or [0.0]
    paces = [pace for timing in good if (pace := timing.time_per_token_s()) is not None]
    result.ttft_s = statistics.median(firsts)
    result.time_per_token_s = statistics.median(paces or [0.0])
    result.itl_p99_s = gaps[min(len(gaps) - 1, int(len(gaps) * 0.99))]
    result.itl_max_s = gaps[-1]
    result.tokens_per_s = sum(timing.num_tokens for timing in good) / seconds
    return result
