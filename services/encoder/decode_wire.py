"""Define the messages between the encoder and its decode workers.

Both sides import this file, so it needs the standard library only. A message is one fixed-size
struct on a UNIX socket; file contents and pixels travel beside it as anonymous memory files::

    encoder                                      worker
      PROBE  + fd of the source        ──────▶
                                       ◀──────   reply: width, height
      DECODE + fds of source, pixels   ──────▶
                                       ◀──────   reply: width, height; pixels are written

Pixels are rows of 8-bit red, green, blue without padding.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

NUM_CHANNELS = 3
MAX_SIDE = 16384

_REQUEST = struct.Struct("<4sBxxxIIIIQ")
_REPLY = struct.Struct("<4sBxxxIIH256s")
_MAGIC = b"CHD1"
_MAX_MESSAGE_BYTES = 256

REQUEST_BYTES = _REQUEST.size
REPLY_BYTES = _REPLY.size


class WireError(Exception):
    """The other side sent something that is not a message."""


class Operation(enum.IntEnum):
    """What a worker is asked to do."""

    PROBE = 1
    """Read the header of the source."""
    DECODE = 2
    """Decode the source into the pixel memory."""


class Status(enum.IntEnum):
    """How a worker's task ended."""

    OK = 0
    INVALID = 1
    """The source is not a picture that can be decoded."""
    TOO_LARGE = 2
    """The picture has more pixels or a longer side than allowed."""
    OUT_OF_MEMORY = 3
    """Decoding needs more memory than the worker may take."""


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """One task for a worker.

    Attributes:
        operation: What to do.
        background_rgb: Colour behind transparent pixels, 0xRRGGBB.
        width: Expected columns of the upright picture; 0 for PROBE.
        height: Expected rows of the upright picture; 0 for PROBE.
        cpu_limit_s: CPU seconds after which the kernel ends the worker.
        max_pixels: Most pixels a picture may have.
    """

    operation: Operation
    background_rgb: int
    width: int
    height: int
    cpu_limit_s: int
    max_pixels: int

    def pack(self) -> bytes:
        """Return the message."""
        return _REQUEST.pack(
            _MAGIC,
            self.operation,
            self.background_rgb,
            self.width,
            self.height,
            self.cpu_limit_s,
            self.max_pixels,
        )

    @classmethod
    def unpack(cls, message: bytes) -> DecodeRequest:
        """Return the task in ``message``; raise ``WireError`` if it is none."""
        if len(message) != REQUEST_BYTES:
            raise WireError("not a decode request")
        magic, operation, *fields = _REQUEST.unpack(message)
        if magic != _MAGIC or operation not in tuple(Operation):
            raise WireError("not a decode request")
        return cls(Operation(operation), *fields)


@dataclass(frozen=True, slots=True)
class DecodeReply:
    """How a task ended.

    Attributes:
        status: Outcome.
        width: Columns of the picture once it stands upright; 0 if unknown.
        height: Rows of the picture once it stands upright; 0 if unknown.
        message: The decoder's own words about a failure; not fit to be shown as they are.
    """

    status: Status
    width: int = 0
    height: int = 0
    message: str = ""

    def pack(self) -> bytes:
        """Return the message; the text is cut to its field."""
        text = self.message.encode("ascii", "replace")[:_MAX_MESSAGE_BYTES]
        return _REPLY.pack(_MAGIC, self.status, self.width, self.height, len(text), text)

    @classmethod
    def unpack(cls, message: bytes) -> DecodeReply:
        """Return the reply in ``message``; raise ``WireError`` if it is none."""
        if len(message) != REPLY_BYTES:
            raise WireError("not a decode reply")
        magic, status, width, height, num_bytes, text = _REPLY.unpack(message)
        if magic != _MAGIC or status not in tuple(Status) or num_bytes > _MAX_MESSAGE_BYTES:
            raise WireError("not a decode reply")
        return cls(Status(status), width, height, text[:num_bytes].decode("ascii", "replace"))
