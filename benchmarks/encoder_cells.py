"""Measure what is around an encoder's tower: decoding, event loop, stages, a second encoder."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.encoder_report import Row, at_least, at_most, milliseconds, plain
from benchmarks.photos import copy_of, load_picture, photo
from benchmarks.sleeping_pair import sleeping_pair
from chiasm.common.grpc_client import EndpointPool
from chiasm.common.media import Modality, ProcessingOptions, RequestContext
from chiasm.encoder.decode_pool import DecodeLimits, DecodePool
from chiasm.encoder.memory_file import MemoryFile
from chiasm.encoder.wire_image import PIXEL_BYTES, ImageTask
from chiasm.gateway.budgets import RetryBudget
from chiasm.gateway.chat_request import BytesSource, MediaItem
from chiasm.gateway.deadline import Deadline
from chiasm.gateway.encoder_client import EncoderClient, ItemPlanned

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.sleeping_pair import SleepingEncoder
    from tests.harness.encoder import EncoderClient as StageClient

LARGE_WIDTH, LARGE_HEIGHT = 4000, 3000
NUM_WORKERS = 2
NUM_ROUNDS = 5
DECODES_PER_ROUND = 8
IMAGES_PER_ROUND = 32
MAX_IN_FLIGHT = 8
TOWER_S = 0.05
ITEMS_PER_ROUND = 32
DEADLINE_S = 60.0
_LIMITS = DecodeLimits(memory_bytes=1536 << 20, cpu_limit_s=60, timeout_s=60.0)


@dataclass(slots=True)
class Stages:
    """Seconds of the stages of items that were encoded one after the other.

    Attributes:
        whole: From the first byte sent to the last word.
        plan: Until the plan: receiving, digest, lookup, admission, header.
        decode: In a decode worker.
        preprocess: The checkpoint's processor.
        store: To Redis.
        rest: What is left: hand-overs, an empty tower, the reply.
    """

    whole: list[float] = field(default_factory=list)
    plan: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    preprocess: list[float] = field(default_factory=list)
    store: list[float] = field(default_factory=list)
    rest: list[float] = field(default_factory=list)


async def measure_decoding(large: bytes) -> list[Row]:
    """Compare one decode worker with two, and with Pillow alone in as many processes."""
    pools = {workers: DecodePool(workers, _LIMITS) for workers in (1, NUM_WORKERS)}
    rates: dict[int, list[float]] = {workers: [] for workers in pools}
    bare: dict[int, list[float]] = {workers: [] for workers in pools}
    context = multiprocessing.get_context("spawn")
    processes = {workers: ProcessPoolExecutor(workers, mp_context=context) for workers in pools}
    for pool in pools.values():
        pool.start()
    try:
        for round_index in range(NUM_ROUNDS + 1):
            for workers, pool in pools.items():
                rate = await _decode_rate(pool, large)
                bare_rate = await asyncio.to_thread(
                    _bare_decode_rate, processes[workers], large, workers
                )
                if round_index:  # the first one imports Pillow
                    rates[workers].append(rate)
                    bare[workers].append(bare_rate)
    finally:
        for pool in pools.values():
            pool.stop()
        for executor in processes.values():
            executor.shutdown()
    name = f"JPEGs of {len(large) / 1e6:.1f} MB and 12 megapixels"
    return [
        plain(f"{name} by 1 decode worker", rates[1], unit="items/s"),
        at_least(
            f"{name}: {NUM_WORKERS} decode workers / 1",
            _ratios(rates[NUM_WORKERS], rates[1]),
            1.8,
            "Pillow alone in processes "
            + plain("", _ratios(bare[NUM_WORKERS], bare[1]), unit="times").figure,
        ),
    ]


async def measure_stages(
    model: Path, pictures: Sequence[tuple[str, bytes, float, int]]
) -> list[Row]:
    """Take one picture at a time through an encoder whose tower takes no time.

    Args:
        model: Checkpoint.
        pictures: Name, file, most milliseconds and number of samples of each kind.
    """
    rows: list[Row] = []
    async with sleeping_pair(model, 0.0) as (encoder, idle):
        client = encoder.process.client()
        try:
            for name, picture, bar, number in pictures:
                stages = await _take_stages(client, picture, number)
                rows += _stage_rows(name, picture, bar, stages)
        finally:
            await client.close()
        rows.append(await _measure_lag(encoder, idle, photo(LARGE_WIDTH, LARGE_HEIGHT, 90)))
    return rows


async def measure_two_encoders(model: Path) -> list[Row]:
    """Compare items a second of one encoder with those of two, as the gateway calls them."""
    small = photo(64, 64, 75)
    numbers = itertools.count()
    rates: dict[int, list[float]] = {1: [], 2: []}
    async with sleeping_pair(model, TOWER_S) as encoders:
        for _ in range(NUM_ROUNDS):
            for count, values in rates.items():
                used = [encoder.process for encoder in encoders[:count]]
                pool = EndpointPool(",".join(process.address for process in used), used[0].token)
                await pool.start()
                while len(pool.serving_addresses) < count:
                    await pool.wait_for_change()
                pictures = [copy_of(small, next(numbers)) for _ in range(ITEMS_PER_ROUND)]
                values.append(await _encode_rate(pool, pictures))
                await pool.close()
    return [
        plain(
            f"towers that sleep {TOWER_S * 1e3:.0f} ms: 1 encoder",
            rates[1],
            f"{1 / TOWER_S:.0f} items/s",
            "items/s",
        ),
        at_least("the same: 2 encoders / 1", _ratios(rates[2], rates[1]), 1.8, "2"),
    ]


async def _decode_rate(pool: DecodePool, picture: bytes) -> float:
    source = MemoryFile.of_bytes(picture)
    task = ImageTask(LARGE_WIDTH * LARGE_HEIGHT, LARGE_WIDTH, LARGE_HEIGHT, 0xFFFFFF).pack()
    num_bytes = LARGE_WIDTH * LARGE_HEIGHT * PIXEL_BYTES

    async def decode() -> None:
        media = await pool.decode(Modality.IMAGE, source, task, num_bytes)
        media.free()

    started = time.perf_counter()
    await asyncio.gather(*(decode() for _ in range(DECODES_PER_ROUND)))
    return DECODES_PER_ROUND / (time.perf_counter() - started)


def _bare_decode_rate(processes: ProcessPoolExecutor, picture: bytes, num_processes: int) -> float:
    list(processes.map(load_picture, [picture] * num_processes))
    started = time.perf_counter()
    list(processes.map(load_picture, [picture] * DECODES_PER_ROUND))
    return DECODES_PER_ROUND / (time.perf_counter() - started)


async def _take_stages(client: StageClient, picture: bytes, number: int) -> Stages:
    stages = Stages()
    for index in range(number + 2):
        started = time.perf_counter()
        answer = await client.encode(copy_of(picture, index))
        whole_s = time.perf_counter() - started
        if index < 2:
            continue  # first touches
        timings = answer.ready.timings
        plan_s = answer.planned_at - started
        told_s = plan_s + timings.decode_s + timings.preprocess_s + timings.store_s
        stages.whole.append(whole_s)
        stages.plan.append(plan_s)
        stages.decode.append(timings.decode_s)
        stages.preprocess.append(timings.preprocess_s)
        stages.store.append(timings.store_s)
        stages.rest.append(whole_s - told_s)
    return stages


def _stage_rows(name: str, picture: bytes, bar: float, stages: Stages) -> list[Row]:
    bare = milliseconds([load_picture(picture) for _ in range(NUM_ROUNDS)])
    text = f"{name}, {len(picture) / 1e6:.2f} MB"
    limit = f"Pillow alone {plain('', bare).figure}"
    parts = {
        "receive, look up, read the header": stages.plan,
        "decode": stages.decode,
        "preprocess": stages.preprocess,
        "store": stages.store,
        "hand over, reply": stages.rest,
    }
    rows = [at_most(f"{text}: bytes to ready", milliseconds(stages.whole), bar, limit)]
    return rows + [
        plain(f"&nbsp; {part}", milliseconds(seconds)) for part, seconds in parts.items()
    ]


async def _measure_lag(encoder: SleepingEncoder, idle: SleepingEncoder, large: bytes) -> Row:
    late: list[float] = []
    idle_late: list[float] = []
    numbers = itertools.count(1 << 20)
    pool = EndpointPool(encoder.process.address, encoder.process.token)
    await pool.start()
    await pool.wait_until_serving(DEADLINE_S)
    rates = []
    for _ in range(NUM_ROUNDS):
        pictures = [copy_of(large, next(numbers)) for _ in range(IMAGES_PER_ROUND)]
        before, idle_before = await encoder.lag(), await idle.lag()
        rates.append(await _encode_rate(pool, pictures))
        late.append((await encoder.lag()).since(before))
        idle_late.append((await idle.lag()).since(idle_before))
    await pool.close()
    beside = f"an idle encoder beside it {plain('', idle_late, unit='%').figure}"
    rate = plain("", rates, unit="items/s").figure
    name = f"event loop later than 20 ms, {len(large) / 1e6:.1f} MB JPEGs at {rate}"
    return at_most(name, late, 1.0, beside, unit="%", digits=2)


async def _encode_rate(pool: EndpointPool, pictures: Sequence[bytes]) -> float:
    client = EncoderClient(pool, RetryBudget())
    free = asyncio.Semaphore(MAX_IN_FLIGHT)

    async def encode(picture: bytes) -> None:
        item = MediaItem(Modality.IMAGE, 0, "part", "", ProcessingOptions(), BytesSource(picture))
        context = RequestContext(request_id="request", attempt_id="attempt", tenant="tenant")
        async with free:
            deadline = Deadline.after(DEADLINE_S)
            events = [e async for e in client.encode(item, context, deadline, inline=False)]
        assert isinstance(events[0], ItemPlanned), "a plan comes first"

    started = time.perf_counter()
    await asyncio.gather(*(encode(picture) for picture in pictures))
    return len(pictures) / (time.perf_counter() - started)


def _ratios(values: Sequence[float], others: Sequence[float]) -> list[float]:
    return [value / other for value, other in zip(values, others, strict=True)]
