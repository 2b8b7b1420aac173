"""What was stored before the store's secret changed can be deleted afterwards."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from chiasm.common.identity import source_digest
from chiasm.common.media import Modality, ProcessingOptions, RequestContext
from chiasm.common.media_resolver import MediaQuery, MediaResolver
from chiasm.common.secrets import StoreSecrets
from chiasm.encoder.catalog import Catalog
from chiasm.encoder.commands import ItemKey
from tests.fakes.embeddings import make_embedding, make_layout, make_ref, patient_store
from tests.harness.gateway import run_gateway
from tests.harness.media_api import MediaApi

if TYPE_CHECKING:
    from pathlib import Path

    from chiasm.common.embedding_store import EmbeddingStore
    from tests.fakes.redis_server import RedisServer

pytestmark = pytest.mark.integration

_OLD, _NEW = bytes([1] * 32), bytes([2] * 32)
_BEFORE, _AFTER = StoreSecrets((_OLD,)), StoreSecrets((_NEW, _OLD))
_CONTEXT = RequestContext("request", "attempt", tenant="default")
_DIGEST = source_digest(b"cat")
_CAT = MediaQuery(Modality.IMAGE, ProcessingOptions(), source_digest=_DIGEST)


async def _store_cat(store: EmbeddingStore, query: MediaQuery, fingerprint: bytes) -> None:
    """Store and bind an item as an encoder did that knew the old secret alone."""
    resolver = MediaResolver(store, _BEFORE, fingerprint)
    embedding_id = resolver.embedding_id(_CONTEXT, query, _DIGEST)
    ref = dataclasses.replace(make_ref(), embedding_id=embedding_id, fingerprint=fingerprint)
    await store.put(_CONTEXT.tenant, make_embedding(ref), make_layout(ref))
    await resolver.bind(_CONTEXT, query, _DIGEST)


async def test_encoder_deletes_by_digest_what_an_older_secret_named(
    redis_server: RedisServer,
) -> None:
    before = patient_store(redis_server.url, _BEFORE)
    await _store_cat(before, _CAT, bytes([9] * 32))
    await before.close()
    store = patient_store(redis_server.url, _AFTER)
    catalog = Catalog(store, MediaResolver(store, _AFTER, bytes([9] * 32)))
    key = ItemKey(_CONTEXT, Modality.IMAGE, ProcessingOptions(), source_digest=_DIGEST)

    assert await catalog.delete(key)

    assert await redis_server.keys() == []
    assert not await catalog.delete(key)
    await store.close()


async def test_gateway_deletes_all_of_an_object_that_an_older_secret_named(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    secrets = tmp_path / "store_secret"
    secrets.write_text(f"{_NEW.hex()}\n{_OLD.hex()}\n")
    secrets.chmod(0o600)
    async with run_gateway(tmp_path, ["--redis-url", redis_server.url]) as gateway:
        before = patient_store(redis_server.url, _BEFORE)
        small = dataclasses.replace(_CAT, uuid="cat", options=ProcessingOptions(max_pixels=1000))
        for query in (small, _CAT):
            await _store_cat(before, query, gateway.encoder.fingerprint)
        await before.close()

        assert (await MediaApi(gateway).delete("cat")).status == 200

        assert await redis_server.keys() == []
