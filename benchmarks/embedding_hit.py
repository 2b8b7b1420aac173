"""Time to first token of a picture that the store knows against one that it does not.

Runs a real stack on a random checkpoint whose encode costs several times its prefill, sends ten
distinct pictures, each twice in a row, and prints medians and spread of one run::

    python -m benchmarks.embedding_hit
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
from pathlib import Path

import aiohttp

from benchmarks.chat_client import Answer, noise_picture, picture_message, stream_chat
from tests.fakes.checkpoints import TowerSizes, make_qwen2_vl
from tests.harness.stack import Stack

NUM_PICTURES = 10
SIDE = 448
# Tower of about 60 times the decoder's work per token, so that encoding dominates.
TOWER = TowerSizes(depth=12, embed_dim=512, num_heads=8, max_pixels=SIDE * SIDE)


def main() -> None:
    """Run the comparison and print its table."""
    with tempfile.TemporaryDirectory() as directory:
        model = make_qwen2_vl(Path(directory) / "model", tower=TOWER)
        trace = Path(directory) / "steps.jsonl"
        stack = Stack(model, ["--step-trace", str(trace)])
        try:
            pairs = asyncio.run(_measure(stack))
            encode_s = stack.metric("chiasm_encoder_forward_seconds_sum", "encoder-0")
            num_encoded = stack.metric("chiasm_encoder_forward_seconds_count", "encoder-0")
            steps = [json.loads(line) for line in trace.read_text().splitlines()]
        finally:
            stack.stop()
    misses, hits = zip(*pairs, strict=True)
    _print_row("miss", [answer.ttft_s for answer in misses])
    _print_row("hit", [answer.ttft_s for answer in hits])
    ratio = _median_ms(hits) / _median_ms(misses)
    sys.stdout.write(f"TTFT hit / miss {ratio:.2f}; pictures encoded {num_encoded:.0f}\n")
    prefill_s = statistics.median(s["forward_s"] for s in steps if s["num_prefill_tokens"])
    sys.stdout.write(
        f"tower forward mean {encode_s / num_encoded * 1e3:.1f} ms, prefill step median"
        f" {prefill_s * 1e3:.1f} ms: {encode_s / num_encoded / prefill_s:.1f} times\n"
    )


async def _measure(stack: Stack) -> list[tuple[Answer, Answer]]:
    async with aiohttp.ClientSession() as session:
        await _ask(session, stack, noise_picture(0, SIDE, SIDE))
        pairs = []
        for seed in range(1, NUM_PICTURES + 1):
            picture = noise_picture(seed, SIDE, SIDE)
            miss = await _ask(session, stack, picture)
            pairs.append((miss, await _ask(session, stack, picture)))
    return pairs


async def _ask(session: aiohttp.ClientSession, stack: Stack, picture: bytes) -> Answer:
    body = {
        "messages": picture_message("What is this?", picture),
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
    }
    answer = await stream_chat(session, stack.base_url, body)
    if not answer.is_complete:
        raise SystemExit(f"a request failed: {answer}")
    return answer


def _median_ms(answers: tuple[Answer, ...]) -> float:
    return statistics.median(answer.ttft_s for answer in answers) * 1e3


def _print_row(name: str, seconds: list[float]) -> None:
    low, high = min(seconds) * 1e3, max(seconds) * 1e3
    sys.stdout.write(
        f"{name:5s} TTFT median {statistics.median(seconds) * 1e3:7.1f} ms"
        f"  (min {low:.1f}, max {high:.1f}, n = {len(seconds)})\n"
    )


if __name__ == "__main__":
    main()
