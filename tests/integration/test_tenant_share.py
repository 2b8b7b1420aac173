"""Tests of ``chiasm.common.tenant_share`` with a real Redis: a flood costs who floods."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from chiasm.common.errors import StoreUnavailableError
from chiasm.common.limits import MAX_MEDIA_TTL_S
from chiasm.common.metrics import STORE_SHARE_FORGOTTEN
from chiasm.common.secrets import StoreSecrets
from chiasm.common.tenant_share import KEY_BYTES, NUM_SEGMENTS
from tests.fakes.embeddings import make_embedding, make_layout, make_ref, patient_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from chiasm.common.embedding_store import EmbeddingStore
    from chiasm.common.media import EmbeddingRef
    from tests.fakes.redis_server import RedisServer

pytestmark = pytest.mark.integration

_SECRETS = StoreSecrets.generate()
_SHARE = 4 << 20
# An embedding and its two keys take a quarter of a segment.
_ROWS = (_SHARE // NUM_SEGMENTS // 4 - 2 * KEY_BYTES) // 16
_NUM_IN_SHARE = 4 * NUM_SEGMENTS
_NUM_WAVES = 8


@pytest_asyncio.fixture
async def store(redis_server: RedisServer) -> AsyncIterator[EmbeddingStore]:
    store = patient_store(redis_server.url, _SECRETS, tenant_bytes=_SHARE)
    yield store
    await store.close()


def _ref(seed: int) -> EmbeddingRef:
    return make_ref(num_rows=_ROWS, width=8, seed=seed)


async def _put(store: EmbeddingStore, tenant: str, *seeds: int) -> None:
    for seed in seeds:
        ref = _ref(seed)
        await store.put(tenant, make_embedding(ref), make_layout(ref))


async def _found(store: EmbeddingStore, tenant: str, num_seeds: int) -> list[int]:
    """Return which of the first seeds the store has whole."""
    return [n for n in range(num_seeds) if await store.get(tenant, _ref(n)) is not None]


async def _survives_a_flood(redis_server: RedisServer, share: int | None) -> bool:
    """Tell whether an embedding is still there after another tenant's flood, however long."""
    await redis_server.command("CONFIG", "SET", "maxmemory", str(12 << 20))
    store = patient_store(redis_server.url, _SECRETS, tenant_bytes=share)
    try:
        await _put(store, "quiet", 0)
        # Which key Redis gives up first is chance: what is about as old is as good to it.
        for wave in range(_NUM_WAVES):
            first = wave * 4 * _NUM_IN_SHARE
            await _put(store, "flood", *range(first, first + 4 * _NUM_IN_SHARE))
            if await store.get("quiet", _ref(0)) is None:
                return False
        return await store.lookup("quiet", _ref(0).embedding_id) is not None
    finally:
        await store.close()


async def test_flood_of_one_tenant_leaves_the_embedding_of_another_alone(
    redis_server: RedisServer,
) -> None:
    assert await _survives_a_flood(redis_server, _SHARE)


async def test_without_a_share_a_flood_costs_another_tenant_its_embedding(
    redis_server: RedisServer,
) -> None:
    assert not await _survives_a_flood(redis_server, None)


async def test_all_that_fits_the_share_stays_and_what_is_beyond_costs_the_oldest(
    store: EmbeddingStore,
) -> None:
    await _put(store, "a", *range(_NUM_IN_SHARE))
    assert await _found(store, "a", _NUM_IN_SHARE) == list(range(_NUM_IN_SHARE))
    before = STORE_SHARE_FORGOTTEN._value.get()

    await _put(store, "a", _NUM_IN_SHARE)

    assert await _found(store, "a", _NUM_IN_SHARE + 1) == list(range(4, _NUM_IN_SHARE + 1))
    assert STORE_SHARE_FORGOTTEN._value.get() == before + 4


async def test_what_is_forgotten_leaves_no_key_behind(
    store: EmbeddingStore, redis_server: RedisServer
) -> None:
    await _put(store, "a", *range(3 * _NUM_IN_SHARE))

    keys = await redis_server.keys()
    num_kept = len(await _found(store, "a", 3 * _NUM_IN_SHARE))
    assert num_kept == _NUM_IN_SHARE
    # And the counter and the segments.
    assert len(keys) == 2 * num_kept + 1 + NUM_SEGMENTS
    for key in keys:
        assert await redis_server.admin.pttl(key) > 0


async def test_newer_write_of_an_embedding_outlives_its_older_one(store: EmbeddingStore) -> None:
    await _put(store, "a", *range(8), *range(4))

    await _put(store, "a", *range(100, 101 + _NUM_IN_SHARE - 8))

    # The first four left the share, were it not for their second write.
    assert await _found(store, "a", 8) == [0, 1, 2, 3]


async def test_writers_at_one_time_keep_within_the_share(
    store: EmbeddingStore, redis_server: RedisServer
) -> None:
    other = patient_store(redis_server.url, _SECRETS, tenant_bytes=_SHARE)
    seeds = range(2 * _NUM_IN_SHARE)
    await asyncio.gather(
        *(_put(one, "a", *seeds[first::8]) for first, one in enumerate([store, other] * 4))
    )

    num_kept = len(await _found(store, "a", len(seeds)))
    assert _NUM_IN_SHARE - 8 <= num_kept <= _NUM_IN_SHARE
    await other.close()


async def test_embedding_larger_than_a_share_is_not_stored(
    store: EmbeddingStore, redis_server: RedisServer
) -> None:
    largest = (NUM_SEGMENTS - 1) * (_SHARE // NUM_SEGMENTS) - 5 * KEY_BYTES  # four chunks
    fits, too_large = (make_ref(num_rows=1, width=largest // 2 + more) for more in (0, 1))
    await store.put("a", make_embedding(fits), make_layout(fits))
    assert await store.get("a", fits) is not None

    with pytest.raises(StoreUnavailableError, match="larger than the share"):
        await store.put("b", make_embedding(too_large), make_layout(too_large))
    assert len(await redis_server.keys(":m")) == 1


@pytest.mark.parametrize("junk", [b"x" * 51, b"\xff" * 5200, b"\0" * 5200])
async def test_foreign_records_are_forgotten_without_harm(
    store: EmbeddingStore, redis_server: RedisServer, junk: bytes
) -> None:
    await _put(store, "a", 0)
    counter = f"chiasm:{_SECRETS.keys('a').tag}:n"
    await redis_server.admin.set(f"{counter}:0", junk)

    await _put(store, "a", *range(1, _NUM_IN_SHARE + 1))

    assert await redis_server.admin.exists(f"{counter}:0") == 0
    assert await store.get("a", _ref(0)) is not None
    assert await store.get("a", _ref(_NUM_IN_SHARE)) is not None


async def test_records_of_a_lost_counter_end_with_their_time(
    store: EmbeddingStore, redis_server: RedisServer
) -> None:
    await _put(store, "a", *range(_NUM_IN_SHARE // 2))
    await redis_server.admin.delete(f"chiasm:{_SECRETS.keys('a').tag}:n")

    await _put(store, "a", *range(_NUM_IN_SHARE // 2, 2 * _NUM_IN_SHARE))

    # What was written before the loss was recorded in segments that were written to again.
    assert len(await _found(store, "a", 2 * _NUM_IN_SHARE)) <= _NUM_IN_SHARE


async def test_what_use_has_kept_for_long_counts_as_what_was_just_written(
    redis_server: RedisServer,
) -> None:
    ttl_s = 1.0
    store = patient_store(redis_server.url, _SECRETS, ttl_s, tenant_bytes=_SHARE)
    await _put(store, "a", *range(_NUM_IN_SHARE))
    ends_at = time.monotonic() + 2.5 * ttl_s
    while time.monotonic() < ends_at:
        for seed in range(_NUM_IN_SHARE):
            await store.lookup("a", _ref(seed).embedding_id)
        await asyncio.sleep(0.1 * ttl_s)

    await _put(store, "a", *range(_NUM_IN_SHARE, 2 * _NUM_IN_SHARE))

    assert len(await _found(store, "a", 2 * _NUM_IN_SHARE)) <= _NUM_IN_SHARE
    await store.close()


async def test_a_write_renews_all_records_for_longer_than_any_embedding_is_kept(
    store: EmbeddingStore, redis_server: RedisServer
) -> None:
    await _put(store, "a", *range(2 * _NUM_IN_SHARE))
    records = [key for key in await redis_server.keys() if ":n" in key]
    for key in records:
        await redis_server.admin.pexpire(key, 50_000)

    await _put(store, "a", 0)
    assert await store.set_ttl("a", _ref(0).embedding_id, MAX_MEDIA_TTL_S, may_shorten=False)

    records = [key for key in await redis_server.keys() if ":n" in key]
    others = [key for key in await redis_server.keys() if ":n" not in key]
    lives = [await redis_server.admin.pttl(key) / 1000 for key in records]
    longest = max([await redis_server.admin.pttl(key) / 1000 for key in others])
    assert len(lives) == 1 + NUM_SEGMENTS
    assert longest > MAX_MEDIA_TTL_S
    assert min(lives) >= longest - 10


async def test_forgotten_tenant_begins_anew(
    store: EmbeddingStore, redis_server: RedisServer
) -> None:
    await _put(store, "a", *range(8))

    await store.tenants.forget("a")

    assert await redis_server.keys() == []
    await _put(store, "a", *range(_NUM_IN_SHARE))
    assert len(await _found(store, "a", _NUM_IN_SHARE)) == _NUM_IN_SHARE
