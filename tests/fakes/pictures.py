"""Make small picture files for tests, in every format, mode and orientation."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

ORIENTATION_TAG = 0x0112


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Return a picture of random pixels."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def encode(image: Image.Image, file_format: str, orientation: int | None = None) -> bytes:
    """Return the file of ``image``; with an Exif orientation if one is given."""
    buffer = io.BytesIO()
    exif = Image.Exif()
    if orientation is not None:
        exif[ORIENTATION_TAG] = orientation
    quality = {"lossless": True} if file_format == "WEBP" else {}
    image.save(buffer, file_format, **({"exif": exif} if orientation else {}), **quality)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """Return a PNG whose header announces a size and whose pixels are missing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return _png((b"IHDR", header), (b"IDAT", b""), (b"IEND", b""))


def png_with_late_exif(image: Image.Image, orientation: int) -> bytes:
    """Return a PNG whose Exif stands behind its pixels, as the format allows."""
    plain = encode(image.convert("RGB"), "PNG")
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    end = plain.rindex(b"IEND") - 4
    return plain[:end] + _chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + plain[end:]


def _png(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
