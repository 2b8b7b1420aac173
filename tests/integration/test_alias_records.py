"""What an alias's record tells after the item is bound again, by the same or a newer encoder."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from chiasm.common.identity import AliasName, source_digest, url_digest
from chiasm.common.media import Modality, ProcessingOptions, RequestContext
from chiasm.common.media_resolver import MediaQuery, MediaResolver
from chiasm.common.secrets import StoreSecrets
from tests.fakes.embeddings import make_embedding, make_layout, make_ref, patient_store

if TYPE_CHECKING:
    from chiasm.common.alias_target import AliasRecord, AliasTarget
    from chiasm.common.embedding_store import EmbeddingStore
    from tests.fakes.redis_server import RedisServer

pytestmark = pytest.mark.integration

_OLD, _NEW = bytes([1] * 32), bytes([2] * 32)
_SECRETS = StoreSecrets((_OLD,))
_FIRST, _SECOND = bytes([8] * 32), bytes([9] * 32)
_CONTEXT = RequestContext("request", "attempt", tenant="a")
_DIGEST = source_digest(b"cat")
_URL = "https://host/cat.png"
_QUERY = MediaQuery(Modality.IMAGE, ProcessingOptions(), uuid="cat", source_digest=_DIGEST)
_NAME = AliasName(Modality.IMAGE, "", "cat")


async def _encode(
    store: EmbeddingStore, secrets: StoreSecrets, fingerprint: bytes, query: MediaQuery
) -> bytes:
    """Store and bind an item as the encoder with ``fingerprint`` does; return its id."""
    resolver = MediaResolver(store, secrets, fingerprint)
    embedding_id = resolver.embedding_id(_CONTEXT, query, _DIGEST)
    ref = dataclasses.replace(make_ref(), embedding_id=embedding_id, fingerprint=fingerprint)
    await store.put("a", make_embedding(ref), make_layout(ref))
    await resolver.bind(_CONTEXT, query, _DIGEST, num_tokens=fingerprint[0])
    return embedding_id


async def _bound(store: EmbeddingStore) -> AliasTarget:
    peeked = await store.aliases.peek("a", _NAME)
    assert peeked is not None
    return peeked.target


async def _put_for_a_minute(store: EmbeddingStore) -> AliasRecord:
    """Bind by URL and describe an item as a put at the first encoder does."""
    query = dataclasses.replace(_QUERY, url=_URL, num_bytes=3)
    await _encode(store, _SECRETS, _FIRST, query)
    record = (await _bound(store)).record
    assert record is not None
    record = dataclasses.replace(record, ttl_s=60)
    await store.aliases.describe("a", _NAME, record)
    return record


@pytest.mark.parametrize("secrets", [_SECRETS, StoreSecrets((_NEW, _OLD))], ids=["same", "rotated"])
async def test_item_that_is_sent_to_a_newer_encoder_is_described_by_what_that_made(
    redis_server: RedisServer, secrets: StoreSecrets
) -> None:
    store = patient_store(redis_server.url, secrets)
    before = patient_store(redis_server.url, _SECRETS)
    first = await _put_for_a_minute(before)
    await before.close()

    embedding_id = await _encode(store, secrets, _SECOND, _QUERY)

    bound = await _bound(store)
    assert bound.record == dataclasses.replace(
        first, embedding_id=embedding_id, fingerprint=_SECOND, num_tokens=_SECOND[0]
    )
    assert bound.url_digest == url_digest(_URL)
    (alias,) = [key for key in await redis_server.keys() if ":a:" in key]
    assert 0 < await redis_server.admin.pttl(alias) <= 60_000
    await store.close()


async def test_item_that_is_sent_to_the_same_encoder_stays_described_as_it_was_named(
    redis_server: RedisServer,
) -> None:
    store = patient_store(redis_server.url, _SECRETS)
    first = await _put_for_a_minute(store)
    small = dataclasses.replace(_QUERY, options=ProcessingOptions(max_pixels=1000))

    await _encode(store, _SECRETS, _FIRST, small)

    assert (await _bound(store)).record == first
    await store.close()


@pytest.mark.parametrize("has_data", [True, False], ids=["data", "null"])
async def test_use_of_a_name_keeps_an_embedding_of_others_as_long_as_the_name_asks(
    redis_server: RedisServer, has_data: bool
) -> None:
    store = patient_store(redis_server.url, _SECRETS, ttl_s=30.0)
    first = await _put_for_a_minute(store)
    used = dataclasses.replace(_QUERY, source_digest=_DIGEST if has_data else None)

    resolution = await MediaResolver(store, _SECRETS, _FIRST).resolve(_CONTEXT, used)

    assert resolution.is_hit
    assert resolution.ttl_s == 60
    (left_s,) = await store.seconds_left("a", [first.embedding_id])
    assert 30 < left_s <= 60
    await store.close()
