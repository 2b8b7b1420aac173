"""Pictures are decoded as people see them, and no file harms the encoder."""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from chiasm.common.errors import InvalidRequestError, OverloadedError, TooLargeError
from chiasm.common.media import Modality
from chiasm.encoder.decode_pool import DecodeLimits, DecodePool, make_safe
from chiasm.encoder.memory_file import MemoryFile
from chiasm.encoder.wire_image import MAX_SIDE, NUM_CHANNELS, PIXEL_BYTES, ImageHeader, ImageTask
from tests.fakes.pictures import (
    ORIENTATION_TAG,
    encode,
    noise,
    png_header,
    png_with_late_exif,
)

pytestmark = pytest.mark.asyncio(loop_scope="package")

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]
WHITE = 0xFFFFFF
MAX_PIXELS = 1_000_000


async def probe(
    decoder: DecodePool, source: MemoryFile, max_pixels: int = MAX_PIXELS
) -> ImageHeader:
    """Return the header of a file."""
    task = ImageTask(max_pixels)
    return ImageHeader.unpack(await decoder.probe(Modality.IMAGE, source, task.pack()))


async def decode(
    decoder: DecodePool, data: bytes, background_rgb: int = WHITE, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Return the pixels of a file. [height, width, 3]."""
    source = MemoryFile.of_bytes(data)
    header = await probe(decoder, source, max_pixels)
    task = ImageTask(max_pixels, header.width, header.height, background_rgb)
    num_bytes = header.num_pixels * PIXEL_BYTES
    media = await decoder.decode(Modality.IMAGE, source, task.pack(), num_bytes)
    pixels = np.frombuffer(media.memory, np.uint8).reshape(header.height, header.width, PIXEL_BYTES)
    colours = pixels[:, :, :NUM_CHANNELS].copy()
    del pixels
    media.free()
    return colours


def on_white(image: Image.Image) -> np.ndarray:
    """Return the pixels a person sees on a white page."""
    picture = image.convert("RGBA")
    flat = Image.new("RGB", picture.size, (255, 255, 255))
    flat.paste(picture, mask=picture.getchannel("A"))
    return np.asarray(flat)


@pytest.mark.parametrize("file_format", FORMATS)
async def test_every_format_gives_the_pixels_of_pillow(
    decoder: DecodePool, file_format: str
) -> None:
    data = encode(noise(37, 23), file_format)

    pixels = await decode(decoder, data)

    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("file_format", ["PPM", "ICO", "JPEG2000", "TGA"])
async def test_other_formats_are_refused(decoder: DecodePool, file_format: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"cannot identify image file$") as caught:
        await decode(decoder, encode(noise(16, 16), file_format))
    assert caught.value.reason == "INVALID_MEDIA"


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
async def test_all_orientations_stand_upright(
    decoder: DecodePool, file_format: str, orientation: int
) -> None:
    data = encode(noise(12, 7), file_format, orientation)

    pixels = await decode(decoder, data)

    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(pixels, np.asarray(upright))
    assert pixels.shape[:2] == ((12, 7) if orientation >= 5 else (7, 12))


async def test_exif_behind_the_pixels_of_a_png_counts(decoder: DecodePool) -> None:
    data = png_with_late_exif(noise(12, 7), 6)

    pixels = await decode(decoder, data)

    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(pixels, np.asarray(upright))


async def test_broken_pixels_in_front_of_exif_are_refused(decoder: DecodePool) -> None:
    data = bytearray(png_with_late_exif(noise(64, 64), 6))
    data[data.index(b"IDAT") + 2000] ^= 0xFF

    with pytest.raises(InvalidRequestError, match="broken data stream"):
        await decode(decoder, bytes(data))


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"junk" * 9])
async def test_broken_exif_is_not_fatal(decoder: DecodePool, exif: bytes) -> None:
    buffer = io.BytesIO()
    noise(9, 5).save(buffer, "JPEG", exif=exif)

    pixels = await decode(decoder, buffer.getvalue())

    assert pixels.shape == (5, 9, 3)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
async def test_orientations_that_do_not_exist_are_ignored(
    decoder: DecodePool, orientation: int
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    buffer = io.BytesIO()
    noise(9, 5).save(buffer, "JPEG", exif=exif)

    assert (await decode(decoder, buffer.getvalue())).shape == (5, 9, 3)


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("PA", "TIFF")],
)
async def test_transparent_pixels_show_the_white_page(
    decoder: DecodePool, mode: str, file_format: str
) -> None:
    image = noise(20, 11).convert("P").convert("PA") if mode == "PA" else noise(20, 11, mode)
    if mode == "PA":
        image.putalpha(noise(20, 11, "L", seed=1))
    data = encode(image, file_format)

    pixels = await decode(decoder, data)

    assert np.array_equal(pixels, on_white(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize(
    ("mode", "file_format"), [("P", "PNG"), ("L", "PNG"), ("RGB", "PNG"), ("P", "GIF")]
)
async def test_a_transparent_colour_shows_the_white_page(
    decoder: DecodePool, mode: str, file_format: str
) -> None:
    image = noise(20, 11).quantize(8) if mode == "P" else noise(20, 11, mode)
    transparent = image.getpixel((3, 4))
    buffer = io.BytesIO()
    image.save(buffer, file_format, transparency=transparent)

    pixels = await decode(decoder, buffer.getvalue())

    assert pixels[4, 3].tolist() == [255, 255, 255]
    assert np.array_equal(pixels, on_white(Image.open(buffer)))


async def test_the_background_can_be_chosen(decoder: DecodePool) -> None:
    data = encode(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), "PNG")

    pixels = await decode(decoder, data, background_rgb=0x102030)

    assert pixels.reshape(-1, 3).tolist() == [[0x10, 0x20, 0x30]] * 16


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
async def test_other_modes_become_rgb(decoder: DecodePool, mode: str) -> None:
    data = encode(noise(9, 5).convert(mode), "JPEG" if mode in ("CMYK", "YCbCr") else "PNG")

    pixels = await decode(decoder, data)

    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
async def test_sixteen_bit_greys_keep_their_brightness(
    decoder: DecodePool, file_format: str
) -> None:
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)

    pixels = await decode(decoder, encode(Image.fromarray(values), file_format))

    assert pixels[0, :, 0].tolist() == [0, 1, 128, 255]


async def test_a_transparent_sixteen_bit_grey_shows_the_white_page(decoder: DecodePool) -> None:
    values = np.array([[0, 40_000, 40_001, 65535]], dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG", transparency=40_000)

    pixels = await decode(decoder, buffer.getvalue())

    assert Image.open(buffer).mode == "I;16"
    assert pixels[0, :, 0].tolist() == [0, 255, 156, 255]


async def test_the_first_frame_of_an_animation_is_taken(decoder: DecodePool) -> None:
    frames = [noise(9, 5, "P", seed=seed) for seed in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])

    pixels = await decode(decoder, buffer.getvalue())

    assert np.array_equal(pixels, np.asarray(Image.open(buffer).convert("RGB")))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, MAX_SIDE), (MAX_SIDE, 1), (1000, 1000)])
async def test_sizes_up_to_the_limits_are_decoded(
    decoder: DecodePool, width: int, height: int
) -> None:
    pixels = await decode(decoder, encode(Image.new("RGB", (width, height)), "PNG"))

    assert pixels.shape == (height, width, 3)


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (1001, 1000, r"Image dimensions 1001x1000 \(1001000 pixels\) exceed the maximum of"),
        (30_000, 30_000, "exceed the maximum of"),
        (MAX_SIDE + 1, 1, r"16385x1 exceed the maximum of 16384 pixels a side\."),
    ],
)
async def test_sizes_over_the_limits_are_refused_by_their_header(
    decoder: DecodePool, width: int, height: int, message: str
) -> None:
    with pytest.raises(TooLargeError, match=message):
        await probe(decoder, MemoryFile.of_bytes(png_header(width, height)))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
async def test_truncated_files_are_refused_without_internals(
    decoder: DecodePool, file_format: str
) -> None:
    data = encode(noise(64, 64), file_format)

    with pytest.raises(InvalidRequestError) as caught:
        await decode(decoder, data[: len(data) // 2])

    message = caught.value.message
    assert message.startswith("Failed to load image: ")
    assert "0x" not in message
    assert "<" not in message


async def test_files_that_are_no_pictures_are_refused(decoder: DecodePool) -> None:
    for data in (b"x", b"%PDF-1.4", b"\0" * 1000, png_header(5, 5), b"GIF89a"):
        with pytest.raises(InvalidRequestError, match=r"^Failed to load image: "):
            await decode(decoder, data)


async def test_a_file_is_read_only_for_the_worker(decoder: DecodePool) -> None:
    source = MemoryFile.of_bytes(b"data")

    with pytest.raises(PermissionError):
        os.write(source.fd, b"x")
    with pytest.raises(PermissionError):
        os.ftruncate(source.fd, 100)


async def test_a_header_that_does_not_fit_the_file_is_refused(decoder: DecodePool) -> None:
    source = MemoryFile.of_bytes(encode(noise(4, 4), "PNG"))

    with pytest.raises(InvalidRequestError, match="size of the picture has changed"):
        await decoder.decode(Modality.IMAGE, source, ImageTask(MAX_PIXELS, 5, 5).pack(), 75)


def make_pool(
    *,
    cpu_limit_s: int = 10,
    timeout_s: float = 30.0,
    memory_bytes: int = 1 << 30,
    num_workers: int = 1,
) -> DecodePool:
    """Return a pool, started, for a test that ends its workers."""
    limits = DecodeLimits(memory_bytes, cpu_limit_s, timeout_s, niceness=0)
    pool = DecodePool(num_workers, limits)
    pool.start()
    return pool


@pytest.mark.parametrize("num_workers", [1, 3])
async def test_killed_workers_are_replaced_and_the_task_repeated(num_workers: int) -> None:
    pool = make_pool(num_workers=num_workers)
    data = encode(noise(8, 8), "PNG")
    try:
        await decode(pool, data)
        pids = {process.pid for process in pool._processes}
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            await asyncio.to_thread(os.waitid, os.P_PID, pid, os.WEXITED | os.WNOWAIT)

        pixels = await decode(pool, data)

        assert pixels.shape == (8, 8, 3)
        assert {process.pid for process in pool._processes} != pids
    finally:
        pool.stop()


async def test_a_task_over_its_cpu_seconds_is_the_files_fault() -> None:
    pool = make_pool(cpu_limit_s=7)
    source = MemoryFile.of_bytes(encode(noise(8, 8), "PNG"))
    try:
        await probe(pool, source)
        (process,) = pool._processes
        limits = await asyncio.to_thread(Path(f"/proc/{process.pid}/limits").read_text)
        os.kill(process.pid, signal.SIGSTOP)
        task = asyncio.create_task(probe(pool, source))
        await asyncio.sleep(0)
        os.kill(process.pid, signal.SIGXCPU)  # as the kernel does at the limit
        os.kill(process.pid, signal.SIGCONT)

        with pytest.raises(InvalidRequestError, match="takes too long to decode"):
            await task
        assert re.search(r"Max cpu time +8 +unlimited", limits)
        assert (await probe(pool, source)).num_pixels == 64
    finally:
        pool.stop()


async def test_a_worker_that_does_not_answer_in_time_is_killed() -> None:
    pool = make_pool(timeout_s=0.5)
    source = MemoryFile.of_bytes(encode(noise(8, 8), "PNG"))
    try:
        (process,) = pool._processes
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(OverloadedError) as caught:
            await probe(pool, source)
        assert caught.value.retry_after_s is not None
        assert not pool._processes
    finally:
        pool.stop()


async def test_a_cancelled_task_ends_its_worker_and_leaves_the_pool_usable() -> None:
    pool = make_pool()
    source = MemoryFile.of_bytes(encode(noise(8, 8), "PNG"))
    try:
        (process,) = pool._processes
        os.kill(process.pid, signal.SIGSTOP)
        task = asyncio.create_task(probe(pool, source))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        assert (await probe(pool, source)).num_pixels == 64
    finally:
        pool.stop()


async def test_a_picture_that_needs_too_much_memory_is_refused() -> None:
    pool = make_pool(memory_bytes=256 << 20)
    try:
        with pytest.raises(InvalidRequestError, match="Failed to load image"):
            await decode(pool, encode(Image.new("1", (8000, 8000)), "PNG"), max_pixels=70_000_000)
        assert (await decode(pool, encode(noise(8, 8), "PNG"))).shape == (8, 8, 3)
    finally:
        pool.stop()


@pytest.mark.parametrize(
    ("message", "safe"),
    [
        ("cannot identify image file <_io.BytesIO object at 0x7a95>", "cannot identify image file"),
        ("broken at 0x7f00deadbeef now", "broken at  now"),
        ("No such file: /usr/lib/python3/x.py", "No such file:"),
        ("a size of 12000x9000 pixels", "a size of 12000x9000 pixels"),
        ("two\nlines\x1b[31m", "two lines [31m"),
        ("", "the file cannot be decoded"),
    ],
)
async def test_messages_lose_addresses_paths_and_control_characters(
    message: str, safe: str
) -> None:
    assert make_safe(message) == safe
