"""Many picture requests at once against one encoder: how many are answered, and how fast.

Runs a real stack on a checkpoint, first with 8 requests in flight, then with all of them at once,
every picture a new one, and prints answers, typed errors and goodput of one run::

    python -m benchmarks.concurrency --model models/demo --requests 200
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import aiohttp

from benchmarks.chat_client import Answer, noise_picture, picture_message, stream_chat
from tests.harness.stack import Stack

PICTURE_SIDE = 224
MAX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Level:
    """Outcome of one level of concurrency; goodput is completed answers per second."""

    concurrency: int
    answers: list[Answer]
    wall_s: float

    @property
    def num_complete(self) -> int:
        """Requests that were answered with tokens and a finish reason."""
        return sum(answer.is_complete for answer in self.answers)

    @property
    def goodput(self) -> float:
        """Completed answers per second."""
        return self.num_complete / self.wall_s


def main() -> None:
    """Run both levels and print their table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument("--requests", type=int, default=200)
    arguments = parser.parse_args()
    stack = Stack(arguments.model)
    try:
        levels = asyncio.run(measure(stack.base_url, arguments.requests))
    finally:
        stack.stop()
    for level in levels:
        _print_level(level)
    sys.stdout.write(f"goodput ratio {levels[1].goodput / levels[0].goodput:.2f}\n")


async def measure(base_url: str, num_requests: int) -> tuple[Level, Level]:
    """Return the levels with 8 requests in flight and with all at once, ``num_requests`` each."""
    seeds = count(1)
    pictures = [
        noise_picture(next(seeds), PICTURE_SIDE, PICTURE_SIDE) for _ in range(num_requests * 2)
    ]
    few = await _run_level(base_url, pictures[:num_requests], 8)
    many = await _run_level(base_url, pictures[num_requests:], num_requests)
    return few, many


async def _run_level(base_url: str, pictures: list[bytes], concurrency: int) -> Level:
    gate = asyncio.Semaphore(concurrency)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def ask(picture: bytes) -> Answer:
            async with gate:
                body = {
                    "messages": picture_message("What is in the picture?", picture),
                    "max_tokens": MAX_TOKENS,
                    "temperature": 0,
                    "ignore_eos": True,
                }
                return await stream_chat(session, base_url, body)

        start = time.perf_counter()
        answers = await asyncio.gather(*(ask(picture) for picture in pictures))
        return Level(concurrency, answers, time.perf_counter() - start)


def _print_level(level: Level) -> None:
    ttft = [answer.ttft_s for answer in level.answers if answer.is_complete]
    slowest = max(answer.total_s for answer in level.answers)
    sys.stdout.write(
        f"concurrency {level.concurrency:4d}: {level.num_complete} of {len(level.answers)} answered"
        f" in {level.wall_s:.1f} s, goodput {level.goodput:.1f}/s, TTFT median"
        f" {statistics.median(ttft):.2f} s, slowest request {slowest:.1f} s\n"
    )
    for error, number in Counter(a.error for a in level.answers if a.error).items():
        sys.stdout.write(f"  {number} x {error}\n")


if __name__ == "__main__":
    main()
