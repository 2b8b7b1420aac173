"""Tests of ``chiasm.common.media_resolver`` with a real Redis: every rule of identity."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from chiasm.common.errors import (
    ConflictError,
    InvalidRequestError,
    MediaNotFoundError,
    StoreUnavailableError,
)
from chiasm.common.identity import source_digest
from chiasm.common.media import Modality, ProcessingOptions, RequestContext
from chiasm.common.media_resolver import MediaQuery, MediaResolver, Resolution
from chiasm.common.secrets import StoreSecrets
from tests.fakes.embeddings import make_embedding, make_layout, make_ref, patient_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.fakes.redis_server import RedisServer

pytestmark = pytest.mark.integration

_SECRETS = StoreSecrets((bytes([1] * 32),))
_FINGERPRINT = bytes([9] * 32)
_CONTEXT = RequestContext("request", "attempt", tenant="a")
_CAT, _DOG = source_digest(b"cat"), source_digest(b"dog")
_IMAGE = MediaQuery(Modality.IMAGE, ProcessingOptions(), param="messages[0].content[1]")
_URL, _OTHER_URL = "https://host/cat.png", "https://host/dog.png"


class _Stack:
    """A resolver and what the encoder does around it."""

    def __init__(self, url: str, secrets: StoreSecrets = _SECRETS) -> None:
        self.store = patient_store(url, secrets)
        self.secrets = secrets
        self.resolver = MediaResolver(self.store, secrets, _FINGERPRINT)

    async def resolve(self, query: MediaQuery, context: RequestContext = _CONTEXT) -> Resolution:
        return await self.resolver.resolve(context, query)

    async def encode(
        self, query: MediaQuery, digest: bytes, context: RequestContext = _CONTEXT
    ) -> bytes:
        """Resolve, put and bind like the encoder; return the embedding id."""
        query = dataclasses.replace(query, source_digest=digest)
        resolution = await self.resolve(query, context)
        assert resolution.embedding_id is not None
        ref = dataclasses.replace(make_ref(), embedding_id=resolution.embedding_id)
        await self.store.put(context.tenant, make_embedding(ref), make_layout(ref))
        await self.resolver.bind(context, query, digest)
        return resolution.embedding_id


@pytest_asyncio.fixture
async def stack(redis_server: RedisServer) -> AsyncIterator[_Stack]:
    stack = _Stack(redis_server.url)
    yield stack
    await stack.store.close()


def _named(
    uuid: str = "cat", digest: bytes | None = None, url: str = "", index: int = 0
) -> MediaQuery:
    return dataclasses.replace(_IMAGE, uuid=uuid, source_digest=digest, url=url, index=index)


async def test_data_without_uuid_is_known_by_its_content(stack: _Stack) -> None:
    query = dataclasses.replace(_IMAGE, source_digest=_CAT)
    before = await stack.resolve(query)
    encoded_id = await stack.encode(_IMAGE, _CAT)
    after = await stack.resolve(query)

    assert not before.is_hit
    assert after.is_hit
    assert before.embedding_id == after.embedding_id == encoded_id
    assert before.source_digest == _CAT


async def test_a_url_without_uuid_is_fetched_always(stack: _Stack) -> None:
    await stack.encode(dataclasses.replace(_IMAGE, url=_URL), _CAT)
    assert await stack.resolve(dataclasses.replace(_IMAGE, url=_URL)) == Resolution(
        None, None, None
    )


async def test_null_media_without_uuid_is_refused_with_the_text_of_vllm(stack: _Stack) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await stack.resolve(_IMAGE)
    assert caught.value.message == (
        "multi_modal_data['image'][0] is empty but multi_modal_uuids['image'][0] is missing."
    )
    assert caught.value.param == _IMAGE.param


async def test_null_media_with_a_known_uuid_is_a_hit(stack: _Stack) -> None:
    encoded_id = await stack.encode(_named(), _CAT)
    resolution = await stack.resolve(_named())
    assert resolution.is_hit
    assert resolution.embedding_id == encoded_id


async def test_null_media_with_an_unknown_uuid_is_not_found_with_the_text_of_vllm(
    stack: _Stack,
) -> None:
    with pytest.raises(MediaNotFoundError) as caught:
        await stack.resolve(_named("unknown", index=2))
    assert caught.value.message == "Cache miss for image at index 2 but data is not provided."
    assert caught.value.reason == "MEDIA_NOT_FOUND"
    assert caught.value.param == _IMAGE.param


async def test_null_media_whose_embedding_was_evicted_is_not_found(stack: _Stack) -> None:
    encoded_id = await stack.encode(_named(), _CAT)
    await stack.store.delete("a", encoded_id)
    with pytest.raises(MediaNotFoundError, match="Cache miss for image at index 0 but"):
        await stack.resolve(_named())


async def test_a_uuid_with_the_same_data_is_a_hit_and_with_other_data_a_conflict(
    stack: _Stack,
) -> None:
    await stack.encode(_named(), _CAT)

    assert (await stack.resolve(_named(digest=_CAT))).is_hit
    with pytest.raises(ConflictError, match="image at index 3 is bound to other") as caught:
        await stack.resolve(_named(digest=_DOG, index=3))
    assert caught.value.reason == "UUID_CONFLICT"
    assert caught.value.param == _IMAGE.param


async def test_a_new_uuid_for_known_content_is_bound_by_the_hit(stack: _Stack) -> None:
    await stack.encode(_IMAGE, _CAT)

    assert (await stack.resolve(_named("new", digest=_CAT))).is_hit

    assert (await stack.resolve(_named("new"))).is_hit
    with pytest.raises(ConflictError):
        await stack.resolve(_named("new", digest=_DOG))


async def test_a_uuid_that_was_only_asked_about_is_not_bound(stack: _Stack) -> None:
    assert not (await stack.resolve(_named(digest=_CAT))).is_hit
    assert not (await stack.resolve(_named(digest=_DOG))).is_hit


async def test_a_uuid_with_the_same_url_skips_the_fetch(stack: _Stack) -> None:
    encoded_id = await stack.encode(_named(url=_URL), _CAT)
    resolution = await stack.resolve(_named(url=_URL))
    assert resolution.is_hit
    assert (resolution.embedding_id, resolution.source_digest) == (encoded_id, _CAT)


async def test_a_uuid_with_another_url_is_fetched_and_compared(stack: _Stack) -> None:
    await stack.encode(_named(url=_URL), _CAT)

    assert await stack.resolve(_named(url=_OTHER_URL)) == Resolution(None, None, None)
    with pytest.raises(ConflictError):
        await stack.resolve(_named(url=_OTHER_URL, digest=_DOG))
    assert (await stack.resolve(_named(url=_OTHER_URL, digest=_CAT))).is_hit
    assert (await stack.resolve(_named(url=_OTHER_URL))).is_hit


async def test_a_uuid_bound_by_data_learns_its_url(stack: _Stack) -> None:
    await stack.encode(_named(), _CAT)
    assert not (await stack.resolve(_named(url=_URL))).is_hit
    assert (await stack.resolve(_named(url=_URL, digest=_CAT))).is_hit
    assert (await stack.resolve(_named(url=_URL))).is_hit


async def test_a_uuid_bound_by_url_keeps_it_when_data_comes(stack: _Stack) -> None:
    await stack.encode(_named(url=_URL), _CAT)
    assert (await stack.resolve(_named(digest=_CAT))).is_hit
    assert (await stack.resolve(_named(url=_URL))).is_hit


async def test_the_same_url_is_fetched_again_once_the_embedding_is_gone(stack: _Stack) -> None:
    encoded_id = await stack.encode(_named(url=_URL), _CAT)
    await stack.store.delete("a", encoded_id)

    assert await stack.resolve(_named(url=_URL)) == Resolution(None, None, None)
    with pytest.raises(ConflictError):
        await stack.resolve(_named(url=_URL, digest=_DOG))


@pytest.mark.parametrize(
    ("query", "context"),
    [
        (_named(), dataclasses.replace(_CONTEXT, tenant="b")),
        (_named(), dataclasses.replace(_CONTEXT, cache_salt="salt")),
        (dataclasses.replace(_named(), modality=Modality.VIDEO), _CONTEXT),
        (_named("Cat"), _CONTEXT),
    ],
    ids=["tenant", "salt", "modality", "spelling"],
)
async def test_a_uuid_holds_only_in_its_scope(
    stack: _Stack, query: MediaQuery, context: RequestContext
) -> None:
    await stack.encode(_named(), _CAT)

    with pytest.raises(MediaNotFoundError):
        await stack.resolve(query, context)
    other = dataclasses.replace(query, source_digest=_DOG)
    assert not (await stack.resolve(other, context)).is_hit


async def test_new_options_under_a_known_uuid_are_never_a_stale_hit(stack: _Stack) -> None:
    encoded_id = await stack.encode(_named(url=_URL), _CAT)
    options = ProcessingOptions(max_pixels=1000)

    with_url = dataclasses.replace(_named(url=_URL), options=options)
    with_data = dataclasses.replace(_named(digest=_CAT), options=options)
    assert not (await stack.resolve(with_url)).is_hit
    resolution = await stack.resolve(with_data)
    assert not resolution.is_hit
    assert resolution.embedding_id != encoded_id
    with pytest.raises(MediaNotFoundError):
        await stack.resolve(dataclasses.replace(_named(), options=options))


async def test_a_new_model_under_a_known_uuid_is_never_a_stale_hit(stack: _Stack) -> None:
    await stack.encode(_named(), _CAT)
    other = MediaResolver(stack.store, _SECRETS, bytes([8] * 32))

    assert not (await other.resolve(_CONTEXT, _named(digest=_CAT))).is_hit
    with pytest.raises(MediaNotFoundError):
        await other.resolve(_CONTEXT, _named())


@pytest.mark.parametrize("uuid", ["a b", "x" * 513, "../x\0", "é"])
async def test_a_uuid_of_wrong_form_is_refused(stack: _Stack, uuid: str) -> None:
    with pytest.raises(InvalidRequestError, match="RFC 3986"):
        await stack.resolve(_named(uuid, digest=_CAT))


async def test_of_conflicting_binders_exactly_one_wins(stack: _Stack) -> None:
    digests = [source_digest(bytes([index])) for index in range(50)]

    async def bind(digest: bytes) -> bool:
        try:
            return await stack.resolver.bind(_CONTEXT, _named(), digest)
        except ConflictError:
            return False

    results = await asyncio.gather(*map(bind, digests * 2))

    winners = {digest for digest, won in zip(digests * 2, results, strict=True) if won}
    assert len(winners) == 1
    assert sum(results) == 2


async def test_binding_without_a_uuid_does_nothing(
    stack: _Stack, redis_server: RedisServer
) -> None:
    assert not await stack.resolver.bind(_CONTEXT, _IMAGE, _CAT)
    assert await redis_server.keys() == []


async def test_redis_never_sees_a_uuid_or_a_url(stack: _Stack, redis_server: RedisServer) -> None:
    await stack.encode(_named("name-of-cat", url=_URL), _CAT)
    contents = [await redis_server.value(key) for key in await redis_server.keys()]
    text = b"".join(contents) + "".join(await redis_server.keys()).encode()
    assert b"name-of-cat" not in text
    assert b"host" not in text


async def test_an_alias_outlives_its_embedding(stack: _Stack, redis_server: RedisServer) -> None:
    await stack.encode(_named(), _CAT)
    (alias,) = [key for key in await redis_server.keys() if ":a:" in key]
    (manifest,) = await redis_server.keys(":m")
    assert await redis_server.admin.pttl(alias) > await redis_server.admin.pttl(manifest)


async def test_a_changed_alias_is_unknown_and_deleted(
    stack: _Stack, redis_server: RedisServer
) -> None:
    await stack.encode(_named(), _CAT)
    (key,) = [key for key in await redis_server.keys() if ":a:" in key]
    envelope = await redis_server.value(key)
    for position, byte in enumerate(envelope):
        await redis_server.admin.set(key, envelope)
        await redis_server.admin.setrange(key, position, bytes([byte ^ 1]))
        with pytest.raises(MediaNotFoundError):
            await stack.resolve(_named())
        assert await redis_server.admin.exists(key) == 0


async def test_an_alias_copied_under_another_name_is_unknown(
    stack: _Stack, redis_server: RedisServer
) -> None:
    await stack.encode(_named("cat"), _CAT)
    (cat,) = [key for key in await redis_server.keys() if ":a:" in key]
    await stack.encode(_named("dog"), _DOG)
    (dog,) = [key for key in await redis_server.keys() if ":a:" in key and key != cat]
    await redis_server.admin.copy(cat, dog, replace=True)

    with pytest.raises(MediaNotFoundError):
        await stack.resolve(_named("dog"))


async def test_after_rotation_old_uuids_still_hit_and_still_conflict(
    stack: _Stack, redis_server: RedisServer
) -> None:
    encoded_id = await stack.encode(_named(), _CAT)
    (old,) = [bytes([1] * 32)]
    rotated = _Stack(redis_server.url, StoreSecrets((bytes([2] * 32), old)))

    resolution = await rotated.resolve(_named())
    assert resolution.is_hit
    assert resolution.embedding_id == encoded_id
    with pytest.raises(ConflictError):
        await rotated.resolve(_named(digest=_DOG))
    with pytest.raises(ConflictError):
        await rotated.resolver.bind(_CONTEXT, _named(), _DOG)
    assert (await rotated.resolve(dataclasses.replace(_IMAGE, source_digest=_CAT))).is_hit
    await rotated.store.close()


async def test_without_the_store_items_with_data_go_on_and_null_media_is_unavailable(
    stack: _Stack, redis_server: RedisServer
) -> None:
    encoded_id = await stack.encode(_named(), _CAT)
    redis_server.freeze()

    started = time.monotonic()
    with_data = await stack.resolve(_named(digest=_CAT))
    with_url = await stack.resolve(_named(url=_URL))
    assert with_data == Resolution(encoded_id, _CAT, None)
    assert with_url == Resolution(None, None, None)
    assert not await stack.resolver.bind(_CONTEXT, _named(), _CAT)
    with pytest.raises(StoreUnavailableError):
        await stack.resolve(_named())
    assert time.monotonic() - started < 10.0
