"""An embedding that is encoded again is kept as long as the item's name asks."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from chiasm.common.identity import AliasName
from chiasm.common.media import Modality
from chiasm.common.secrets import StoreSecrets
from chiasm.v1 import media_pb2
from tests.fakes.checkpoints import make_qwen2_vl
from tests.fakes.embeddings import patient_store
from tests.fakes.pictures import encode, noise
from tests.harness.encoder import EncoderClient, EncoderProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from chiasm.common.embedding_store import EmbeddingStore
    from tests.fakes.redis_server import RedisServer

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="function")]

_MINUTE_S, _DAY_S, _WEEK_S = 60, 24 * 3600, 7 * 24 * 3600
_PICTURE = encode(noise(300, 200), "PNG")


class _Shelf:
    """An encoder, its store, and what a gateway does with both."""

    def __init__(self, client: EncoderClient, store: EmbeddingStore, server: RedisServer) -> None:
        self.client = client
        self.store = store
        self.server = server

    async def put(self, uuid: str, ttl_s: int) -> None:
        """Have the picture encoded under a name that is kept for ``ttl_s``."""
        await self.client.encode(_PICTURE, uuid=uuid)
        name = AliasName(Modality.IMAGE, "", uuid)
        peeked = await self.store.aliases.peek("tenant", name)
        assert peeked is not None
        assert peeked.target.record is not None
        record = dataclasses.replace(peeked.target.record, ttl_s=ttl_s)
        await self.store.aliases.describe("tenant", name, record)

    async def evict(self) -> None:
        """Lose the embedding as Redis may."""
        for suffix in (":m", ":0"):
            for key in await self.server.keys(suffix):
                await self.server.admin.delete(key)

    async def seconds_left(self, suffix: str) -> float:
        """Return how long the one key with ``suffix`` is kept."""
        (key,) = await self.server.keys(suffix)
        return await self.server.admin.pttl(key) / 1000


@pytest_asyncio.fixture
async def shelf(tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[_Shelf]:
    process = EncoderProcess(make_qwen2_vl(tmp_path / "model"), redis_server.url, tmp_path, [])
    await process.start()
    client = process.client()
    store = patient_store(redis_server.url, StoreSecrets.load(tmp_path / "store_secret"))
    yield _Shelf(client, store, redis_server)
    await store.close()
    await client.close()
    assert await process.stop() == 0


async def test_evicted_embedding_that_is_sent_again_is_kept_for_the_time_of_its_name(
    shelf: _Shelf,
) -> None:
    for uuid, ttl_s in (("short", _MINUTE_S), ("long", _WEEK_S)):
        await shelf.put(uuid, ttl_s)
        await shelf.evict()

        answer = await shelf.client.encode(_PICTURE, uuid=uuid)

        assert answer.status == media_pb2.CACHE_STATUS_MISS
        assert ttl_s - 30 < await shelf.seconds_left(":m") <= ttl_s
        assert 2 * ttl_s - 30 < await shelf.seconds_left(":0") <= 2 * ttl_s
        await shelf.evict()


async def test_embedding_that_others_sent_again_is_kept_for_the_longest_time_of_a_name(
    shelf: _Shelf,
) -> None:
    await shelf.put("short", _MINUTE_S)
    await shelf.put("long", _WEEK_S)
    await shelf.evict()

    await shelf.client.encode(_PICTURE)
    await shelf.client.encode(_PICTURE, uuid="short")
    assert _MINUTE_S < await shelf.seconds_left(":m") <= _DAY_S
    await shelf.client.encode(_PICTURE, uuid="long")
    assert _DAY_S < await shelf.seconds_left(":m") <= _WEEK_S


async def test_names_that_are_sent_at_one_time_get_the_longest_time_of_them(shelf: _Shelf) -> None:
    await shelf.put("short", _MINUTE_S)
    await shelf.put("plain", 0)
    await shelf.evict()
    names = ["short"] * 3 + ["plain"]

    await asyncio.gather(*(shelf.client.encode(_PICTURE, uuid=uuid) for uuid in names))

    assert _MINUTE_S < await shelf.seconds_left(":m") <= _DAY_S
