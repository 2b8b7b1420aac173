"""Time the first token of requests with several pictures: over two encoders, and known before."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import tempfile
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp

from benchmarks.chat_client import noise_picture, picture_message, stream_chat
from benchmarks.encoder_report import at_least, at_most, milliseconds, plain
from benchmarks.sleeping_pair import sleeping_process
from tests.fakes.checkpoints import TextSizes, TowerSizes, make_bfloat16_qwen2_vl
from tests.harness.second_gateway import second_gateway
from tests.harness.stack import Stack

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from benchmarks.encoder_report import Row

NUM_PICTURES = 4
SLOW_TOWER_S = 0.3
NUM_ROUNDS = 5
NUM_HITS = 20
SIDE, SMALL_SIDE = 1024, 448
QUESTION = "What is this?"
# A tower that does several times the work of the language model.
TEXT = TextSizes(2, 256, 704, 2, 1000, max_positions=8192)
TOWER = TowerSizes(depth=2, embed_dim=256, num_heads=4, max_pixels=SIDE * SIDE)


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway to ask, and the session to ask with."""

    url: str
    session: aiohttp.ClientSession

    async def ttft_s(self, messages: Sequence[dict[str, object]]) -> float:
        """Return the seconds until the first token of an answer to ``messages``."""
        body: dict[str, object] = {
            "messages": list(messages),
            "max_tokens": 2,
            "temperature": 0,
            "ignore_eos": True,
        }
        answer = await stream_chat(self.session, self.url, body)
        if not answer.is_complete:
            raise SystemExit(f"a request failed: {answer}")
        return answer.ttft_s

    async def put(self, picture: bytes, uuid: str) -> None:
        """Have a picture encoded and kept under ``uuid``, without a request about it."""
        form = aiohttp.FormData({"uuid": uuid})
        form.add_field("file", picture, filename="picture.png", content_type="image/png")
        async with self.session.post(f"{self.url}/v1/media", data=form) as response:
            if response.status >= 300:
                raise SystemExit(f"a picture was not kept: {await response.text()}")


async def measure_fan_out(model: Path) -> list[Row]:
    """Compare four slow pictures of one request over two encoders with one encoder."""
    stack = await asyncio.to_thread(Stack, model, ["--dtype", "float32"])
    try:
        async with _slow_encoders(model, stack) as addresses, aiohttp.ClientSession() as session:
            with ExitStack() as gateways:
                one, two = (
                    gateways.enter_context(
                        second_gateway(stack, ["--encoders", ",".join(addresses[:count])])
                    )
                    for count in (1, 2)
                )
                alone, spread = await _ask_both(Gateway(one, session), Gateway(two, session))
    finally:
        await asyncio.to_thread(stack.stop)
    ratios = [second / first for first, second in zip(alone, spread, strict=True)]
    text = f"{NUM_PICTURES} pictures of {SLOW_TOWER_S:g} s in the tower, TTFT"
    limit = f"{NUM_PICTURES * SLOW_TOWER_S * 1e3:.0f} ms in the tower"
    return [
        plain(f"{text}: 1 encoder", milliseconds(alone), limit),
        at_most("the same: 2 encoders / 1", ratios, 0.6, "0.5", "", 2),
    ]


async def measure_hits() -> list[Row]:
    """Compare pictures that the store knows with unknown ones, and with those at hand."""
    with tempfile.TemporaryDirectory() as directory:
        model = make_bfloat16_qwen2_vl(Path(directory) / "model", TEXT, tower=TOWER)
        trace = Path(directory) / "steps.jsonl"
        stack = await asyncio.to_thread(Stack, model, ["--step-trace", str(trace)])
        try:
            async with aiohttp.ClientSession() as session:
                gateway = Gateway(stack.base_url, session)
                known, at_hand = await _ask_small(gateway)
                before = await asyncio.to_thread(_forward_s, stack)
                num_steps = len(trace.read_text().splitlines())
                misses, hits = await _ask_large(gateway)
                encode_s = (await asyncio.to_thread(_forward_s, stack) - before) / len(misses)
                steps = [json.loads(text) for text in trace.read_text().splitlines()[num_steps:]]
        finally:
            await asyncio.to_thread(stack.stop)
    prefill_s = sum(step["forward_s"] for step in steps if step["num_prefill_tokens"])
    prefill_s /= len(misses) + len(hits)
    extra = [hit - other for hit, other in zip(known, at_hand, strict=True)]
    text = f"{NUM_PICTURES} pictures of {SIDE}x{SIDE}, TTFT"
    hit_limit = f"prefill {prefill_s * 1e3:.0f} ms"
    miss_limit = f"towers {encode_s * 1e3:.0f} ms and {hit_limit}"
    ratios = [hit / statistics.median(misses) for hit in hits]
    small = f"picture of {SMALL_SIDE}x{SMALL_SIDE} known by uuid, TTFT"
    least = f"{prefill_s / (encode_s + prefill_s):.2f}"
    return [
        plain(f"{small}: at hand in the generator", milliseconds(at_hand)),
        at_most(f"{small}: in Redis, above that", milliseconds(extra), 5.0, "0 ms"),
        plain(f"{text}: unknown", milliseconds(misses), miss_limit),
        plain(f"{text}: known by uuid", milliseconds(hits), hit_limit),
        at_least("towers / prefill", [encode_s / prefill_s], 3.0, "the checkpoint's own"),
        at_most("TTFT known / unknown", ratios, 0.333, least, "", 2),
    ]


@asynccontextmanager
async def _slow_encoders(model: Path, stack: Stack) -> AsyncIterator[list[str]]:
    redis_url = f"unix://{stack.state_dir}/redis.sock"
    processes = [
        sleeping_process(model, redis_url, stack.state_dir, SLOW_TOWER_S) for _ in range(2)
    ]
    try:
        for process in processes:
            await process.start()
        yield [process.address for process in processes]
    finally:
        for process in processes:
            await process.stop()


async def _ask_both(one: Gateway, two: Gateway) -> tuple[list[float], list[float]]:
    times: tuple[list[float], list[float]] = ([], [])
    seeds = itertools.count()
    for round_index in range(NUM_ROUNDS + 1):
        for gateway, values in zip((one, two), times, strict=True):
            pictures = [noise_picture(next(seeds), 64, 64) for _ in range(NUM_PICTURES)]
            ttft_s = await gateway.ttft_s(picture_message(QUESTION, *pictures))
            if round_index:
                values.append(ttft_s)
    return times


async def _ask_small(gateway: Gateway) -> tuple[list[float], list[float]]:
    """Return the times of single pictures that are only in Redis, then of the same once more."""
    known, at_hand = [], []
    for number in range(NUM_HITS + 2):
        uuid = f"small-{number}"
        await gateway.put(noise_picture(number, SMALL_SIDE, SMALL_SIDE), uuid)
        # A text of its own before the picture: nothing of the prompt is in the prefix cache.
        first = await gateway.ttft_s(_by_uuid([uuid], f"First {number}"))
        second = await gateway.ttft_s(_by_uuid([uuid], f"Again {number}"))
        if number >= 2:
            known.append(first)
            at_hand.append(second)
    return known, at_hand


async def _ask_large(gateway: Gateway) -> tuple[list[float], list[float]]:
    misses, hits = [], []
    for number in range(3):
        pictures = [noise_picture(1000 + 10 * number + n, SIDE, SIDE) for n in range(NUM_PICTURES)]
        uuids = [f"large-{number}-{n}" for n in range(NUM_PICTURES)]
        messages = picture_message(QUESTION, *pictures)
        parts = messages[0]["content"]
        assert isinstance(parts, list), "a message with pictures has parts"
        for part, uuid in zip(parts, uuids, strict=False):
            part["uuid"] = uuid
        misses.append(await gateway.ttft_s(messages))
        hits += [await gateway.ttft_s(_by_uuid(uuids, f"{number} {n}")) for n in range(2)]
    return misses, hits


def _by_uuid(uuids: Sequence[str], text: str) -> list[dict[str, object]]:
    parts: list[dict[str, object]] = [{"type": "text", "text": text}]
    parts += [{"type": "image_url", "image_url": None, "uuid": uuid} for uuid in uuids]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]


def _forward_s(stack: Stack) -> float:
    return stack.metric("chiasm_encoder_forward_seconds_sum", "encoder-0")
