"""Define the messages between the encoder and its decode workers.

Both sides import this file, so it needs the standard library only. A message is one packet on a
UNIX socket: a fixed header and a body, which the operation defines (``wire_image.py`` and its
like). File contents and decoded media travel beside it as anonymous memory files::

    encoder                                          worker
      PROBE_<kind>  + fd of the source     ──────▶
                                           ◀──────   reply: what the file's header tells
      DECODE_<kind> + fds of source, media ──────▶
                                           ◀──────   reply without a body; the media is written
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

MAX_BODY_BYTES = 1 << 14
MAX_TEXT_CHARS = 256

_REQUEST = struct.Struct("<4sBxxxII")
_REPLY = struct.Struct("<4sBxxxI")
_MAGIC = b"CHD2"

REQUEST_BYTES = _REQUEST.size + MAX_BODY_BYTES
REPLY_BYTES = _REPLY.size + MAX_BODY_BYTES


class WireError(Exception):
    """The other side sent something that is not a message."""


class Operation(enum.IntEnum):
    """What a worker is asked to do."""

    PROBE_IMAGE = 1
    """Read the header of a picture."""
    DECODE_IMAGE = 2
    """Decode a picture to rows of pixels; the memory may have been used before."""
    PROBE_VIDEO = 3
    """Read the container of a video."""
    DECODE_VIDEO = 4
    """Decode the sampled frames of a video."""
    PROBE_AUDIO = 5
    """Read the header of a sound file."""
    DECODE_AUDIO = 6
    """Decode a sound file to one channel of float32 samples."""
    PROBE_TENSOR = 7
    """Read the header of a file with a ready-made tensor."""
    DECODE_TENSOR = 8
    """Copy the elements of a ready-made tensor, densely."""

    @property
    def is_probe(self) -> bool:
        """Whether only the source travels with it, and no memory for decoded media."""
        return self.name.startswith("PROBE")


class Status(enum.IntEnum):
    """How a worker's task ended."""

    OK = 0
    INVALID = 1
    """The source cannot be decoded; the body is the decoder's own words, not fit to be shown."""
    TOO_LARGE = 2
    """The source announces or has more than allowed; the body says of what."""
    OUT_OF_MEMORY = 3
    """Decoding needs more memory than the worker may take."""


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """One task for a worker.

    Attributes:
        operation: What to do.
        cpu_limit_s: CPU seconds after which the kernel ends the worker.
        body: What the operation's own file defines; at most ``MAX_BODY_BYTES``.
    """

    operation: Operation
    cpu_limit_s: int
    body: bytes

    def pack(self) -> bytes:
        """Return the message."""
        assert len(self.body) <= MAX_BODY_BYTES, "bodies are bounded by what makes them"
        header = _REQUEST.pack(_MAGIC, self.operation, self.cpu_limit_s, len(self.body))
        return header + self.body

    @classmethod
    def unpack(cls, message: bytes) -> DecodeRequest:
        """Return the task in ``message``; raise ``WireError`` if it is none."""
        if len(message) < _REQUEST.size:
            raise WireError("not a decode request")
        magic, operation, cpu_limit_s, num_bytes = _REQUEST.unpack_from(message)
        body = message[_REQUEST.size :]
        if magic != _MAGIC or operation not in tuple(Operation) or len(body) != num_bytes:
            raise WireError("not a decode request")
        return cls(Operation(operation), cpu_limit_s, body)


@dataclass(frozen=True, slots=True)
class DecodeReply:
    """How a task ended.

    Attributes:
        status: Outcome.
        body: After a probe what the operation's own file defines, after a failure text.
    """

    status: Status
    body: bytes = b""

    @classmethod
    def failure(cls, status: Status, message: str) -> DecodeReply:
        """Return a reply with text, cut to ``MAX_TEXT_CHARS`` ASCII characters."""
        return cls(status, message.encode("ascii", "replace")[:MAX_TEXT_CHARS])

    @property
    def message(self) -> str:
        """The text of a failure."""
        return self.body[:MAX_TEXT_CHARS].decode("ascii", "replace")

    def pack(self) -> bytes:
        """Return the message."""
        assert len(self.body) <= MAX_BODY_BYTES, "bodies are bounded by what makes them"
        return _REPLY.pack(_MAGIC, self.status, len(self.body)) + self.body

    @classmethod
    def unpack(cls, message: bytes) -> DecodeReply:
        """Return the reply in ``message``; raise ``WireError`` if it is none."""
        if len(message) < _REPLY.size:
            raise WireError("not a decode reply")
        magic, status, num_bytes = _REPLY.unpack_from(message)
        body = message[_REPLY.size :]
        if magic != _MAGIC or status not in tuple(Status) or len(body) != num_bytes:
            raise WireError("not a decode reply")
        return cls(Status(status), body)
