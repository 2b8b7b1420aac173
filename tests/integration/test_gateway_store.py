"""Media that are in the store need no encoder; without the store nothing else is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from chiasm.common.identity import source_digest
from chiasm.common.media import Embedding, EmbeddingRef, Modality, ProcessingOptions, RequestContext
from chiasm.common.media_resolver import MediaQuery, MediaResolver
from chiasm.common.secrets import StoreSecrets
from tests.fakes.embeddings import patient_store
from tests.fakes.generator_service import Script
from tests.harness.gateway import image_part, run_gateway

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.harness.gateway import Gateway

pytestmark = pytest.mark.integration

CONTEXT = RequestContext("id", "id", "default")
NULL_IMAGE = {"type": "image_url", "image_url": None, "uuid": "cat"}


@pytest_asyncio.fixture
async def gateway(tmp_path: Path, redis_url: str) -> AsyncIterator[Gateway]:
    async with run_gateway(tmp_path, ["--redis-url", redis_url]) as running:
        running.say("fine")
        yield running


async def store_image(
    gateway: Gateway, path: Path, redis_url: str, data: bytes, uuid: str = ""
) -> EmbeddingRef:
    """Put the embedding of an image into the store, as an encoder would."""
    secrets = StoreSecrets.load(path / "store_secret")
    store = patient_store(redis_url, secrets)
    resolver = MediaResolver(store, secrets, gateway.encoder.fingerprint)
    digest = source_digest(data)
    query = MediaQuery(Modality.IMAGE, ProcessingOptions(), uuid=uuid, source_digest=digest)
    embedding_id = resolver.embedding_id(CONTEXT, query, digest)
    tensors = gateway.encoder.ref(data).tensors
    ref = EmbeddingRef(embedding_id, gateway.encoder.fingerprint, Modality.IMAGE, tensors)
    buffers = [memoryview(bytes(spec.num_bytes)) for spec in tensors]
    await store.put("default", Embedding(ref, buffers), gateway.encoder.layout())
    await resolver.bind(CONTEXT, query, digest)
    await store.close()
    return ref


async def test_known_content_needs_no_encoder(
    gateway: Gateway, tmp_path: Path, redis_url: str
) -> None:
    ref = await store_image(gateway, tmp_path, redis_url, b"cat")

    assert (await gateway.ask([image_part(b"cat")])).status == 200

    assert gateway.encoder.headers == []
    (span,) = gateway.generator.starts[0].spans
    assert span.is_ready
    assert span.ref.embedding_id == ref.embedding_id


async def test_a_known_uuid_needs_no_data_and_no_encoder(
    gateway: Gateway, tmp_path: Path, redis_url: str
) -> None:
    await store_image(gateway, tmp_path, redis_url, b"cat", uuid="cat")
    await gateway.encoder_server.stop(0)

    assert (await gateway.ask([NULL_IMAGE, "again?"])).status == 200


async def test_an_unknown_uuid_without_data_is_a_miss(gateway: Gateway) -> None:
    reply = await gateway.ask([NULL_IMAGE])

    assert reply.status == 400
    assert reply.error == {
        "message": "Cache miss for image at index 0 but data is not provided.",
        "type": "BadRequestError",
        "param": "messages[0].content[0]",
        "code": "media_not_found",
    }


async def test_a_uuid_of_other_content_is_a_conflict(
    gateway: Gateway, tmp_path: Path, redis_url: str
) -> None:
    await store_image(gateway, tmp_path, redis_url, b"cat", uuid="cat")

    reply = await gateway.ask([image_part(b"x"), image_part(b"dog", uuid="cat")])

    assert reply.status == 409
    assert reply.error["param"] == "messages[0].content[1]"
    assert reply.headers["x-should-retry"] == "false"


async def test_a_hit_that_is_evicted_is_encoded_from_its_data(
    gateway: Gateway, tmp_path: Path, redis_url: str
) -> None:
    ref = await store_image(gateway, tmp_path, redis_url, b"cat")
    gateway.generator.scripts.append(Script(deltas=[[65]], needs=(ref.embedding_id,)))
    gateway.encoder.id_of[b"cat"] = ref.embedding_id

    assert (await gateway.ask([image_part(b"cat")])).status == 200

    assert gateway.encoder.sources == [b"cat"]
    assert gateway.generator.chunk_ids == [ref.embedding_id]


async def test_a_uuid_that_is_evicted_is_a_miss(
    gateway: Gateway, tmp_path: Path, redis_url: str
) -> None:
    ref = await store_image(gateway, tmp_path, redis_url, b"cat", uuid="cat")
    gateway.generator.scripts.append(Script(deltas=[[65]], needs=(ref.embedding_id,)))

    reply = await gateway.ask(["see", NULL_IMAGE])

    assert reply.status == 400
    assert reply.error["code"] == "media_not_found"
    assert reply.error["param"] == "messages[0].content[1]"


async def test_without_the_store_data_is_encoded_and_a_uuid_alone_is_unavailable(
    tmp_path: Path,
) -> None:
    async with run_gateway(tmp_path, ["--redis-url", f"unix://{tmp_path}/none"]) as gateway:
        gateway.say("fine")
        gateway.encoder.is_inline = True

        assert (await gateway.ask([image_part(b"cat")])).status == 200
        assert (await gateway.ask([image_part(b"cat", uuid="cat")])).status == 200
        reply = await gateway.ask([NULL_IMAGE])

    assert reply.status == 503
    assert reply.error["code"] == "store_unavailable"
