"""Decode pictures in a process of its own that may crash, hang or be killed at any time.

The process talks over the socket given as its first argument until the other side closes it. It
imports the decoder and the standard library only, runs niced and with one thread, and the kernel
bounds its memory and its CPU seconds per task.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import resource
import socket
import sys
import time
import warnings
from typing import TYPE_CHECKING

from PIL import Image

from chiasm.encoder.decode_wire import (
    MAX_SIDE,
    NUM_CHANNELS,
    REQUEST_BYTES,
    DecodeReply,
    DecodeRequest,
    Operation,
    Status,
)

if TYPE_CHECKING:
    from collections.abc import Callable

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MODES_WITH_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")
_NUM_WIDE_GREYS = 1 << 16
_PNG_SIGNATURE_BYTES = 8
_PNG_CHUNK_OVERHEAD_BYTES = 12


class PictureTooLargeError(Exception):
    """The header announces more pixels than allowed; carries the upright size."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__(f"{width}x{height}")
        self.width = width
        self.height = height


def main() -> None:
    """Serve tasks until the other side closes; ``argv``: socket fd, memory bytes, niceness."""
    socket_fd, memory_bytes, niceness = (int(value) for value in sys.argv[-3:])
    os.nice(niceness)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A wrong size in a header is our own check's business; this is the net behind it.
    Image.MAX_IMAGE_PIXELS = MAX_SIDE * MAX_SIDE
    warnings.simplefilter("ignore")
    Image.init()
    with socket.socket(fileno=socket_fd) as channel:
        while serve_one(channel):
            pass


def serve_one(channel: socket.socket) -> bool:
    """Answer one task.

    Returns:
        Whether there was one; ``False`` when the other side has closed the channel.
    """
    message, fds, _, _ = socket.recv_fds(channel, REQUEST_BYTES, 2)
    if not message:
        return False
    try:
        request = DecodeRequest.unpack(message)
        _limit_cpu(request.cpu_limit_s)
        reply = _answer(request, fds)
    finally:
        for fd in fds:
            os.close(fd)
    channel.sendall(reply.pack())
    return True


def _limit_cpu(seconds: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + seconds, hard))


def _answer(request: DecodeRequest, fds: list[int]) -> DecodeReply:
    task: Callable[[DecodeRequest, list[int]], DecodeReply]
    task = _probe if request.operation is Operation.PROBE else _decode
    try:
        return task(request, fds)
    except PictureTooLargeError as error:
        return DecodeReply(Status.TOO_LARGE, error.width, error.height)
    except Image.DecompressionBombError:
        return DecodeReply(Status.TOO_LARGE)
    except MemoryError:
        return DecodeReply(Status.OUT_OF_MEMORY)
    except Exception as error:
        # Decoders raise anything, SyntaxError included.
        return DecodeReply(Status.INVALID, message=str(error))


def _probe(request: DecodeRequest, fds: list[int]) -> DecodeReply:
    with mmap.mmap(fds[0], 0, prot=mmap.PROT_READ) as source:
        width, height, _, _ = _open(source, request.max_pixels)
    return DecodeReply(Status.OK, width, height)


def _decode(request: DecodeRequest, fds: list[int]) -> DecodeReply:
    with mmap.mmap(fds[0], 0, prot=mmap.PROT_READ) as source:
        width, height, orientation, image = _open(source, request.max_pixels)
        if (width, height) != (request.width, request.height):
            raise ValueError("the size of the picture has changed")
        upright = _flatten(image, request.background_rgb)
    if orientation in _TRANSPOSE:
        upright = upright.transpose(_TRANSPOSE[orientation])
    if upright.size != (width, height):
        raise ValueError("the picture does not have the size of its header")
    with mmap.mmap(fds[1], width * height * NUM_CHANNELS) as pixels:
        pixels[:] = upright.tobytes()
    return DecodeReply(Status.OK, width, height)


def _open(source: mmap.mmap, max_pixels: int) -> tuple[int, int, int, Image.Image]:
    """Return upright width, upright height, orientation and the image, not yet decoded."""
    image = Image.open(io.BytesIO(source), formats=FORMATS)
    width, height = image.size
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise PictureTooLargeError(width, height)
    orientation = _read_orientation(image, source)
    if orientation >= 5:
        width, height = height, width
    return width, height, orientation, image


def _read_orientation(image: Image.Image, source: mmap.mmap) -> int:
    if image.format == "TIFF":
        return 1  # Pillow turns TIFF pictures itself, and their size is the upright one already
    try:
        if image.format == "PNG" and not _has_chunks_behind_pixels(source):
            # The PNG plugin's own method decodes all pixels to look for Exif behind them.
            exif = Image.Image.getexif(image)
        else:
            exif = image.getexif()
        orientation = exif.get(_ORIENTATION_TAG, 1)
    except Exception:
        # Broken Exif raises anything and must not be fatal.
        return 1
    return orientation if orientation in _TRANSPOSE else 1


def _has_chunks_behind_pixels(source: mmap.mmap) -> bool:
    offset, has_seen_pixels = _PNG_SIGNATURE_BYTES, False
    while offset + _PNG_CHUNK_OVERHEAD_BYTES <= len(source):
        num_bytes = int.from_bytes(source[offset : offset + 4], "big")
        kind = source[offset + 4 : offset + 8]
        if has_seen_pixels and kind not in (b"IDAT", b"IEND"):
            return True
        has_seen_pixels = has_seen_pixels or kind == b"IDAT"
        offset += num_bytes + _PNG_CHUNK_OVERHEAD_BYTES
    return False


def _flatten(image: Image.Image, background_rgb: int) -> Image.Image:
    """Return the picture as 8-bit RGB, transparent pixels composited on the background."""
    if image.mode.startswith("I;16"):
        image = _narrow(image)
    if image.mode in _MODES_WITH_ALPHA or "transparency" in image.info:
        picture = image.convert("RGBA")
        red, green, blue = background_rgb.to_bytes(3, "big")
        flat = Image.new("RGB", picture.size, (red, green, blue))
        flat.paste(picture, mask=picture.getchannel("A"))
        return flat
    return image.convert("RGB")


def _narrow(image: Image.Image) -> Image.Image:
    """Return 16-bit greys as 8-bit ones, with an alpha channel if one grey is transparent."""
    wide = image.convert("I")
    grey = wide.point(lambda value: value * (1 / 256)).convert("L")
    # NOTE: the key is one of 65536 greys; its neighbours become the same 8-bit grey and are opaque.
    key = image.info.get("transparency")
    grey.info.pop("transparency", None)
    if key is not None:
        opacity = [255] * _NUM_WIDE_GREYS
        opacity[key] = 0
        grey.putalpha(wide.point(opacity, "L"))
    return grey
