"""Decode media in a process of its own that may crash, hang or be killed at any time.

The process talks over the socket given as its first argument until the other side closes it. It
imports decoders and the standard library only, each decoder when the first task asks for it, runs
niced and with one thread, and the kernel bounds its memory and its CPU seconds per task.
"""

from __future__ import annotations

import errno
import importlib
import math
import mmap
import os
import resource
import socket
import sys
import time
from typing import TYPE_CHECKING, Protocol, cast

from chiasm.encoder.decode_errors import MediaTooLargeError
from chiasm.encoder.decode_wire import (
    REQUEST_BYTES,
    DecodeReply,
    DecodeRequest,
    Operation,
    Status,
)
from chiasm.encoder.media_mappings import MediaMappings
from chiasm.encoder.media_writer import MediaWriter

if TYPE_CHECKING:
    from collections.abc import Sequence

_DECODERS = {
    Operation.PROBE_IMAGE: "chiasm.encoder.decode_image",
    Operation.DECODE_IMAGE: "chiasm.encoder.decode_image",
    Operation.PROBE_VIDEO: "chiasm.encoder.decode_video",
    Operation.DECODE_VIDEO: "chiasm.encoder.decode_video",
    Operation.PROBE_AUDIO: "chiasm.encoder.decode_audio",
    Operation.DECODE_AUDIO: "chiasm.encoder.decode_audio",
    Operation.PROBE_TENSOR: "chiasm.encoder.decode_tensor",
    Operation.DECODE_TENSOR: "chiasm.encoder.decode_tensor",
}


class Decoder(Protocol):
    """What the module of a decoder offers; its functions may raise anything."""

    def probe(self, body: bytes, source: mmap.mmap) -> bytes:
        """Return what the header of ``source`` tells, for a task in ``body``."""
        ...

    def decode(self, body: bytes, source: mmap.mmap, media: MediaWriter) -> None:
        """Fill ``media`` with what ``source`` holds, for a task in ``body``."""
        ...


def main() -> None:
    """Serve tasks until the other side closes; ``argv``: socket fd, memory bytes, niceness."""
    socket_fd, memory_bytes, niceness = (int(value) for value in sys.argv[-3:])
    os.nice(niceness)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    mappings = MediaMappings()
    with socket.socket(fileno=socket_fd) as channel:
        while serve_one(channel, mappings):
            pass


def serve_one(channel: socket.socket, mappings: MediaMappings) -> bool:
    """Answer one task.

    Args:
        channel: The socket to the encoder.
        mappings: What is known of the memory that media are decoded into.

    Returns:
        Whether there was one; ``False`` when the other side has closed the channel.
    """
    message, fds, _, _ = socket.recv_fds(channel, REQUEST_BYTES, 2)
    if not message:
        return False
    try:
        request = DecodeRequest.unpack(message)
        _limit_cpu(request.cpu_limit_s)
        reply = _answer(request, fds, mappings)
    finally:
        for fd in fds:
            os.close(fd)
    channel.sendall(reply.pack())
    return True


def _limit_cpu(seconds: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + seconds, hard))


def _answer(request: DecodeRequest, fds: Sequence[int], mappings: MediaMappings) -> DecodeReply:
    try:
        decoder = cast("Decoder", importlib.import_module(_DECODERS[request.operation]))
        with mmap.mmap(fds[0], 0, prot=mmap.PROT_READ) as source:
            if request.operation.is_probe:
                return DecodeReply(Status.OK, decoder.probe(request.body, source))
            decoder.decode(request.body, source, MediaWriter(fds[1], mappings))
        return DecodeReply(Status.OK)
    except MediaTooLargeError as error:
        return DecodeReply.failure(Status.TOO_LARGE, str(error))
    except MemoryError:
        return DecodeReply(Status.OUT_OF_MEMORY)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return DecodeReply(Status.OUT_OF_MEMORY)
        # Decoders raise anything, SyntaxError included.
        return DecodeReply.failure(Status.INVALID, str(error))
