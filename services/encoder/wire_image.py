"""Define the bodies of the messages about pictures; see ``decode_wire.py``.

A decoded picture is rows of pixels of 8-bit red, green, blue and a byte without meaning, as Pillow
keeps them: it decodes in place.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from chiasm.encoder.decode_wire import WireError

NUM_CHANNELS = 3
PIXEL_BYTES = 4
MAX_SIDE = 16384

_TASK = struct.Struct("<QIII")
_HEADER = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class ImageTask:
    """What a worker is told about a picture.

    Attributes:
        max_pixels: Most pixels a picture may have.
        width: Expected columns of the upright picture; 0 for a probe.
        height: Expected rows of the upright picture; 0 for a probe.
        background_rgb: Colour behind transparent pixels, 0xRRGGBB; 0 for a probe.
    """

    max_pixels: int
    width: int = 0
    height: int = 0
    background_rgb: int = 0

    def pack(self) -> bytes:
        """Return the body of a request."""
        return _TASK.pack(self.max_pixels, self.width, self.height, self.background_rgb)

    @classmethod
    def unpack(cls, body: bytes) -> ImageTask:
        """Return the task in ``body``; raise ``WireError`` if it is none."""
        if len(body) != _TASK.size:
            raise WireError("not a task about a picture")
        return cls(*_TASK.unpack(body))


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What the header of a picture tells: its size once it stands upright."""

    width: int
    height: int

    @property
    def num_pixels(self) -> int:
        """Pixels of the picture."""
        return self.width * self.height

    def pack(self) -> bytes:
        """Return the body of the answer to a probe."""
        return _HEADER.pack(self.width, self.height)

    @classmethod
    def unpack(cls, body: bytes) -> ImageHeader:
        """Return the header in ``body``; raise ``WireError`` if it is none."""
        if len(body) != _HEADER.size:
            raise WireError("not the header of a picture")
        return cls(*_HEADER.unpack(body))
