"""What was encoded once is found again, by whoever may find it, and only by them."""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from chiasm.common.errors import (
    ConflictError,
    MediaFetchError,
    MediaNotFoundError,
    StoreUnavailableError,
)
from chiasm.common.identity import source_digest
from chiasm.common.tenant_share import KEY_BYTES
from chiasm.v1 import encoder_pb2, media_pb2
from tests.fakes.checkpoints import make_qwen2_vl
from tests.fakes.media_server import MediaServer, respond
from tests.fakes.pictures import encode, noise
from tests.harness.encoder import EncoderClient, EncoderProcess, make_context

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fakes.redis_server import RedisServer

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="package")]

HIT, MISS, INLINE = (
    media_pb2.CACHE_STATUS_HIT,
    media_pb2.CACHE_STATUS_MISS,
    media_pb2.CACHE_STATUS_INLINE,
)


async def test_the_second_call_is_a_hit_and_encodes_nothing(
    client: EncoderClient, tenant: str
) -> None:
    data = encode(noise(50, 40), "PNG")
    before = (await client.info()).num_encoded_items

    first = await client.encode(data, tenant=tenant)
    second = await client.encode(data, tenant=tenant)

    assert (first.planned_status, first.status) == (MISS, MISS)
    assert (second.planned_status, second.status) == (HIT, HIT)
    assert second.ref == first.ref
    assert second.layout == first.layout
    assert first.ready.num_bytes == second.ready.num_bytes > 0
    assert first.ready.timings.encode_s > 0
    assert (await client.info()).num_encoded_items == before + 1


async def test_tenants_do_not_share_and_salts_part_a_tenant(
    client: EncoderClient, tenant: str
) -> None:
    data = encode(noise(50, 40), "PNG")
    first = await client.encode(data, tenant=tenant)

    other = await client.encode(data, tenant=tenant[::-1])
    salted = await client.encode(
        data, tenant=tenant, context=media_pb2.RequestContext(cache_salt="salt")
    )

    assert other.status == salted.status == MISS
    assert len({a.ref.embedding_id for a in (first, other, salted)}) == 3


async def test_many_calls_for_one_picture_encode_it_once(
    client: EncoderClient, tenant: str
) -> None:
    data = encode(noise(300, 200), "PNG")
    before = (await client.info()).num_encoded_items

    answers = await asyncio.gather(*(client.encode(data, tenant=tenant) for _ in range(20)))

    assert (await client.info()).num_encoded_items == before + 1
    assert {bytes(answer.ref.embedding_id) for answer in answers} == {answers[0].ref.embedding_id}
    assert all(answer.status in (MISS, HIT) for answer in answers)


async def test_a_uuid_stands_for_its_picture_from_then_on(
    client: EncoderClient, tenant: str
) -> None:
    data = encode(noise(50, 40), "PNG")
    first = await client.encode(data, tenant=tenant, uuid="cat")

    named = await client.encode(tenant=tenant, uuid="cat")

    assert named.kinds == ["planned", "ready"]
    assert named.status == HIT
    assert named.ref == first.ref
    with pytest.raises(ConflictError) as conflict:
        await client.encode(encode(noise(51, 40), "PNG"), tenant=tenant, uuid="cat")
    assert conflict.value.reason == "UUID_CONFLICT"
    with pytest.raises(MediaNotFoundError, match="Cache miss for image at index 0 but data is not"):
        await client.encode(tenant=tenant[::-1], uuid="cat")


async def test_options_make_another_embedding(client: EncoderClient, tenant: str) -> None:
    data = encode(noise(200, 200), "PNG")
    plain = await client.encode(data, tenant=tenant, uuid="u")
    options = media_pb2.ProcessingOptions(max_pixels=3136)

    small = await client.encode(data, tenant=tenant, uuid="u", options=options)
    again = await client.encode(tenant=tenant, uuid="u", options=options)

    assert small.status == MISS
    assert again.status == HIT
    assert again.ref == small.ref != plain.ref
    assert small.ref.tensors[0].shape[0] <= plain.ref.tensors[0].shape[0]


async def test_data_urls_and_bytes_are_the_same_picture(client: EncoderClient, tenant: str) -> None:
    data = encode(noise(50, 40), "PNG")
    url = "data:image/png;base64," + base64.b64encode(data).decode()

    first = await client.encode(data, tenant=tenant)
    second = await client.encode(url=url, tenant=tenant)

    assert second.status == HIT
    assert second.ref == first.ref


async def test_a_known_uuid_and_url_are_not_fetched_again(
    client: EncoderClient, tenant: str
) -> None:
    server = MediaServer({"/a.png": respond("200 OK", encode(noise(50, 40), "PNG"))})
    server.add("/b.png", respond("200 OK", encode(noise(51, 40), "PNG")))
    await server.start("127.0.0.1")
    url = f"http://127.0.0.1:{server.port}/a.png"
    try:
        first = await client.encode(url=url, tenant=tenant, uuid="u")
        again = await client.encode(url=url, tenant=tenant, uuid="u")
        assert (first.status, again.status) == (MISS, HIT)
        assert first.ready.timings.fetch_s > 0
        assert server.num_connections == 1

        with pytest.raises(ConflictError):
            await client.encode(url=url.replace("a.png", "b.png"), tenant=tenant, uuid="u")
        with pytest.raises(MediaFetchError, match="HTTP 404 error"):
            await client.encode(url=url.replace("a.png", "c.png"), tenant=tenant)
    finally:
        await server.stop()


async def test_stored_items_are_looked_up_and_deleted(client: EncoderClient, tenant: str) -> None:
    data = encode(noise(50, 40), "PNG")
    first = await client.encode(data, tenant=tenant, uuid="u")
    names: list[dict[str, Any]] = [{"uuid": "u"}, {"source_digest": source_digest(data)}]
    fields = {"context": make_context(tenant), "modality": media_pb2.MODALITY_IMAGE}

    for name in names:
        found = await client.stub.Lookup(
            encoder_pb2.LookupRequest(**fields, **name),  # type: ignore[arg-type]
            timeout=5,
        )
        assert found.ref == first.ref
    deletes = [
        await client.stub.Delete(
            encoder_pb2.DeleteRequest(**fields, **name),  # type: ignore[arg-type]
            timeout=5,
        )
        for name in (*names, names[0])
    ]

    assert [answer.deleted for answer in deletes] == [True, False, False]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.stub.Lookup(
            encoder_pb2.LookupRequest(**fields, **names[1]),  # type: ignore[arg-type]
            timeout=5,
        )
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert (await client.encode(data, tenant=tenant)).status == MISS


@pytest.mark.asyncio(loop_scope="function")
async def test_without_redis_embeddings_travel_inline(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    model = make_qwen2_vl(tmp_path / "model")
    process = EncoderProcess(model, redis_server.url, tmp_path, [])
    await process.start()
    client = process.client()
    data = encode(noise(50, 40), "PNG")
    try:
        stored = await client.encode(data, uuid="u")
        await redis_server.stop()

        inline = await client.encode(data)
        with pytest.raises(StoreUnavailableError):
            await client.encode(uuid="u")
    finally:
        await client.close()
        await process.stop()

    assert stored.status == MISS
    assert inline.kinds == ["planned", "chunk", "ready"]
    assert inline.status == INLINE
    assert inline.rows().shape == tuple(stored.ref.tensors[0].shape)


@pytest.mark.asyncio(loop_scope="function")
@pytest.mark.parametrize("flags", [[], ["--store-tenant-bytes", str(16 << 20)]], ids=str)
async def test_encoder_counts_what_a_tenant_writes_where_it_has_a_share(
    redis_server: RedisServer, tmp_path: Path, flags: list[str]
) -> None:
    model = make_qwen2_vl(tmp_path / "model")
    process = EncoderProcess(model, redis_server.url, tmp_path, flags)
    await process.start()
    client = process.client()
    try:
        answers = [await client.encode(encode(noise(side, 40), "PNG")) for side in (50, 90, 50)]
    finally:
        await client.close()
        await process.stop()

    assert [answer.status for answer in answers] == [MISS, MISS, HIT]
    counters = await redis_server.keys(":n")
    assert len(counters) == (1 if flags else 0)
    for counter in counters:
        charged = int(await redis_server.value(counter))
        num_bytes = sum(answer.ready.num_bytes for answer in answers[:2])
        assert charged == num_bytes + 2 * 2 * KEY_BYTES
