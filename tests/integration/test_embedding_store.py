"""Tests of ``chiasm.common.embedding_store`` with a real Redis: what is kept, what is refused."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from chiasm.common.chunks import CHUNK_BYTES
from chiasm.common.embedding_store import EmbeddingStore, StoredEmbedding
from chiasm.common.media import DataType, EmbeddingRef, TensorRole, TensorSpec
from chiasm.common.metrics import STORE_BAD_ENTRIES
from chiasm.common.secrets import StoreSecrets
from tests.fakes.embeddings import make_embedding, make_layout, make_ref, patient_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from chiasm.common.media import Embedding
    from tests.fakes.redis_server import RedisServer

pytestmark = pytest.mark.integration

_SECRETS = StoreSecrets.generate()
_TTL_S = 100.0


@pytest_asyncio.fixture
async def store(redis_server: RedisServer) -> AsyncIterator[EmbeddingStore]:
    store = patient_store(redis_server.url, _SECRETS, _TTL_S)
    yield store
    await store.close()


def _large_ref(seed: int = 0) -> EmbeddingRef:
    """Return the ref of 5.5 chunks of one tensor and 1 of another."""
    splice = TensorSpec(TensorRole.SPLICE, DataType.BFLOAT16, (11, CHUNK_BYTES // 4))
    deepstack = TensorSpec(TensorRole.DEEPSTACK, DataType.FLOAT32, (1, CHUNK_BYTES // 4), 1)
    return dataclasses.replace(make_ref(seed=seed), tensors=(splice, deepstack))


async def _put(store: EmbeddingStore, ref: EmbeddingRef, seed: int = 0) -> Embedding:
    embedding = make_embedding(ref, seed)
    await store.put("a", embedding, make_layout(ref))
    return embedding


def _num_bad_entries() -> float:
    samples = [sample for metric in STORE_BAD_ENTRIES.collect() for sample in metric.samples]
    return sum(sample.value for sample in samples if sample.name.endswith("_total"))


@pytest.mark.parametrize("ref", [make_ref(), make_ref(num_deepstack=2), _large_ref()])
async def test_what_was_put_is_found_again(store: EmbeddingStore, ref: EmbeddingRef) -> None:
    embedding = await _put(store, ref)

    stored = await store.lookup("a", ref.embedding_id)
    loaded = await store.get("a", ref)

    assert stored == StoredEmbedding(ref, make_layout(ref))
    assert loaded is not None
    assert loaded.ref == ref
    assert [bytes(buffer) for buffer in loaded.buffers] == [bytes(b) for b in embedding.buffers]


async def test_keys_have_the_documented_form(
    store: EmbeddingStore, redis_server: RedisServer
) -> None:
    ref = _large_ref()
    await _put(store, ref)

    prefix = f"chiasm:{_SECRETS.keys('a').tag}:{ref.embedding_id.hex()}"
    keys = await redis_server.keys()
    write_ids = {key.split(":")[3] for key in keys} - {"m"}
    assert len(write_ids) == 1
    chunks = [f"{prefix}:{write_id}:{index}" for write_id in write_ids for index in range(7)]
    assert keys == sorted([f"{prefix}:m", *chunks])


async def test_an_unknown_id_and_another_tenant_find_nothing(store: EmbeddingStore) -> None:
    ref = make_ref()
    await _put(store, ref)

    assert await store.lookup("a", bytes(32)) is None
    assert await store.lookup("b", ref.embedding_id) is None
    assert await store.get("b", ref) is None


async def test_another_secret_finds_nothing(
    store: EmbeddingStore, redis_server: RedisServer
) -> None:
    ref = make_ref()
    await _put(store, ref)
    other = patient_store(redis_server.url, StoreSecrets.generate(), _TTL_S)

    assert await other.lookup("a", ref.embedding_id) is None
    await other.close()


async def test_a_rotated_secret_still_finds_what_the_old_one_stored(
    redis_server: RedisServer,
) -> None:
    old, new = bytes([1] * 32), bytes([2] * 32)
    before = patient_store(redis_server.url, StoreSecrets((old,)))
    after = patient_store(redis_server.url, StoreSecrets((new, old)))
    ref = make_ref()
    await _put(before, ref)

    assert await after.get("a", ref) is not None
    await before.close()
    await after.close()


async def test_a_ref_of_another_shape_is_a_miss_that_leaves_the_entry(
    store: EmbeddingStore,
) -> None:
    ref = make_ref(num_rows=6, width=8)
    await _put(store, ref)
    other = dataclasses.replace(ref, tensors=make_ref(num_rows=8, width=6).tensors)

    assert await store.get("a", other) is None
    assert await store.get("a", ref) is not None


async def test_a_hit_renews_the_time_of_manifest_and_chunks(
    store: EmbeddingStore, redis_server: RedisServer
) -> None:
    ref = make_ref()
    for use in (lambda: store.lookup("a", ref.embedding_id), lambda: store.get("a", ref)):
        await _put(store, ref)
        for key in await redis_server.keys():
            await redis_server.admin.pexpire(key, 5000)

        await use()

        (manifest,) = await redis_server.keys(":m")
        (chunk,) = [key for key in await redis_server.keys() if key != manifest]
        assert 99_000 < await redis_server.admin.pttl(manifest) <= 100_000
        assert 199_000 < await redis_server.admin.pttl(chunk) <= 200_000
        await store.delete("a", ref.embedding_id)


async def test_deleting_leaves_no_key_and_tells_whether_there_was_one(
    store: EmbeddingStore, redis_server: RedisServer
) -> None:
    ref = _large_ref()
    await _put(store, ref)

    assert await store.delete("a", ref.embedding_id)
    assert not await store.delete("a", ref.embedding_id)
    assert await redis_server.keys() == []


async def test_two_writers_of_one_id_never_mix(store: EmbeddingStore) -> None:
    ref = _large_ref()
    embeddings = await asyncio.gather(*(_put(store, ref, seed) for seed in range(6)))

    loaded = await store.get("a", ref)

    assert loaded is not None
    contents = [bytes(buffer) for buffer in loaded.buffers]
    assert contents in [[bytes(buffer) for buffer in e.buffers] for e in embeddings]


@pytest.mark.parametrize("chunk", [0, 4, 5, 6])
@pytest.mark.parametrize("damage", ["missing", "shorter", "longer", "changed", "wrong type"])
async def test_a_damaged_chunk_is_a_miss_and_the_entry_is_deleted(
    store: EmbeddingStore, redis_server: RedisServer, chunk: int, damage: str
) -> None:
    ref = _large_ref()
    await _put(store, ref)
    (key,) = await redis_server.keys(f":{chunk}")
    content = await redis_server.value(key)
    if damage == "changed":
        await redis_server.admin.setrange(key, len(content) // 2, b"\xaa\x55")
    else:
        await redis_server.admin.delete(key)
    if damage in ("shorter", "longer"):
        await redis_server.admin.set(key, content[:-1] if damage == "shorter" else content + b"x")
    if damage == "wrong type":
        await redis_server.admin.rpush(key, content)
    num_bad = _num_bad_entries()

    assert await store.get("a", ref) is None

    assert _num_bad_entries() == num_bad + 1
    assert await redis_server.keys() == []


async def test_swapped_chunks_are_a_miss(store: EmbeddingStore, redis_server: RedisServer) -> None:
    ref = _large_ref()
    await _put(store, ref)
    first, second = (await redis_server.keys(":0") + await redis_server.keys(":1"))[:2]
    await redis_server.admin.rename(first, "spare")
    await redis_server.admin.rename(second, first)
    await redis_server.admin.rename("spare", second)

    assert await store.get("a", ref) is None


async def test_a_lookup_notices_a_missing_chunk(
    store: EmbeddingStore, redis_server: RedisServer
) -> None:
    ref = _large_ref()
    await _put(store, ref)
    await redis_server.admin.delete(*await redis_server.keys(":3"))

    assert await store.lookup("a", ref.embedding_id) is None
    assert await redis_server.keys() == []


async def test_any_changed_byte_of_a_manifest_is_a_miss_and_the_entry_is_deleted(
    store: EmbeddingStore, redis_server: RedisServer
) -> None:
    ref = make_ref()
    await _put(store, ref)
    (key,) = await redis_server.keys(":m")
    envelope = await redis_server.value(key)
    for position, byte in enumerate(envelope):
        await redis_server.admin.set(key, envelope)
        await redis_server.admin.setrange(key, position, bytes([byte ^ 0x41]))

        assert await store.lookup("a", ref.embedding_id) is None
        assert await redis_server.admin.exists(key) == 0
    await redis_server.admin.set(key, envelope)
    assert await store.get("a", ref) is not None


async def test_any_length_of_a_manifest_but_its_own_is_a_miss(
    store: EmbeddingStore, redis_server: RedisServer
) -> None:
    ref = make_ref()
    await _put(store, ref)
    (key,) = await redis_server.keys(":m")
    envelope = await redis_server.value(key)
    for content in (envelope[: len(envelope) // 2], envelope[:-1], envelope + b"x", b"x" * 10**7):
        await redis_server.admin.set(key, content)
        assert await store.get("a", ref) is None
        assert await redis_server.admin.exists(key) == 0
    await redis_server.admin.rpush(key, b"a list")
    assert await store.get("a", ref) is None


async def test_an_entry_copied_under_another_id_or_tenant_is_a_miss(
    store: EmbeddingStore, redis_server: RedisServer
) -> None:
    ref, other = make_ref(seed=1), make_ref(seed=2)
    await _put(store, ref)
    (key,) = await redis_server.keys(":m")
    envelope = await redis_server.value(key)
    tag = _SECRETS.keys("b").tag
    await redis_server.admin.set(
        key.replace(ref.embedding_id.hex(), other.embedding_id.hex()), envelope
    )
    await redis_server.admin.set(f"chiasm:{tag}:{ref.embedding_id.hex()}:m", envelope)

    assert await store.lookup("a", other.embedding_id) is None
    assert await store.lookup("b", ref.embedding_id) is None
    assert await store.lookup("a", ref.embedding_id) is not None


async def test_an_older_write_of_the_same_id_is_a_miss_once_its_chunks_are_gone(
    store: EmbeddingStore, redis_server: RedisServer
) -> None:
    ref = make_ref()
    await _put(store, ref, seed=1)
    (key,) = await redis_server.keys(":m")
    old = await redis_server.value(key)
    await store.delete("a", ref.embedding_id)
    await _put(store, ref, seed=2)
    await redis_server.admin.set(key, old)

    assert await store.get("a", ref) is None


async def test_buffers_and_layouts_that_contradict_the_ref_are_a_bug(
    store: EmbeddingStore,
) -> None:
    ref = make_ref()
    embedding = make_embedding(ref)
    with pytest.raises(ValueError, match="the ref says"):
        await store.put(
            "a", dataclasses.replace(embedding, buffers=[memoryview(b"")]), make_layout(ref)
        )
    with pytest.raises(ValueError, match="8 embedding tokens"):
        await store.put("a", embedding, make_layout(make_ref(num_rows=8)))


async def test_what_a_get_returns_cannot_be_changed_by_its_readers(store: EmbeddingStore) -> None:
    ref = make_ref()
    await _put(store, ref)
    loaded = await store.get("a", ref)
    assert loaded is not None
    assert all(buffer.readonly for buffer in loaded.buffers)


async def test_ping_tells_that_the_store_is_there(store: EmbeddingStore) -> None:
    assert await store.ping()
