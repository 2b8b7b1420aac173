"""The encoder as a process computes what the whole model computes."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from chiasm.common.errors import (
    InvalidRequestError,
)
from chiasm.v1 import media_pb2
from tests.fakes.pictures import encode, noise

if TYPE_CHECKING:
    from tests.harness.encoder import EncoderClient


pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="package")]

HIT, MISS, INLINE = (
    media_pb2.CACHE_STATUS_HIT,
    media_pb2.CACHE_STATUS_MISS,
    media_pb2.CACHE_STATUS_INLINE,
)

SIZES = [(1, 1), (1, 3), (3, 1), (13, 14), (1, 200), (97, 131), (300, 20), (640, 480)]
# A picture of 98 x 132 whose shorter edge is resized to 56, before it is cropped.
_LLAVA_PIXELS = 56 * 75
FILES = [("JPEG", "RGB"), ("PNG", "RGBA"), ("WEBP", "RGB"), ("GIF", "P"), ("BMP", "L")]


@torch.inference_mode()
def expected_rows(whole: tuple[Any, Any], data: bytes) -> np.ndarray:
    """Return what the whole model makes of a file, seen upright on a white page."""
    model, processor = whole
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGBA")
    flat = Image.new("RGB", picture.size, (255, 255, 255))
    flat.paste(picture, mask=picture.getchannel("A"))
    inputs = processor(text=[processor.image_token], images=[flat], return_tensors="pt")
    features = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    rows: np.ndarray = torch.cat(list(model.get_image_features(**features).pooler_output)).numpy()
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == len(rows)
    return rows


def assert_near(rows: np.ndarray, expected: np.ndarray) -> None:
    """Check against the largest value: the fused tower sums in another order."""
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("width", "height"), SIZES)
async def test_embeddings_of_odd_sizes_equal_the_whole_model(
    client: EncoderClient, whole: tuple[Any, Any], width: int, height: int
) -> None:
    data = encode(noise(width, height), "PNG")

    answer = await client.encode(data, inline=True)

    assert answer.kinds == ["planned", "chunk", "ready"]
    assert_near(answer.rows(), expected_rows(whole, data))


@pytest.mark.parametrize(("file_format", "mode"), FILES)
async def test_embeddings_of_every_format_equal_the_whole_model(
    client: EncoderClient, whole: tuple[Any, Any], file_format: str, mode: str
) -> None:
    data = encode(noise(61, 47).convert(mode), file_format)

    answer = await client.encode(data, inline=True)

    assert_near(answer.rows(), expected_rows(whole, data))


@pytest.mark.parametrize("orientation", range(1, 9))
async def test_orientations_equal_the_whole_model(
    client: EncoderClient, whole: tuple[Any, Any], orientation: int
) -> None:
    data = encode(noise(61, 30), "JPEG", orientation)

    answer = await client.encode(data, inline=True)

    assert_near(answer.rows(), expected_rows(whole, data))


async def test_the_layout_promises_as_many_rows_as_come(client: EncoderClient) -> None:
    data = encode(noise(97, 131), "PNG")
    info = await client.info()

    answer = await client.encode(data, inline=True)

    assert answer.layout is not None
    (run,) = answer.layout.runs
    assert run.is_embedding
    assert run.token_id == info.placeholders[0].token_id
    assert run.count == len(answer.rows()) == answer.ref.tensors[0].shape[0]
    assert answer.ref.fingerprint == info.fingerprint
    assert answer.layout == (await client.plan(data)).layout


async def test_a_plan_tells_what_the_item_would_cost(client: EncoderClient) -> None:
    plan = await client.plan(encode(noise(98, 132), "PNG"))

    grid = plan.layout.grid
    assert plan.num_pixels == (grid.h * grid.w * 14**2 or _LLAVA_PIXELS)
    assert plan.num_queue_pixels == max(plan.num_pixels, 98 * 132)
    assert plan.num_tokens == sum(run.count for run in plan.layout.runs)


async def test_the_background_of_transparent_pixels_can_be_chosen(
    client: EncoderClient, tenant: str
) -> None:
    clear = encode(Image.new("RGBA", (30, 30), (1, 2, 3, 0)), "PNG")
    black = encode(Image.new("RGB", (30, 30)), "PNG")
    options = media_pb2.ProcessingOptions(background_rgb=0)

    chosen = await client.encode(clear, inline=True, options=options)

    assert np.array_equal(chosen.rows(), (await client.encode(black, inline=True)).rows())
    with pytest.raises(InvalidRequestError, match="background_rgb"):
        await client.encode(clear, options=media_pb2.ProcessingOptions(background_rgb=1 << 24))


async def test_the_encoder_describes_itself(
    client: EncoderClient, request: pytest.FixtureRequest
) -> None:
    info = await client.info()

    takes_videos = "llava" not in request.node.name
    expected = [media_pb2.MODALITY_IMAGE, media_pb2.MODALITY_VIDEO]
    assert list(info.modalities) == expected[: 1 + takes_videos]
    assert len(info.fingerprint) == 32
    assert info.hidden_size == 64
    assert info.dtype == media_pb2.DATA_TYPE_FLOAT32
    assert info.max_pixels == 1_000_000
    assert info.max_source_bytes == 32 << 20
