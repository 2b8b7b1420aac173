"""Workers decode into memory that was used before, and nobody sees what was there."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from chiasm.common.errors import InvalidRequestError
from chiasm.common.media import Modality
from chiasm.encoder.decode_pool import DecodeLimits, DecodePool
from chiasm.encoder.memory_file import MemoryFile
from chiasm.encoder.wire_image import PIXEL_BYTES, ImageTask
from tests.fakes.pictures import encode, noise

if TYPE_CHECKING:
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
