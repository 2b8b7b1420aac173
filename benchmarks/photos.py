"""Make JPEG files that are as hard to decode as photographs."""

from __future__ import annotations

import io
import time

import numpy as np
from PIL import Image

_NOISE = 12
_COARSENESS = 16


def photo(width: int, height: int, quality: int) -> bytes:
    """Return a JPEG file of smooth colours with fine noise over them."""
    generator = np.random.default_rng(0)
    shape = (max(1, height // _COARSENESS), max(1, width // _COARSENESS), 3)
    colours = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
    smooth = np.asarray(colours.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noise = generator.integers(-_NOISE, _NOISE + 1, (height, width, 3), dtype=np.int16)
    buffer = io.BytesIO()
    pixels = (smooth + noise).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def copy_of(picture: bytes, number: int) -> bytes:
    """Return another file with the same pixels: decoders do not look behind the end marker."""
    return picture + number.to_bytes(8, "big")


def load_picture(picture: bytes) -> float:
    """Decode a picture with nothing but Pillow and return the seconds that it took."""
    started = time.perf_counter()
    Image.open(io.BytesIO(picture)).load()
    return time.perf_counter() - started
