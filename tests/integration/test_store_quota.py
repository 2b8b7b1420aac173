"""Tests of ``chiasm.common.store_quota`` with a real Redis: what one tenant may add."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chiasm.common.errors import StoreUnavailableError
from chiasm.common.metrics import STORE_BYPASSES
from chiasm.common.secrets import StoreSecrets, tenant_tag
from chiasm.common.store_quota import StoreQuotaError
from tests.fakes.embeddings import make_embedding, make_layout, make_ref, patient_store

if TYPE_CHECKING:
    from chiasm.common.embedding_store import EmbeddingStore
    from chiasm.common.media import EmbeddingRef
    from tests.fakes.redis_server import RedisServer

pytestmark = pytest.mark.integration

_SECRETS = StoreSecrets.generate()
_NUM_BYTES = make_ref().num_bytes
_KEY = f"chiasm:{tenant_tag('a')}:q"


def _store(redis_server: RedisServer, num_embeddings: float) -> EmbeddingStore:
    """Return a store in which a tenant may add so many embeddings in an hour."""
    return patient_store(
        redis_server.url, _SECRETS, tenant_bytes_per_hour=int(num_embeddings * _NUM_BYTES)
    )


async def _put(store: EmbeddingStore, tenant: str, seed: int, num_rows: int = 6) -> EmbeddingRef:
    ref = make_ref(num_rows, seed=seed)
    await store.put(tenant, make_embedding(ref), make_layout(ref))
    return ref


async def test_tenant_stores_to_the_last_byte_and_no_more(redis_server: RedisServer) -> None:
    store = _store(redis_server, 2)
    before = STORE_BYPASSES.labels("quota")._value.get()

    kept = [await _put(store, "a", seed) for seed in range(2)]
    with pytest.raises(StoreQuotaError):
        await _put(store, "a", 2)

    assert [await store.get("a", ref) is not None for ref in kept] == [True, True]
    assert await store.get("a", make_ref(seed=2)) is None
    assert STORE_BYPASSES.labels("quota")._value.get() == before + 1
    await store.close()


async def test_other_tenants_store_as_before(redis_server: RedisServer) -> None:
    store = _store(redis_server, 1)
    await _put(store, "a", 0)
    with pytest.raises(StoreUnavailableError):
        await _put(store, "a", 1)

    other = await _put(store, "b", 2)

    assert await store.get("b", other) is not None
    await store.close()


async def test_what_is_refused_takes_no_room(redis_server: RedisServer) -> None:
    store = _store(redis_server, 1.5)
    for seed in range(3):
        with pytest.raises(StoreQuotaError):
            await _put(store, "a", seed, num_rows=600)

    await _put(store, "a", 4)

    await store.close()


async def test_encoders_count_together(redis_server: RedisServer) -> None:
    first, second = _store(redis_server, 1), _store(redis_server, 1)
    await _put(first, "a", 0)

    with pytest.raises(StoreQuotaError):
        await _put(second, "a", 1)

    await first.close()
    await second.close()


async def test_room_comes_back_after_an_hour(redis_server: RedisServer) -> None:
    store = _store(redis_server, 1)
    await _put(store, "a", 0)
    left_ms = await redis_server.admin.pttl(_KEY)
    with pytest.raises(StoreQuotaError):
        await _put(store, "a", 1)
    assert await redis_server.admin.pttl(_KEY) <= left_ms

    await redis_server.admin.pexpire(_KEY, 0)

    assert 0 < left_ms <= 3_600_000
    await _put(store, "a", 1)
    await store.close()


async def test_forgetting_everything_brings_no_room(redis_server: RedisServer) -> None:
    store = _store(redis_server, 1)
    ref = await _put(store, "a", 0)

    await store.tenants.forget("a")

    assert await store.get("a", ref) is None
    with pytest.raises(StoreQuotaError):
        await _put(store, "a", 1)
    await store.close()


async def test_without_a_bound_nothing_is_counted(redis_server: RedisServer) -> None:
    store = _store(redis_server, 0)

    for seed in range(5):
        await _put(store, "a", seed)

    assert await redis_server.admin.exists(_KEY) == 0
    await store.close()
