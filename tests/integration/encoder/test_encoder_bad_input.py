"""Whatever is wrong with an item, its caller learns it and nobody else notices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import pytest
from PIL import Image

from chiasm.common.errors import (
    InvalidRequestError,
    MediaNotFoundError,
    TooLargeError,
)
from chiasm.v1 import encoder_pb2, encoder_pb2_grpc, media_pb2
from tests.fakes.pictures import encode, noise, png_header
from tests.harness.encoder import EncoderClient, EncoderProcess

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="package")]

HIT, MISS, INLINE = (
    media_pb2.CACHE_STATUS_HIT,
    media_pb2.CACHE_STATUS_MISS,
    media_pb2.CACHE_STATUS_INLINE,
)

_NAMES = {
    media_pb2.MODALITY_IMAGE: "image",
    media_pb2.MODALITY_VIDEO: "video",
    media_pb2.MODALITY_AUDIO: "audio",
}


async def test_null_media_needs_a_known_uuid(client: EncoderClient, tenant: str) -> None:
    with pytest.raises(InvalidRequestError, match="is missing"):
        await client.encode(tenant=tenant)
    with pytest.raises(MediaNotFoundError):
        await client.encode(tenant=tenant, uuid="unknown")


async def test_a_broken_picture_binds_no_uuid(client: EncoderClient, tenant: str) -> None:
    with pytest.raises(InvalidRequestError):
        await client.encode(b"junk", tenant=tenant, uuid="dog")

    answer = await client.encode(encode(noise(9, 9), "PNG"), tenant=tenant, uuid="dog")

    assert answer.status == MISS


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.2:9/x.png", "MEDIA_URL_FORBIDDEN"),
        ("http://localhost@127.0.0.1/", "INVALID_MEDIA_URL"),
        ("file:///etc/passwd", "INVALID_MEDIA_URL"),
        ("/etc/passwd", "INVALID_MEDIA_URL"),
        ("ftp://example.com/x", "INVALID_MEDIA_URL"),
        ("data:image/png,abc", "INVALID_MEDIA_URL"),
        ("data:image/png;base64", "INVALID_MEDIA_URL"),
        ("data:image/png;base64,$$$", "INVALID_MEDIA_URL"),
    ],
)
async def test_bad_urls_are_the_clients_to_fix(
    client: EncoderClient, url: str, reason: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await client.encode(url=url)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "Failed to load image: it is empty"),
        (b"not a picture", "Failed to load image: cannot identify image file"),
        (encode(noise(64, 64), "PNG")[:3000], "Failed to load image: "),
        (encode(Image.new("RGB", (1, 201)), "PNG"), "Failed to load image: the aspect ratio"),
    ],
)
async def test_bad_pictures_are_the_clients_to_fix(
    client: EncoderClient, data: bytes, message: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await client.encode(data)

    assert caught.value.message.startswith(message)
    assert caught.value.reason == "INVALID_MEDIA"
    assert "0x" not in caught.value.message
    assert (await client.encode(encode(noise(5, 5), "PNG"))).kinds[-1] == "ready"


async def test_pictures_with_too_many_pixels_are_refused_by_their_header(
    client: EncoderClient,
) -> None:
    fits = await client.plan(encode(Image.new("RGB", (1000, 1000)), "PNG"))

    assert fits.num_tokens > 0
    with pytest.raises(TooLargeError, match=r"Image dimensions 1001x1000 \(1001000 pixels\)"):
        await client.encode(png_header(1001, 1000))


async def test_modalities_that_the_model_does_not_take_are_refused(client: EncoderClient) -> None:
    taken = set((await client.info()).modalities)
    for modality, name in _NAMES.items():
        if modality in taken:
            continue
        with pytest.raises(InvalidRequestError) as caught:
            await client.encode(b"x", modality=modality)
        assert caught.value.message == f"At most 0 {name}(s) may be provided in one prompt."
    assert media_pb2.MODALITY_AUDIO not in taken


@pytest.mark.parametrize("sent", [0, 9, 11])
async def test_announced_bytes_must_come(client: EncoderClient, sent: int) -> None:
    source = encoder_pb2.BytesSource(num_bytes=10)

    with pytest.raises(InvalidRequestError, match="10 bytes were announced"):
        await client.encode(b"x" * sent, bytes=source)


async def test_sources_over_the_limit_are_refused_before_they_are_read(
    client: EncoderClient,
) -> None:
    with pytest.raises(TooLargeError, match="33554433 bytes of media"):
        await client.encode(b"", bytes=encoder_pb2.BytesSource(num_bytes=(32 << 20) + 1))


async def test_callers_without_the_service_token_are_refused(process: EncoderProcess) -> None:
    async with grpc.aio.insecure_channel(process.address) as channel:
        stub: Any = encoder_pb2_grpc.EncoderServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetEncoderInfo(encoder_pb2.GetEncoderInfoRequest(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.asyncio(loop_scope="function")
@pytest.mark.parametrize("content", ['{"model_type": "bert"}', "{}"])
async def test_a_model_that_is_not_served_stops_the_start_with_one_sentence(
    redis_url: str, tmp_path: Path, content: str
) -> None:
    (tmp_path / "config.json").write_text(content)
    process = EncoderProcess(tmp_path, redis_url, tmp_path, [])

    with pytest.raises(RuntimeError, match="are not supported; supported types: qwen2_vl"):
        await process.start()

    assert await process.stop() == 1
    assert not [line for line in process.lines if "Traceback" in line]


async def test_an_early_refusal_reaches_a_caller_that_is_still_sending(
    client: EncoderClient,
) -> None:
    data = bytes(8 << 20)

    async def refused() -> str:
        with pytest.raises(InvalidRequestError) as caught:
            await client.encode(data, modality=media_pb2.MODALITY_AUDIO)
        return caught.value.reason

    assert [await refused() for _ in range(5)] == ["UNSUPPORTED_MODALITY"] * 5
