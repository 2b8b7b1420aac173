"""Property tests of ``chiasm.common.embedding_store``: tampered entries are misses, never data."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from chiasm.common.secrets import StoreSecrets, tenant_tag
from tests.fakes.embeddings import make_embedding, make_layout, make_ref, patient_store

if TYPE_CHECKING:
    from chiasm.common.embedding_store import EmbeddingStore
    from chiasm.common.media import EmbeddingRef

pytestmark = pytest.mark.integration

_SECRETS = StoreSecrets.generate()
_TENANT = "tampering"
_REFS = [make_ref(num_rows=5, num_deepstack=2, seed=seed) for seed in range(2)]


async def _keys(admin: Redis, ref: EmbeddingRef) -> list[str]:
    pattern = f"chiasm:{tenant_tag(_TENANT)}:{ref.embedding_id.hex()}:*"
    return sorted(key.decode() for key in await admin.keys(pattern) if isinstance(key, bytes))


async def _put_all(store: EmbeddingStore, admin: Redis) -> None:
    for ref in _REFS:
        for key in await _keys(admin, ref):
            await admin.delete(key)
        await store.put(_TENANT, make_embedding(ref), make_layout(ref))


@settings(max_examples=60, deadline=None)
@given(
    key_index=st.integers(0, 3),
    position=st.floats(0, 1, exclude_max=True),
    change=st.integers(1, 255),
    length_change=st.integers(-3, 3),
)
def test_an_entry_with_any_byte_changed_added_or_lost_is_a_miss(
    redis_url: str, key_index: int, position: float, change: int, length_change: int
) -> None:
    async def run() -> None:
        store = patient_store(redis_url, _SECRETS)
        async with Redis.from_url(redis_url) as admin:
            await _put_all(store, admin)
            key = (await _keys(admin, _REFS[0]))[key_index]
            value = await admin.get(key)
            assert isinstance(value, bytes)
            content = bytearray(value)
            content[int(position * len(content))] ^= change
            content = content[: len(content) + length_change] + bytes(max(0, length_change))
            await admin.set(key, bytes(content))

            assert await store.get(_TENANT, _REFS[0]) is None
            assert await store.lookup(_TENANT, _REFS[0].embedding_id) is None
            assert await store.get(_TENANT, _REFS[1]) is not None
        await store.close()

    asyncio.run(run())


@settings(max_examples=60, deadline=None)
@given(source=st.integers(0, 7), target=st.integers(0, 7))
def test_an_entry_under_which_another_value_was_put_is_a_miss(
    redis_url: str, source: int, target: int
) -> None:
    assume(source != target)

    async def run() -> None:
        store = patient_store(redis_url, _SECRETS)
        async with Redis.from_url(redis_url) as admin:
            await _put_all(store, admin)
            keys = [key for ref in _REFS for key in await _keys(admin, ref)]
            is_same = await admin.get(keys[source]) == await admin.get(keys[target])
            await admin.copy(keys[source], keys[target], replace=True)

            loaded = await store.get(_TENANT, _REFS[target // 4])
            assert (loaded is not None) == is_same
        await store.close()

    asyncio.run(run())
