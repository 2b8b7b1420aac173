"""Workers decode into memory that was used before, and nobody sees what was there."""

from __future__ import annotations

import asyncio
import io
import os
import random
import signal
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from chiasm.common.errors import InvalidRequestError
from chiasm.common.media import Modality
from chiasm.encoder.decode_pool import DecodeLimits, DecodePool
from chiasm.encoder.memory_file import MemoryFile
from chiasm.encoder.wire_image import NUM_CHANNELS, PIXEL_BYTES, ImageTask
from tests.fakes.pictures import encode, noise

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chiasm.encoder.media_buffers import DecodedMedia

pytestmark = pytest.mark.asyncio(loop_scope="package")

WHITE = 0xFFFFFF
MAX_PIXELS = 1_000_000


def one_worker() -> DecodePool:
    """Return a pool of one worker, started."""
    pool = DecodePool(1, DecodeLimits(1 << 30, 10, 30.0, niceness=0))
    pool.start()
    return pool


async def start_decoding(pool: DecodePool, data: bytes, width: int, height: int) -> DecodedMedia:
    """Return the media of a picture of that size, to be freed."""
    task = ImageTask(MAX_PIXELS, width, height, WHITE).pack()
    num_bytes = width * height * PIXEL_BYTES
    return await pool.decode(Modality.IMAGE, MemoryFile.of_bytes(data), task, num_bytes)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
async def test_used_memory_shows_nothing_of_the_picture_before(
    file_format: str, orientation: int
) -> None:
    pool = one_worker()
    width, height = (64, 48) if orientation == 1 else (48, 64)
    try:
        first = await start_decoding(pool, encode(noise(64, 48), "PNG"), 64, 48)
        first.memory[:] = bytes([77]) * first.memory.nbytes
        first.free()
        (process,) = pool._processes
        black = encode(Image.new("RGB", (64, 48)), file_format, orientation)

        second = await start_decoding(pool, black, width, height)

        assert not process.buffers._kept
        assert 77 not in bytes(second.memory)
    finally:
        pool.stop()


def _broken_jpegs() -> Iterator[bytes]:
    """Yield JPEGs that end early, say two sizes, or have bytes changed at random."""
    choices = random.Random(3)
    plain, progressive = (_encode_jpeg(is_progressive=is_it) for is_it in (False, True))
    scan, second_scan = plain.index(b"\xff\xda"), progressive.index(b"\xff\xda") + 2
    yield plain[:scan] + plain[scan : scan + 14] + b"\xff\xd9"
    yield plain[: scan + 200] + b"\xff\xd9"
    yield progressive[: progressive.index(b"\xff\xda", second_scan)] + b"\xff\xd9"
    frame = plain.index(b"\xff\xc0")
    yield plain[: frame + 5] + b"\0\x08\0\x10" + plain[frame + 9 :]
    yield plain[: frame + 5] + b"\0\0" + plain[frame + 7 :]
    for _ in range(150):
        broken = bytearray(choices.choice((plain, progressive)))
        for _ in range(choices.randint(1, 6)):
            broken[choices.randrange(2, len(broken))] = choices.choice((0, 0xC0, 0xD9, 0xDA, 0xFF))
        yield bytes(broken)


def _encode_jpeg(*, is_progressive: bool) -> bytes:
    buffer = io.BytesIO()
    noise(64, 48).save(buffer, "JPEG", progressive=is_progressive)
    return buffer.getvalue()


async def test_used_memory_shows_nothing_of_the_picture_before_in_a_broken_one() -> None:
    pool, mark = one_worker(), 0xEE
    num_decoded = num_refused = 0
    try:
        for broken in _broken_jpegs():
            used = await start_decoding(pool, encode(noise(64, 48), "PNG"), 64, 48)
            used.memory[:] = bytes([mark]) * used.memory.nbytes
            used.free()
            try:
                media = await start_decoding(pool, broken, 64, 48)
            except InvalidRequestError:
                num_refused += 1
                continue
            num_decoded += 1
            pixels = np.frombuffer(media.memory, np.uint8).reshape(-1, PIXEL_BYTES)
            is_marked = (pixels[:, :NUM_CHANNELS] == mark).all(axis=1)
            # One may have this colour by chance, a row of the picture not.
            assert is_marked.sum() < 4
            del pixels, is_marked
            media.free()
    finally:
        pool.stop()

    assert min(num_decoded, num_refused) > 10


async def test_a_picture_that_is_still_read_keeps_its_memory_while_others_are_decoded() -> None:
    pool = one_worker()
    try:
        first = await start_decoding(pool, encode(noise(64, 48), "PNG"), 64, 48)
        before = bytes(first.memory)

        second = await start_decoding(pool, encode(Image.new("RGB", (64, 48)), "PNG"), 64, 48)

        assert bytes(first.memory) == before
        assert bytes(second.memory) != before
    finally:
        pool.stop()


@pytest.mark.parametrize("is_cut", [True, False], ids=["cut", "no picture"])
async def test_a_refused_picture_gives_its_memory_back(*, is_cut: bool) -> None:
    pool = one_worker()
    data = encode(noise(64, 48), "JPEG")
    try:
        with pytest.raises(InvalidRequestError):
            await start_decoding(pool, data[: len(data) // 2] if is_cut else b"x", 64, 48)

        (process,) = pool._processes
        assert len(process.buffers._kept) == 1
    finally:
        pool.stop()


async def test_a_worker_that_follows_another_gets_none_of_its_memory() -> None:
    pool = one_worker()
    data = encode(noise(64, 48), "PNG")
    try:
        (await start_decoding(pool, data, 64, 48)).free()
        (process,) = pool._processes
        kept = list(process.buffers._kept)
        os.kill(process.pid, signal.SIGKILL)
        await asyncio.to_thread(os.waitid, os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

        (await start_decoding(pool, data, 64, 48)).free()

        (follower,) = pool._processes
        assert follower is not process
        assert len(follower.buffers._kept) == 1
        assert kept[0] not in follower.buffers._kept
    finally:
        pool.stop()
