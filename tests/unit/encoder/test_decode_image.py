"""Rare pictures as a person sees them: transparent colours, greys that count from white."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from chiasm.encoder.decode_image import read_header, write_pixels
from chiasm.encoder.wire_image import ImageTask

GREY, RGB = 0, 2
BLUE = 0x0000FF
MAX_PIXELS = 1000


class Pixels:
    """Takes what is written."""

    def __init__(self) -> None:
        self.content = b""

    def write(self, pixels: bytes) -> None:
        """Add pixels."""
        self.content += pixels


def decode(source: bytes) -> list[tuple[int, int, int]]:
    """Return the pixels of a picture on blue."""
    header = read_header(source, MAX_PIXELS)
    pixels = Pixels()
    write_pixels(source, ImageTask(MAX_PIXELS, header.width, header.height, BLUE), pixels)  # type: ignore[arg-type]  # only writes
    rows = np.frombuffer(pixels.content, np.uint8).reshape(-1, 3)
    return [(int(red), int(green), int(blue)) for red, green, blue in rows]


def png(width: int, depth: int, colour: int, row: bytes, key: bytes) -> bytes:
    """Return a PNG of one row with a transparent colour."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", key), (b"IDAT", zlib.compress(b"\0" + row))]
    parts = [chunk(kind, body) for kind, body in (*chunks, (b"IEND", b""))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("depth", "row", "key", "greys"),
    [
        (1, 0b01000000, 1, [0, None]),
        (2, 0b00011011, 2, [0, 85, None, 255]),
        (2, 0b00011011, 0, [None, 85, 170, 255]),
        (4, 0x2F, 2, [None, 255]),
        (4, 0x2F, 0xF, [34, None]),
        # Only so many bits of it count as a sample has.
        (4, 0x2F, 0xF2, [None, 255]),
        (8, 0x2F, 0x2F, [None]),
    ],
)
def test_a_transparent_grey_shows_the_background(
    depth: int, row: int, key: int, greys: list[int | None]
) -> None:
    source = png(len(greys), depth, GREY, bytes([row]), struct.pack(">H", key))

    expected = [(0, 0, 255) if grey is None else (grey,) * 3 for grey in greys]
    assert decode(source) == expected


@pytest.mark.parametrize("other", [(0x0012, 0x0056, 0x009A), (0x1334, 0x5678, 0x9ABC)])
def test_a_transparent_colour_of_16_bits_shows_the_background_and_no_other_does(
    other: tuple[int, int, int],
) -> None:
    key = (0x1234, 0x5678, 0x9ABC)

    pixels = decode(png(2, 16, RGB, struct.pack(">6H", *key, *other), struct.pack(">3H", *key)))

    assert pixels == [(0, 0, 255), tuple(value >> 8 for value in other)]


def test_a_transparent_colour_of_16_bits_is_not_taken_for_one_of_8() -> None:
    row = struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)

    pixels = decode(png(1, 16, RGB, row, struct.pack(">3H", 0x12, 0x56, 0x9A)))

    assert pixels == [(0x12, 0x56, 0x9A)]


def with_tag(file: io.BytesIO, tag: int, before: int, after: int) -> bytes:
    """Return a TIFF one tag of which is another; Pillow would write other samples with it."""
    old, new = (struct.pack("<HHIHH", tag, 3, 1, value, 0) for value in (before, after))
    assert file.getvalue().count(old) == 1
    return file.getvalue().replace(old, new)


@pytest.mark.parametrize(("photometric", "greys"), [(0, [237, 0, 255]), (1, [18, 255, 0])])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_greys_of_a_tiff_may_count_from_white(
    dtype: type[np.uint8 | np.uint16], photometric: int, greys: list[int]
) -> None:
    wide = np.array([[0x1200, 0xFFFF, 0]], np.uint16)
    file = io.BytesIO()
    Image.fromarray(wide if dtype is np.uint16 else (wide >> 8).astype(np.uint8)).save(file, "TIFF")

    assert decode(with_tag(file, 262, 1, photometric)) == [(grey,) * 3 for grey in greys]


def test_a_grey_tiff_may_have_an_alpha_that_is_multiplied_in() -> None:
    file = io.BytesIO()
    Image.fromarray(np.array([[[64, 128], [0, 0]]], np.uint8), "LA").save(file, "TIFF")
    source = with_tag(file, 338, 2, 1)
    assert Image.open(io.BytesIO(source)).mode == "La"

    (red, green, blue), transparent = decode(source)

    # On blue: 64 of the picture, and 127 of 255 of the page.
    assert red == green == 64
    assert blue in (64 + 126, 64 + 127)
    assert transparent == (0, 0, 255)
