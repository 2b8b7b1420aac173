"""Make small files that unpack to very much, or announce what they do not hold."""

from __future__ import annotations

import io
import json
import struct
import zlib
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Sequence

_WEBP_SIZE_BITS = 14


def solid_webp(width: int, height: int) -> bytes:
    """Return a WebP of one colour, of a few dozen bytes whatever its size (up to 16384 a side).

    Source: the specification of WebP lossless; five codes of one symbol each take no bits a pixel.
    """
    bits = _Bits()
    bits.add(0x2F, 8)
    bits.add(width - 1, _WEBP_SIZE_BITS)
    bits.add(height - 1, _WEBP_SIZE_BITS)
    bits.add(0, 1 + 3)  # no alpha, version 0
    bits.add(0, 1 + 1 + 1)  # no transform, no colour cache, no meta codes
    for symbol in (200, 30, 60, 255, 0):
        bits.add(1, 1)  # a simple code
        bits.add(0, 1)  # of one symbol
        bits.add(1, 1)  # that takes 8 bits
        bits.add(symbol, 8)
    data = bits.to_bytes()
    data += b"\0" * (len(data) % 2)
    chunk = b"VP8L" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


class _Bits:
    """Collects bits, least significant first."""

    def __init__(self) -> None:
        self._value = 0
        self._num_bits = 0

    def add(self, value: int, num_bits: int) -> None:
        self._value |= value << self._num_bits
        self._num_bits += num_bits

    def to_bytes(self) -> bytes:
        return self._value.to_bytes((self._num_bits + 7) // 8, "little")


def bilevel_png(side: int) -> bytes:
    """Return a black PNG of one bit a pixel."""
    row = bytes(1 + (side + 7) // 8)
    packer = zlib.compressobj(9)
    pixels = b"".join([*(packer.compress(row) for _ in range(side)), packer.flush()])
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(kind, data) for kind, data in chunks)


def png_with_text_bomb(num_bytes: int) -> bytes:
    """Return a tiny PNG with a compressed text that unpacks to ``num_bytes``."""
    plain = saved(Image.new("RGB", (9, 9)), "PNG")
    text = b"Comment\0\0" + zlib.compress(bytes(num_bytes), 9)
    end = plain.index(b"IDAT") - 4
    return plain[:end] + _png_chunk(b"zTXt", text) + plain[end:]


def saved(picture: Image.Image, kind: str) -> bytes:
    """Return the file of a picture."""
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def large_jpeg(side: int) -> bytes:
    """Return a grey JPEG."""
    return saved(Image.new("L", (side, side), 90), "JPEG")


def jpeg_with_exif(picture: Image.Image, exif: bytes) -> bytes:
    """Return a JPEG with these bytes as its Exif, right or wrong."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, exif=exif)
    return buffer.getvalue()


def fits_picture() -> bytes:
    """Return a FITS file, which astronomers use."""
    cards = ("SIMPLE  =                    T", "BITPIX  =                    8")
    sides = ("NAXIS   =                    2", "NAXIS1  =                    9")
    rest = ("NAXIS2  =                    9", "END")
    header = "".join(card.ljust(80) for card in (*cards, *sides, *rest))
    return header.ljust(2880).encode() + bytes(2880)


def flac_with_rate(data: bytes, rate: int) -> bytes:
    """Return a FLAC file whose header tells ``rate``, up to 1048575 Hz."""
    fields = int.from_bytes(data[18:26], "big")
    return data[:18] + (fields & (1 << 44) - 1 | rate << 44).to_bytes(8, "big") + data[26:]


def safetensor_of(
    shape: Sequence[int], data: bytes, offsets: tuple[int, int] | None = None
) -> bytes:
    """Return a safetensors file of one float32 tensor that claims a shape and where it lies."""
    entry = {"dtype": "F32", "shape": list(shape), "data_offsets": offsets or (0, len(data))}
    header = json.dumps({"image_embeds": entry}).encode()
    return struct.pack("<Q", len(header)) + header + data


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
