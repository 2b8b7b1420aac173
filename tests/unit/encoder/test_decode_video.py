"""Videos give exactly the frames that were sampled, and no file harms the encoder."""

from __future__ import annotations

import dataclasses
import functools
import io
import re
import wave
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from chiasm.common.errors import InvalidRequestError, TooLargeError
from chiasm.common.media import Modality
from chiasm.encoder.frame_list import MAGIC, pack_frames
from chiasm.encoder.memory_file import MemoryFile
from chiasm.encoder.wire_video import VideoHeader, VideoTask
from tests.fakes.pictures import encode, noise
from tests.fakes.videos import (
    H264,
    KINDS,
    MPEG4,
    VideoKind,
    jpeg_video,
    moving_square,
    read_video,
    with_bytes_at,
    with_display_matrix,
    write_video,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chiasm.encoder.decode_pool import DecodePool

pytestmark = pytest.mark.asyncio(loop_scope="package")

LIMITS = VideoTask(max_frame_pixels=100_000, max_frames=100, max_duration_s=30.0)


async def probe(decoder: DecodePool, data: bytes, limits: VideoTask = LIMITS) -> VideoHeader:
    source = MemoryFile.of_bytes(data)
    return VideoHeader.unpack(await decoder.probe(Modality.VIDEO, source, limits.pack()))


async def decode(decoder: DecodePool, data: bytes, indices: Sequence[int]) -> np.ndarray:
    """Return the frames at ``indices``. [num_frames, height, width, 3]."""
    header = await probe(decoder, data)
    task = dataclasses.replace(
        LIMITS, width=header.width, height=header.height, frame_indices=tuple(indices)
    )
    shape = (len(indices), header.height, header.width, 3)
    media = await decoder.decode(
        Modality.VIDEO, MemoryFile.of_bytes(data), task.pack(), int(np.prod(shape))
    )
    return np.frombuffer(media.memory, np.uint8).reshape(shape)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
async def test_every_container_and_codec_gives_the_frames_that_were_asked_for(
    decoder: DecodePool, kind: VideoKind
) -> None:
    data = write_video(moving_square(40, 50, 38), kind)
    all_frames = read_video(data)

    header = await probe(decoder, data)

    assert header == VideoHeader(50, 38, 40, 10.0, 4.0)
    for indices in (range(40), [0], [39], [5, 5, 17, 30, 31], [3, 11, 20, 38]):
        assert np.array_equal(await decode(decoder, data, indices), all_frames[list(indices)])


async def test_frames_of_uneven_times_are_numbered_as_they_are_shown(decoder: DecodePool) -> None:
    times = [0, 1, 5, 6, 20, 21, 22, 40, 41, 90]
    data = write_video(moving_square(10, 48, 32), H264, times=times)

    header = await probe(decoder, data)

    assert header.num_frames == 10
    assert header.duration_s >= 9.0
    assert np.array_equal(await decode(decoder, data, [1, 4, 9]), read_video(data)[[1, 4, 9]])


@pytest.mark.parametrize(("degrees", "quarter_turns"), [(90, 1), (180, 2), (-90, 3)])
async def test_turned_videos_stand_upright(
    decoder: DecodePool, degrees: int, quarter_turns: int
) -> None:
    data = write_video(moving_square(4, 64, 32), rotation=degrees)

    frames = await decode(decoder, data, [0, 3])

    assert frames.shape == ((2, 64, 32, 3) if quarter_turns % 2 else (2, 32, 64, 3))
    assert np.array_equal(frames, np.rot90(read_video(data)[[0, 3]], quarter_turns, (1, 2)))


@pytest.mark.parametrize(
    ("matrix", "show"),
    [
        ((-1, 0, 0, 1), lambda frames: frames[:, :, ::-1]),
        ((1, 0, 0, -1), lambda frames: frames[:, ::-1]),
        ((-1, 0, 0, -1), lambda frames: frames[:, ::-1, ::-1]),
        ((0, 1, -1, 0), lambda frames: np.rot90(frames, -1, (1, 2))),
        ((0, 1, 1, 0), lambda frames: frames.swapaxes(1, 2)),
        ((0, -1, -1, 0), lambda frames: frames[:, ::-1, ::-1].swapaxes(1, 2)),
    ],
    ids=["left and right", "top and bottom", "both", "turned", "transposed", "turned transposed"],
)
async def test_mirrored_videos_are_shown_as_in_a_mirror(
    decoder: DecodePool,
    matrix: tuple[int, int, int, int],
    show: Callable[[np.ndarray], np.ndarray],
) -> None:
    data = with_display_matrix(write_video(moving_square(4, 64, 32)), matrix)

    frames = await decode(decoder, data, [0, 3])

    assert np.array_equal(frames, show(read_video(data)[[0, 3]]))


async def test_frames_that_carry_exif_are_shown(decoder: DecodePool) -> None:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.ImageDescription] = "a frame"
    Image.fromarray(moving_square(1, 64, 48)[0]).save(buffer, "JPEG", exif=exif)
    data = jpeg_video([buffer.getvalue()] * 3, 64, 48)

    frames = await decode(decoder, data, [0, 2])

    assert np.array_equal(frames, read_video(data)[[0, 2]])


async def test_a_list_of_pictures_is_a_video_without_a_clock(decoder: DecodePool) -> None:
    pictures = [noise(20, 14, seed=seed) for seed in range(4)]
    data = bytes(pack_frames([encode(picture, "PNG") for picture in pictures]))

    header = await probe(decoder, data)
    frames = await decode(decoder, data, [0, 2, 3])

    assert header == VideoHeader(20, 14, 4, 0.0, 0.0, is_frame_list=True)
    assert np.array_equal(frames, np.stack([np.asarray(pictures[n]) for n in (0, 2, 3)]))


def sound() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(b"\0\0" * 800)
    return buffer.getvalue()


VIDEO = write_video(moving_square(30, 64, 48))
FRAME = encode(noise(20, 14), "PNG")
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty container": (VIDEO[:32], "it is no MP4, QuickTime, WebM"),
    "cut off in the middle": (VIDEO[: len(VIDEO) // 2], "it is no MP4, QuickTime, WebM"),
    "a sound file": (sound(), "it is no MP4, QuickTime, WebM"),
    "sound in mp4": (
        write_video(moving_square(1, 16, 16), MPEG4, sound_only=True),
        "it has no video stream",
    ),
    "a picture": (FRAME, "it is no MP4, QuickTime, WebM"),
    "a playlist": (b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n", "it is no MP4"),
    "a list of files": (b"ffconcat version 1.0\nfile /etc/passwd\n", "it is no MP4"),
    "no frames": (write_video(moving_square(0, 16, 16)), "it "),
    "another container": (
        write_video(moving_square(4, 64, 48), VideoKind("mpeg2video", "mpegts")),
        "it is no MP4",
    ),
    "another codec": (
        write_video(moving_square(4, 64, 48), VideoKind("prores", "mov", "yuv422p10le")),
        "the video codec prores is not accepted; use one of h264, hevc",
    ),
    "no pictures in a list": (MAGIC, "it has no frames"),
    "a list that lies": (MAGIC + (2**40).to_bytes(8, "little") + FRAME, "it is no list of frames"),
    "pictures of two sizes": (
        bytes(pack_frames([FRAME, encode(noise(21, 14), "PNG")])),
        "its frames have different sizes",
    ),
    "a broken picture": (bytes(pack_frames([FRAME, b"junk"])), "cannot identify image file"),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_broken_files_are_refused_without_internals(decoder: DecodePool, name: str) -> None:
    data, message = BROKEN[name]

    with pytest.raises(InvalidRequestError, match=f"^Failed to load video: {message}") as caught:
        await probe(decoder, data)

    assert caught.value.reason == "INVALID_MEDIA"
    assert "0x" not in caught.value.message
    assert "<" not in caught.value.message
    assert (await probe(decoder, VIDEO)).num_frames == 30


async def test_a_damaged_frame_leaves_the_others_as_they_are(decoder: DecodePool) -> None:
    data = write_video(moving_square(6, 64, 48), KINDS["mjpeg in avi"])
    starts = [found.start() for found in re.finditer(b"00dc....\xff\xd8", data, re.DOTALL)]
    broken = with_bytes_at(data, starts[2] + 8, b"\0" * 400)

    frames = await decode(decoder, broken, range(6))

    is_same = [np.array_equal(*pair) for pair in zip(frames, read_video(data), strict=True)]
    assert is_same == [True, True, False, True, True, True]


async def test_a_file_that_changes_after_its_probe_is_refused(decoder: DecodePool) -> None:
    task = dataclasses.replace(LIMITS, width=64, height=48, frame_indices=(30,))

    with pytest.raises(InvalidRequestError, match="the number of frames has changed"):
        await decoder.decode(Modality.VIDEO, MemoryFile.of_bytes(VIDEO), task.pack(), 64 * 48 * 3)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_frame_pixels": 64 * 48 - 1}, "Video frames of 64x48 pixels exceed the maximum of"),
        ({"max_frames": 29}, "Videos may have at most 29 frames."),
        ({"max_duration_s": 2.9}, "A video of 3 seconds exceeds the maximum of 2.9 s."),
    ],
)
async def test_videos_over_a_limit_are_refused_by_their_packets(
    decoder: DecodePool, limits: dict[str, Any], message: str
) -> None:
    with pytest.raises(TooLargeError, match=message):
        await probe(decoder, VIDEO, dataclasses.replace(LIMITS, **limits))


async def test_frames_larger_than_announced_are_refused(decoder: DecodePool) -> None:
    data = write_video(moving_square(6, 64, 48), KINDS["mjpeg in avi"])
    announced = bytes.fromhex("ffc0001108") + (48).to_bytes(2, "big") + (64).to_bytes(2, "big")
    huge = bytes.fromhex("ffc0001108") + (16_000).to_bytes(2, "big") * 2
    assert announced in data

    with pytest.raises((TooLargeError, InvalidRequestError)):
        await probe(decoder, data.replace(announced, huge))

    at = data.index(announced, len(data) // 2)
    with pytest.raises(InvalidRequestError, match="the size of the frames changes"):
        await decode(decoder, with_bytes_at(data, at + 5, b"\0\x20"), range(6))


async def test_many_frames_are_counted_not_believed(decoder: DecodePool) -> None:
    data = write_video(np.zeros((2000, 16, 16, 3), np.uint8), H264, rate=60)

    with pytest.raises(TooLargeError, match="at most 100 frames"):
        await probe(decoder, data)
    header = await probe(
        decoder, data, dataclasses.replace(LIMITS, max_frames=2000, max_duration_s=99)
    )

    assert header.num_frames == 2000


@functools.cache
def short_video(kind: str) -> bytes:
    return write_video(moving_square(12, 48, 32), KINDS[kind])


@pytest.mark.parametrize("seed", range(40))
async def test_random_damage_is_the_files_fault_or_harmless(decoder: DecodePool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(short_video(list(KINDS)[seed % len(KINDS)]))
    for at in rng.integers(0, len(data), 1 + seed % 9):
        data[at] = rng.integers(0, 256)

    try:
        num_frames = len(await decode(decoder, bytes(data), [0, 3, 7]))
    except (InvalidRequestError, TooLargeError):
        num_frames = 3

    assert num_frames == 3
    assert (await probe(decoder, VIDEO)).num_frames == 30


async def test_pictures_and_videos_are_decoded_by_the_same_workers(decoder: DecodePool) -> None:
    assert Image.open(io.BytesIO(FRAME)).size == (20, 14)
    header = await probe(decoder, bytes(pack_frames([FRAME])))
    video = await probe(decoder, VIDEO)

    assert (header.num_frames, video.num_frames) == (1, 30)
