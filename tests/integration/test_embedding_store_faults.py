"""Tests of ``chiasm.common.embedding_store`` with a Redis that is down, hung, full or read-only.

Whatever happens to Redis, a call ends within its budget with an answer or with
``StoreUnavailableError``, and never with wrong data.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from chiasm.common.chunks import CHUNK_BYTES
from chiasm.common.circuit_breaker import BreakerSettings, CircuitBreaker
from chiasm.common.embedding_store import EmbeddingStore
from chiasm.common.errors import StoreUnavailableError
from chiasm.common.guarded_redis import CallBudget, GuardedRedis
from chiasm.common.media import DataType, EmbeddingRef, Modality, TensorRole, TensorSpec
from chiasm.common.secrets import StoreSecrets
from tests.fakes.embeddings import make_embedding, make_layout, make_ref, patient_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from tests.fakes.redis_server import RedisServer

    Use = Callable[[EmbeddingStore], Awaitable[object]]

pytestmark = pytest.mark.integration

_SECRETS = StoreSecrets.generate()
_BUDGET = CallBudget()
# Twice the budget, and what a busy machine adds.
_BOUND_S = 2 * _BUDGET.base_s + 0.5
_REF = make_ref()
_MANY_CHUNKS = EmbeddingRef(
    bytes(32),
    bytes(32),
    Modality.IMAGE,
    (TensorSpec(TensorRole.SPLICE, DataType.BFLOAT16, (16, 256 << 10)),),
)

_USES: dict[str, Use] = {
    "lookup": lambda store: store.lookup("a", _REF.embedding_id),
    "get": lambda store: store.get("a", _REF),
    "put": lambda store: store.put("a", make_embedding(_REF), make_layout(_REF)),
    "delete": lambda store: store.delete("a", _REF.embedding_id),
}


@pytest_asyncio.fixture
async def store(redis_server: RedisServer) -> AsyncIterator[EmbeddingStore]:
    breaker = CircuitBreaker(BreakerSettings(first_open_s=0.1, longest_open_s=0.4))
    redis = GuardedRedis.connect(redis_server.url, _BUDGET, breaker)
    store = EmbeddingStore(redis, _SECRETS)
    await _USES["put"](store)
    yield store
    await store.close()


async def _until_used(store: EmbeddingStore) -> None:
    """Return when the breaker has closed, which a probe does that nobody waits for."""
    prober = store._redis._prober
    if prober is not None:
        await asyncio.wait_for(asyncio.shield(prober), _BOUND_S)


@contextmanager
def _within(bound_s: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < bound_s


@pytest.mark.parametrize("use", _USES.values(), ids=_USES)
async def test_a_killed_redis_is_told_at_once_and_a_new_one_is_used(
    store: EmbeddingStore, redis_server: RedisServer, use: Use
) -> None:
    await redis_server.kill()
    for _ in range(5):
        with _within(_BOUND_S), pytest.raises(StoreUnavailableError) as caught:
            await use(store)
        assert caught.value.reason == "STORE_UNAVAILABLE"

    await redis_server.start()
    await _until_used(store)
    assert await store.get("a", _REF) is None
    await _USES["put"](store)
    assert await store.get("a", _REF) is not None


async def test_a_restart_between_two_calls_is_not_noticed(
    store: EmbeddingStore, redis_server: RedisServer
) -> None:
    await asyncio.gather(*(store.lookup("a", _REF.embedding_id) for _ in range(8)))
    await redis_server.kill()
    await redis_server.start()

    assert await store.lookup("a", _REF.embedding_id) is None


@pytest.mark.parametrize("use", _USES.values(), ids=_USES)
async def test_a_hung_redis_costs_one_budget(
    store: EmbeddingStore, redis_server: RedisServer, use: Use
) -> None:
    redis_server.freeze()
    with _within(_BOUND_S), pytest.raises(StoreUnavailableError):
        await use(store)


async def test_a_hung_redis_costs_many_callers_one_budget_and_then_nothing(
    store: EmbeddingStore, redis_server: RedisServer
) -> None:
    redis_server.freeze()
    with _within(_BOUND_S):
        calls = [store.lookup("a", _REF.embedding_id) for _ in range(200)]
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(result) for result in results} == {StoreUnavailableError}
    with _within(0.1):
        for use in _USES.values():
            with pytest.raises(StoreUnavailableError):
                await use(store)

    redis_server.resume()
    await _until_used(store)
    assert await store.lookup("a", _REF.embedding_id) is not None


async def test_replies_that_come_late_are_not_taken_for_others(
    store: EmbeddingStore, redis_server: RedisServer
) -> None:
    redis_server.freeze()
    with pytest.raises(StoreUnavailableError):
        await store.lookup("a", _REF.embedding_id)
    redis_server.resume()
    await _until_used(store)

    assert await store.lookup("a", bytes(32)) is None
    assert await store.lookup("a", _REF.embedding_id) is not None


async def test_a_cancelled_call_leaves_the_connections_usable(store: EmbeddingStore) -> None:
    large = make_embedding(_MANY_CHUNKS)
    await store.put("a", large, make_layout(_MANY_CHUNKS))
    for _ in range(20):
        task = asyncio.create_task(store.get("a", _MANY_CHUNKS))
        async with asyncio.timeout(5):
            while not task.done() and not await store.lookup("a", _REF.embedding_id):
                pass
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    loaded = await store.get("a", _MANY_CHUNKS)
    assert loaded is not None
    assert loaded.buffers[0] == large.buffers[0]


async def test_a_transfer_that_hangs_half_way_ends_within_its_budget(
    store: EmbeddingStore, redis_server: RedisServer
) -> None:
    put = asyncio.create_task(
        store.put("a", make_embedding(_MANY_CHUNKS), make_layout(_MANY_CHUNKS))
    )
    async with asyncio.timeout(5):
        while not await redis_server.keys(":3"):
            pass
    redis_server.freeze()
    with _within(_BUDGET.total_s(_MANY_CHUNKS.num_bytes) + _BOUND_S):
        await asyncio.gather(put, return_exceptions=True)
    assert put.done()


async def test_a_full_redis_refuses_puts_but_answers_reads(
    store: EmbeddingStore, redis_server: RedisServer
) -> None:
    await redis_server.fill()

    for _ in range(5):
        with _within(_BOUND_S), pytest.raises(StoreUnavailableError):
            await store.put("a", make_embedding(_MANY_CHUNKS), make_layout(_MANY_CHUNKS))
    assert await store.get("a", _REF) is not None
    assert len(await redis_server.keys()) == 2


async def test_a_read_only_redis_refuses_puts(
    store: EmbeddingStore, redis_server: RedisServer
) -> None:
    await redis_server.command("REPLICAOF", "127.0.0.1", "1")
    with _within(_BOUND_S), pytest.raises(StoreUnavailableError):
        await _USES["put"](store)

    await redis_server.command("REPLICAOF", "NO", "ONE")
    assert await store.get("a", _REF) is not None


async def test_a_revoked_permission_is_told_and_ends_with_it(
    store: EmbeddingStore, redis_server: RedisServer
) -> None:
    await redis_server.command("ACL", "SETUSER", "default", "-getrange", "-set")
    for use in (_USES["lookup"], _USES["put"]):
        with _within(_BOUND_S), pytest.raises(StoreUnavailableError):
            await use(store)

    await redis_server.command("ACL", "SETUSER", "default", "+@all")
    assert await store.get("a", _REF) is not None


async def test_a_flushed_redis_is_an_empty_one(
    store: EmbeddingStore, redis_server: RedisServer
) -> None:
    await redis_server.admin.flushall()
    assert await store.lookup("a", _REF.embedding_id) is None
    assert await store.get("a", _REF) is None
    assert not await store.delete("a", _REF.embedding_id)


async def test_evictions_at_any_moment_are_misses_and_never_wrong_data(
    store: EmbeddingStore, redis_server: RedisServer
) -> None:
    await redis_server.admin.config_set("maxmemory", "20mb")
    refs = [make_ref(num_rows=64, width=16 << 10, seed=seed) for seed in range(24)]
    for seed, ref in enumerate(refs):
        await store.put("a", make_embedding(ref, seed), make_layout(ref))

    loaded = [await store.get("a", ref) for ref in refs]

    found = [(seed, embedding) for seed, embedding in enumerate(loaded) if embedding is not None]
    assert 1 <= len(found) < len(refs)
    for seed, embedding in found:
        assert embedding.buffers[0] == make_embedding(refs[seed], seed).buffers[0]


@pytest.mark.parametrize("url", ["unix:///nowhere/redis.sock", "redis://127.0.0.1:1/0"])
async def test_a_redis_that_is_not_there_is_told(url: str) -> None:
    store = EmbeddingStore.connect(url, _SECRETS)
    with _within(_BOUND_S):
        assert not await store.ping()
        with pytest.raises(StoreUnavailableError):
            await store.lookup("a", _REF.embedding_id)
    await store.close()


@pytest.mark.parametrize("use", _USES.values(), ids=_USES)
async def test_a_call_that_is_cancelled_ends_so_however_far_it_is(
    redis_server: RedisServer, use: Use
) -> None:
    store = patient_store(redis_server.url, _SECRETS)
    for num_turns in range(16):
        await _USES["put"](store)
        call = asyncio.ensure_future(use(store))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        was_running = call.cancel()

        await asyncio.wait([call], timeout=_BOUND_S)

        assert call.cancelled() is was_running, f"after {num_turns} turns"
        # What the next call reads is not what is left of the cancelled one.
        found = await store.lookup("a", _REF.embedding_id)
        assert found is not None or use is _USES["delete"], f"after {num_turns} turns"
    await store.close()


async def test_a_wrong_password_is_told(redis_server: RedisServer) -> None:
    await redis_server.admin.config_set("requirepass", "right")
    store = EmbeddingStore.connect(f"{redis_server.url}?password=wrong", _SECRETS)
    with _within(_BOUND_S):
        assert not await store.ping()
    await store.close()
    await redis_server.command("AUTH", "right")


async def test_the_event_loop_turns_between_the_chunks_of_a_large_embedding(
    redis_server: RedisServer,
) -> None:
    store = patient_store(redis_server.url, _SECRETS)
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counter = asyncio.create_task(count_turns())
    await store.put("a", make_embedding(_MANY_CHUNKS), make_layout(_MANY_CHUNKS))
    num_turns_of_put = turns
    await store.get("a", _MANY_CHUNKS)
    counter.cancel()
    await asyncio.gather(counter, return_exceptions=True)
    await store.close()

    num_chunks = _MANY_CHUNKS.num_bytes // CHUNK_BYTES
    assert num_turns_of_put >= num_chunks
    assert turns - num_turns_of_put >= num_chunks
