"""Tests of how ``chiasm.common.guarded_redis`` moves chunks: what fails, how, and how soon."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from chiasm.common.circuit_breaker import BreakerSettings, CircuitBreaker
from chiasm.common.errors import StoreUnavailableError
from chiasm.common.guarded_redis import STORE_BREAKER, CallBudget, GuardedRedis, StoreRefusedError
from chiasm.common.resp_connection import KeyedChunk
from tests.fakes.scripted_redis import ScriptedRedis

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    Operation = Callable[[GuardedRedis], Awaitable[object]]

_TTL_MS = 5000
_BUDGET = CallBudget.of(0.3)
_NUM_FAILURES = BreakerSettings().num_failures
_CHUNKS = [KeyedChunk(f"k:{index}", memoryview(b"x" * 1000)) for index in range(3)]


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[ScriptedRedis]:
    async with ScriptedRedis(tmp_path / "redis.sock") as server:
        yield server


@pytest.fixture
def breaker() -> CircuitBreaker:
    return CircuitBreaker(BreakerSettings())


@pytest_asyncio.fixture
async def redis(server: ScriptedRedis, breaker: CircuitBreaker) -> AsyncIterator[GuardedRedis]:
    redis = GuardedRedis.connect(server.url, _BUDGET, breaker)
    yield redis
    await redis.close()


async def _write(redis: GuardedRedis) -> None:
    await redis.write_chunks(_CHUNKS, _TTL_MS, lambda index: None)


async def _read(redis: GuardedRedis) -> bool:
    targets = [KeyedChunk(c.key, memoryview(bytearray(c.memory.nbytes))) for c in _CHUNKS]
    return await redis.read_chunks(targets, _TTL_MS, lambda index: True)


@pytest.mark.parametrize("code", ["OOM", "READONLY", "NOPERM", "MOVED", "ERR", "MISCONF"])
@pytest.mark.parametrize("operation", [_write, _read])
async def test_refusals_are_told_and_do_not_open_the_breaker(
    server: ScriptedRedis,
    redis: GuardedRedis,
    breaker: CircuitBreaker,
    code: str,
    operation: Operation,
) -> None:
    server.wrong.answers = dict.fromkeys(range(100), f"-{code} what Redis says\r\n".encode())
    for _ in range(_NUM_FAILURES + 1):
        with pytest.raises(StoreRefusedError):
            await operation(redis)

    assert not breaker.is_open


@pytest.mark.parametrize("answer", [b"-LOADING dataset\r\n", b"-NOAUTH required\r\n", b""])
@pytest.mark.parametrize("operation", [_write, _read])
async def test_redis_that_is_not_ready_or_hangs_opens_the_breaker(
    server: ScriptedRedis,
    redis: GuardedRedis,
    breaker: CircuitBreaker,
    answer: bytes,
    operation: Operation,
) -> None:
    server.wrong.answers = dict.fromkeys(range(100), answer)
    for _ in range(_NUM_FAILURES):
        with pytest.raises(StoreUnavailableError) as caught:
            await operation(redis)
        assert not isinstance(caught.value, StoreRefusedError)

    assert breaker.is_open
    num_commands = len(server.commands)
    with pytest.raises(StoreUnavailableError):
        await operation(redis)
    assert len(server.commands) == num_commands


@pytest.mark.parametrize("answer", [b"-OOM no\r\n", b"-LOADING dataset\r\n", b""])
@pytest.mark.parametrize("total_s", [0.1, 10.0], ids=["budget", "stall"])
async def test_failed_call_leaves_no_chunk_to_the_garbage_collector(
    server: ScriptedRedis, answer: bytes, total_s: float
) -> None:
    server.wrong.answers = dict.fromkeys(range(100), answer)
    redis = GuardedRedis.connect(server.url, CallBudget(stall_s=0.2, base_s=total_s))
    loop, is_free = asyncio.get_running_loop(), asyncio.Event()
    gc.disable()
    try:
        chunks = [KeyedChunk("k", memoryview(bytearray(1000)))]
        memory = weakref.ref(chunks[0].memory, lambda _: loop.call_soon_threadsafe(is_free.set))
        with suppress(StoreUnavailableError):
            async with redis.transfer(1000):
                await redis.write_chunks(chunks, _TTL_MS, lambda index: None)
        with suppress(StoreUnavailableError):
            async with redis.transfer(1000):
                await redis.read_chunks(chunks, _TTL_MS, lambda index: True)
        del chunks
        # The thread of a cancelled transfer may still be ending.
        await asyncio.wait_for(is_free.wait(), 5)
        assert memory() is None
    finally:
        gc.enable()
        await redis.close()


async def test_redis_that_trickles_is_given_up_when_the_budget_is_over(
    server: ScriptedRedis, redis: GuardedRedis
) -> None:
    await _write(redis)
    server.wrong.piece_bytes = 1
    server.wrong.gate.clear()
    loop = asyncio.get_running_loop()
    started = loop.time()

    async def trickle() -> None:
        while True:
            await asyncio.wait([read], timeout=_BUDGET.stall_s / 10)
            server.wrong.gate.set()
            await asyncio.sleep(0)
            server.wrong.gate.clear()

    read = asyncio.create_task(_read(redis))
    trickling = asyncio.create_task(trickle())
    with pytest.raises(StoreUnavailableError):
        await read
    trickling.cancel()

    assert _BUDGET.base_s <= loop.time() - started < _BUDGET.base_s + 2


def test_a_probe_comes_within_three_seconds_after_an_outage_of_any_length() -> None:
    now = 0.0
    breaker = CircuitBreaker(STORE_BREAKER, lambda: now)
    for _ in range(20):
        now += 60.0
        assert breaker.admit()
        breaker.record_failure()

    now += 3.0 - CallBudget().base_s  # a probe may have begun just before Redis came back
    assert breaker.admit()
