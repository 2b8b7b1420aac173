"""The encoder plans videos by their containers, bounds them, and outlives whatever they hold."""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import pytest_asyncio

from chiasm.common.errors import InvalidRequestError, TooLargeError
from chiasm.v1 import media_pb2
from tests.fakes.checkpoints import make_qwen2_vl
from tests.fakes.pictures import encode as encode_picture
from tests.fakes.pictures import noise
from tests.fakes.videos import KINDS, MPEG4, VideoKind, moving_square, still_video, write_video
from tests.harness.encoder import Answer, EncoderClient, EncoderProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(120),
]

VIDEO = write_video(moving_square(20, 64, 48))
FLAGS = ["--video-decode-cpu-s", "1", "--max-video-source-frames", "20000"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(
    redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[EncoderClient]:
    model = make_qwen2_vl(tmp_path_factory.mktemp("qwen2_vl"))
    process = EncoderProcess(model, redis_url, tmp_path_factory.mktemp("state"), FLAGS)
    await process.start()
    client = process.client()
    yield client
    await client.close()
    assert await process.stop() == 0


async def encode_video(client: EncoderClient, data: bytes, **options: Any) -> Answer:
    """Encode a video for a tenant of its own and return the answer with the embedding."""
    return await client.encode(
        data,
        inline=True,
        modality=media_pb2.MODALITY_VIDEO,
        options=media_pb2.ProcessingOptions(**options),
    )


async def test_a_video_is_planned_then_encoded_and_then_known(client: EncoderClient) -> None:
    stored = await client.encode(VIDEO, modality=media_pb2.MODALITY_VIDEO)
    again = await client.encode(VIDEO, modality=media_pb2.MODALITY_VIDEO)
    other = await client.encode(
        VIDEO,
        modality=media_pb2.MODALITY_VIDEO,
        options=media_pb2.ProcessingOptions(num_frames=4),
    )

    assert stored.kinds == ["planned", "ready"]
    assert stored.layout is not None
    assert other.layout is not None
    grid = stored.layout.grid
    assert (grid.t, other.layout.grid.t) == (10, 2)
    assert sum(run.count for run in stored.layout.runs) == grid.t * grid.h * grid.w // 4
    assert list(stored.layout.timestamps_s) == pytest.approx([n / 5 for n in range(10)])
    assert again.status == media_pb2.CACHE_STATUS_HIT
    assert again.ref == stored.ref
    assert other.ref.embedding_id != stored.ref.embedding_id


async def test_the_description_names_videos_and_their_placeholder(client: EncoderClient) -> None:
    info = await client.info()

    assert media_pb2.MODALITY_VIDEO in info.modalities
    assert len({placeholder.token_id for placeholder in info.placeholders}) == 2


async def test_the_longest_clip_costs_no_more_than_its_sampled_frames(
    client: EncoderClient,
) -> None:
    longest = still_video(20_000, 16)
    too_long = still_video(20_001, 16)
    started = time.monotonic()

    answer = await encode_video(client, longest)

    assert answer.layout is not None
    assert answer.layout.grid.t == 16
    assert time.monotonic() - started < 20
    with pytest.raises(TooLargeError, match="Videos may have at most 20000 frames"):
        await encode_video(client, too_long)


async def test_a_video_that_takes_too_long_to_decode_is_the_callers_fault(
    client: EncoderClient,
) -> None:
    before = (await encode_video(client, VIDEO)).rows()
    heavy = still_video(12_000, 1920)

    heavy_call = asyncio.create_task(encode_video(client, heavy, num_frames=4))
    neighbours = [encode_video(client, VIDEO), client.encode(encode_picture(noise(9, 9), "PNG"))]
    neighbour, picture = await asyncio.gather(*neighbours)

    with pytest.raises(InvalidRequestError, match=r"^Failed to load video: .*too long"):
        await heavy_call
    assert np.array_equal(neighbour.rows(), before)
    assert picture.kinds[-1] == "ready"
    assert np.array_equal((await encode_video(client, VIDEO)).rows(), before)


BROKEN = {
    "cut off": VIDEO[: len(VIDEO) // 2],
    "sound alone": write_video(moving_square(1, 16, 16), MPEG4, sound_only=True),
    "no frames": write_video(moving_square(0, 16, 16)),
    "a picture": encode_picture(noise(9, 9), "PNG"),
    "another codec": write_video(
        moving_square(4, 64, 48), VideoKind("prores", "mov", "yuv422p10le")
    ),
    "a playlist": b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:1/x\n",
    "too thin": write_video(moving_square(4, 500, 2)),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_files_that_cannot_be_used_are_refused_and_the_neighbour_is_right(
    client: EncoderClient, name: str
) -> None:
    before = (await encode_video(client, VIDEO)).rows()

    broken, good = await asyncio.gather(
        encode_video(client, BROKEN[name]), encode_video(client, VIDEO), return_exceptions=True
    )

    assert isinstance(broken, InvalidRequestError)
    assert broken.reason == "INVALID_MEDIA"
    assert broken.message.startswith("Failed to load video: ")
    assert isinstance(good, Answer)
    assert np.array_equal(good.rows(), before)


@pytest.mark.parametrize(
    "options", [{"fps": math.nan}, {"fps": -1.0}, {"num_frames": 0}, {"fps": 1.0, "num_frames": 2}]
)
async def test_wishes_without_sense_are_refused(
    client: EncoderClient, options: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await encode_video(client, VIDEO, **options)

    assert caught.value.param in ("options.fps", "options.num_frames")


async def test_wishes_beyond_the_limits_are_clamped(client: EncoderClient) -> None:
    all_frames = await encode_video(client, VIDEO, num_frames=2**32 - 1)
    fastest = await encode_video(client, VIDEO, fps=1e300)

    assert all_frames.layout is not None
    assert fastest.layout is not None
    assert all_frames.layout.grid.t == fastest.layout.grid.t == 10


async def test_codecs_and_containers_give_embeddings(client: EncoderClient) -> None:
    frames = moving_square(8, 64, 48)
    for kind in KINDS.values():
        rows = (await encode_video(client, write_video(frames, kind))).rows()

        assert np.isfinite(rows).all()
