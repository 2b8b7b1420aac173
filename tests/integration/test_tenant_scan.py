"""Tests of what is kept of a tenant: for how long, what a walk finds of it, and how it ends."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from chiasm.common.alias_target import AliasRecord
from chiasm.common.errors import InvalidRequestError, MediaNotFoundError
from chiasm.common.identity import AliasName, source_digest
from chiasm.common.media import Modality, ProcessingOptions, RequestContext
from chiasm.common.media_resolver import MediaQuery, MediaResolver
from chiasm.common.secrets import StoreSecrets
from chiasm.common.tenant_scan import ScanCursor
from tests.fakes.embeddings import make_embedding, make_layout, make_ref, patient_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.fakes.redis_server import RedisServer

pytestmark = pytest.mark.integration

_SECRETS = StoreSecrets((bytes([1] * 32),))
_TTL_S = 100.0
_CONTEXT = RequestContext("request", "attempt", tenant="a")
_QUERY = MediaQuery(Modality.IMAGE, ProcessingOptions())


class _Shelf:
    """A store with the objects that a test puts on it."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server
        self.store = patient_store(server.url, _SECRETS, _TTL_S)
        self.resolver = MediaResolver(self.store, _SECRETS, bytes([9] * 32))

    async def put(self, uuid: str, tenant: str = "a", content: str = "") -> bytes:
        """Put an object as the encoder does; return its embedding id."""
        context = dataclasses.replace(_CONTEXT, tenant=tenant)
        digest = source_digest((content or uuid).encode())
        query = dataclasses.replace(_QUERY, uuid=uuid, source_digest=digest, num_bytes=3)
        embedding_id = self.resolver.embedding_id(context, query, digest)
        ref = dataclasses.replace(make_ref(), embedding_id=embedding_id)
        await self.store.put(tenant, make_embedding(ref), make_layout(ref))
        await self.resolver.bind(context, query, digest, num_tokens=8)
        return embedding_id

    async def walk(self, tenant: str, max_hashes: int) -> list[list[str]]:
        """Return the uuids of every page."""
        pages, cursor = [], ScanCursor()
        while True:
            page = await self.store.tenants.alias_hashes(tenant, cursor, max_hashes)
            peeked = await self.store.aliases.peek_hashes(tenant, page.hashes)
            pages.append([one.target.record.uuid for one in peeked if one.target.record])
            if page.next_cursor is None:
                return pages
            cursor = ScanCursor.parse(str(page.next_cursor), "after")

    async def seconds_left(self, suffix: str) -> list[float]:
        """Return how long the keys with ``suffix`` are kept."""
        keys = await self.server.keys(suffix)
        return [await self.server.admin.pttl(key) / 1000 for key in keys]


@pytest_asyncio.fixture
async def shelf(redis_server: RedisServer) -> AsyncIterator[_Shelf]:
    shelf = _Shelf(redis_server)
    yield shelf
    await shelf.store.close()


async def test_a_record_tells_what_was_put(shelf: _Shelf) -> None:
    embedding_id = await shelf.put("cats/one")

    peeked = await shelf.store.aliases.peek("a", AliasName(Modality.IMAGE, "", "cats/one"))

    assert peeked is not None
    record = peeked.target.record
    assert record is not None
    assert (record.uuid, record.embedding_id) == ("cats/one", embedding_id)
    assert (record.num_bytes, record.num_tokens) == (3, 8)
    assert _TTL_S < peeked.left_s <= 2 * _TTL_S


@pytest.mark.parametrize("max_hashes", [1, 7, 100])
async def test_pages_together_hold_every_object_of_the_tenant_once(
    shelf: _Shelf, max_hashes: int
) -> None:
    for number in range(20):
        await shelf.put(f"cat-{number}")
        await shelf.put(f"dog-{number}", tenant="b")

    pages = await shelf.walk("a", max_hashes)

    assert max(map(len, pages)) <= max_hashes
    assert sorted(uuid for page in pages for uuid in page) == sorted(f"cat-{n}" for n in range(20))


async def test_a_walk_passes_over_what_others_wrote_under_our_prefix(shelf: _Shelf) -> None:
    await shelf.put("cat")
    (key,) = [key for key in await shelf.server.keys() if ":a:" in key]
    prefix = key.rpartition(":")[0]
    for name in ("x", "f" * 64, "\x00" * 64):
        await shelf.server.admin.set(f"{prefix}:{name}", b"rubbish" * 3000)
    await shelf.server.admin.lpush(f"{prefix}:{'e' * 64}", b"list")

    assert await shelf.walk("a", 100) == [["cat"]]


async def test_a_record_copied_to_another_tenant_or_key_is_not_believed(shelf: _Shelf) -> None:
    await shelf.put("cat")
    await shelf.put("dog", tenant="b")
    keys = [key for key in await shelf.server.keys() if ":a:" in key]
    values = [await shelf.server.value(key) for key in keys]
    for key, value in zip(keys, reversed(values), strict=True):
        await shelf.server.admin.set(key, value)

    assert await shelf.walk("a", 100) == [[]]
    assert await shelf.walk("b", 100) == [[]]


@pytest.mark.parametrize("text", ["x", "-1", "1.", f"1.{'g' * 64}", "9" * 20, "1" * 21])
def test_a_cursor_that_is_not_ours_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ScanCursor.parse(text, "after")
    assert caught.value.param == "after"


async def test_forgetting_a_tenant_leaves_nothing_of_it_and_all_of_others(shelf: _Shelf) -> None:
    for number in range(5):
        await shelf.put(f"cat-{number}")
    await shelf.put("dog", tenant="b")
    tag = _SECRETS.keys("a").tag

    assert await shelf.store.tenants.forget("a") == 5

    keys = await shelf.server.keys()
    assert [key for key in keys if tag in key] == []
    assert await shelf.walk("b", 10) == [["dog"]]
    assert await shelf.store.tenants.forget("a") == 0


async def test_an_object_with_a_time_of_its_own_keeps_it_through_every_use(shelf: _Shelf) -> None:
    name = AliasName(Modality.IMAGE, "", "cat")
    embedding_id = await shelf.put("cat")
    assert await shelf.store.set_ttl("a", embedding_id, 5, may_shorten=True)
    peeked = await shelf.store.aliases.peek("a", name)
    assert peeked is not None
    bound = peeked.target
    assert bound.record is not None
    record = dataclasses.replace(bound.record, ttl_s=5, created_s=0, num_bytes=0)
    target = await shelf.store.aliases.describe("a", name, record)
    assert target == dataclasses.replace(bound, record=dataclasses.replace(bound.record, ttl_s=5))

    stored = await shelf.store.lookup("a", embedding_id)
    assert stored is not None
    assert await shelf.store.get("a", stored.ref) is not None
    assert await shelf.store.aliases.read("a", name) == target

    alias = next(key for key in await shelf.server.keys() if ":a:" in key)
    assert 0 < await shelf.server.admin.pttl(alias) / 1000 <= 5
    assert all(left_s <= 5 for left_s in await shelf.seconds_left(":m"))
    assert all(5 < left_s <= 10 for left_s in await shelf.seconds_left(":0"))
    (left_s,) = await shelf.store.seconds_left("a", [embedding_id])
    assert 0 < left_s <= 5


async def test_a_shared_embedding_is_never_kept_shorter_than_before(shelf: _Shelf) -> None:
    embedding_id = await shelf.put("cat")

    assert await shelf.store.set_ttl("a", embedding_id, 5, may_shorten=False)
    (shorter_s,) = await shelf.seconds_left(":m")
    assert await shelf.store.set_ttl("a", embedding_id, 500, may_shorten=False)
    (longer_s,) = await shelf.seconds_left(":m")
    await shelf.store.lookup("a", embedding_id)
    (used_s,) = await shelf.seconds_left(":m")

    assert 5 < shorter_s <= 100
    assert 100 < longer_s <= 500
    assert 100 < used_s <= 500


async def test_what_is_not_there_gets_no_time(shelf: _Shelf) -> None:
    name = AliasName(Modality.IMAGE, "", "cat")
    assert await shelf.store.set_ttl("a", bytes(32), 5, may_shorten=True) is False
    record = AliasRecord("cat", Modality.IMAGE, "", bytes(32), bytes(32), 1, 1, 1)
    assert await shelf.store.aliases.describe("a", name, record) is None
    assert await shelf.store.seconds_left("a", [bytes(32)]) == [0.0]


async def _put_as(shelf: _Shelf, query: MediaQuery) -> bytes:
    """Store the embedding of an item under the options of ``query``; return its id."""
    assert query.source_digest is not None
    embedding_id = shelf.resolver.embedding_id(_CONTEXT, query, query.source_digest)
    ref = dataclasses.replace(make_ref(), embedding_id=embedding_id)
    await shelf.store.put("a", make_embedding(ref), make_layout(ref))
    return embedding_id


@pytest.mark.parametrize("operators", [ProcessingOptions(), ProcessingOptions(max_pixels=9000)])
async def test_null_media_without_options_means_the_item_as_it_was_named(
    shelf: _Shelf, operators: ProcessingOptions
) -> None:
    digest = source_digest(b"cat")
    full = dataclasses.replace(_QUERY, source_digest=digest, options=operators)
    small = dataclasses.replace(full, uuid="cat", options=ProcessingOptions(max_pixels=1000))
    small_id = await _put_as(shelf, small)
    await shelf.resolver.bind(_CONTEXT, small, digest)
    asked = dataclasses.replace(_QUERY, uuid="cat", options=operators)
    as_named = dataclasses.replace(asked, is_plain=True)

    alone = await shelf.resolver.resolve(_CONTEXT, as_named)
    with pytest.raises(MediaNotFoundError):
        await shelf.resolver.resolve(_CONTEXT, asked)
    full_id = await _put_as(shelf, full)
    beside = await shelf.resolver.resolve(_CONTEXT, as_named)
    other = await shelf.resolver.resolve(_CONTEXT, asked)

    assert (alone.embedding_id, alone.is_hit) == (small_id, True)
    assert (beside.embedding_id, beside.is_hit) == (small_id, True)
    assert (other.embedding_id, other.is_hit) == (full_id, True)
