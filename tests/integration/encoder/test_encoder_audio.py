"""The encoder plans clips by their headers, knows them again, and outlives slow and long ones."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pytest
import pytest_asyncio

from chiasm.common.errors import ConflictError, InvalidRequestError, TooLargeError
from chiasm.v1 import encoder_pb2, media_pb2
from tests.fakes import sounds
from tests.fakes.pictures import encode as encode_picture
from tests.fakes.pictures import noise
from tests.fakes.sound_checkpoints import make_qwen2_5_omni
from tests.harness.encoder import EncoderClient, EncoderProcess, make_header

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(120),
]

RATE = 16000
AUDIO = media_pb2.MODALITY_AUDIO
CLIP = sounds.write(sounds.tone(2 * RATE, 2, seed=5), RATE)
HIT, MISS = media_pb2.CACHE_STATUS_HIT, media_pb2.CACHE_STATUS_MISS
FLAGS = ["--max-audio-duration-s", "400"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(
    redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[EncoderClient]:
    model = make_qwen2_5_omni(tmp_path_factory.mktemp("omni"))
    process = EncoderProcess(model, redis_url, tmp_path_factory.mktemp("state"), FLAGS)
    await process.start()
    client = process.client()
    yield client
    await client.close()
    assert await process.stop() == 0


async def test_a_clip_is_planned_then_encoded_and_then_known(client: EncoderClient) -> None:
    first = await client.encode(CLIP, modality=AUDIO)
    again = await client.encode(CLIP, modality=AUDIO)

    assert (first.kinds, again.kinds) == (["planned", "ready"], ["planned", "ready"])
    assert (first.status, again.status) == (MISS, HIT)
    assert first.ref == again.ref
    assert first.layout == again.layout
    assert first.layout is not None
    assert list(first.layout.audio_lengths) == [200]
    assert [run.count for run in first.layout.runs] == [50]
    assert tuple(first.ref.tensors[0].shape) == (50, 64)
    assert first.ready.num_bytes == 50 * 64 * 4


async def test_a_plan_encodes_nothing(client: EncoderClient) -> None:
    clip = sounds.write(sounds.tone(RATE, seed=6), RATE, "FLAC")
    header = make_header("tenant", clip, {"modality": AUDIO})
    before = (await client.info()).num_encoded_items

    async def requests() -> AsyncIterator[encoder_pb2.PlanRequest]:
        yield encoder_pb2.PlanRequest(header=header)
        yield encoder_pb2.PlanRequest(chunk=clip)

    planned = await client.stub.Plan(requests(), timeout=30)

    assert (await client.info()).num_encoded_items == before
    assert planned.layout == (await client.encode(clip, modality=AUDIO)).layout


async def test_the_same_samples_in_another_file_give_the_same_rows(client: EncoderClient) -> None:
    sound = (sounds.tone(RATE, 1, seed=7) * 20_000).astype(np.int16)

    as_wav, as_flac = [
        await client.encode(sounds.write(sound, RATE, kind, "PCM_16"), modality=AUDIO, inline=True)
        for kind in ("WAV", "FLAC")
    ]

    assert as_wav.ref.embedding_id != as_flac.ref.embedding_id
    assert np.array_equal(as_wav.rows(), as_flac.rows())


async def test_a_uuid_names_one_clip_and_not_a_picture(client: EncoderClient) -> None:
    other = sounds.write(sounds.tone(RATE, seed=8), RATE)
    picture = encode_picture(noise(60, 60), "PNG")
    await client.encode(CLIP, modality=AUDIO, uuid="horn")

    named = await client.encode(modality=AUDIO, uuid="horn")
    seen = await client.encode(picture, uuid="horn")

    assert named.status == HIT
    assert seen.ref.modality == media_pb2.MODALITY_IMAGE
    with pytest.raises(ConflictError):
        await client.encode(other, modality=AUDIO, uuid="horn")


async def test_clips_and_pictures_at_once_are_what_they_are_alone(client: EncoderClient) -> None:
    clips = [sounds.write(sounds.tone(n * 3000, seed=n), RATE) for n in range(2, 8)]
    pictures = [encode_picture(noise(30 + n, 80, seed=n), "PNG") for n in range(6)]

    alone = [await client.encode(c, tenant="a", modality=AUDIO, inline=True) for c in clips]
    together = await asyncio.gather(
        *(client.encode(c, tenant="b", modality=AUDIO, inline=True) for c in clips),
        *(client.encode(p, tenant="b") for p in pictures),
    )

    for one, other in zip(alone, together, strict=False):
        np.testing.assert_allclose(one.rows(), other.rows(), rtol=0, atol=1e-5)


async def test_clips_over_the_bound_are_refused_by_what_they_announce(
    client: EncoderClient,
) -> None:
    long = sounds.silence(401, 1, 8000, "FLAC", "PCM_16")

    with pytest.raises(TooLargeError, match=r"Audio exceeds maximum allowed duration of 400s\.$"):
        await client.encode(long, modality=AUDIO)


async def test_a_container_over_the_bound_is_refused_and_others_go_on(
    client: EncoderClient,
) -> None:
    long = sounds.mux(np.zeros((401 * 8000, 1), np.float32), 8000, "matroska", "flac")

    refused, fine = await asyncio.gather(
        client.encode(long, modality=AUDIO),
        client.encode(CLIP, modality=AUDIO),
        return_exceptions=True,
    )

    assert isinstance(refused, TooLargeError)
    assert refused.message == "Audio exceeds maximum allowed duration of 400s."
    assert not isinstance(fine, BaseException)


async def test_what_is_no_sound_is_refused(client: EncoderClient) -> None:
    with pytest.raises(InvalidRequestError, match="its format is not one of WAV, FLAC"):
        await client.encode(encode_picture(noise(9, 9), "PNG"), modality=AUDIO)
    with pytest.raises(InvalidRequestError, match="cannot identify image file"):
        await client.encode(CLIP)
