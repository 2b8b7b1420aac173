"""Keep the pictures of a video, which came one by one, in one run of bytes.

``MAGIC``, then for each picture its length in 8 bytes, little-endian, and its file. Encoder and
decode workers use it, so it needs the standard library only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mmap
    from collections.abc import Sequence

MAGIC = b"chiasm frame list\n"
_LENGTH_BYTES = 8


def pack_frames(frames: Sequence[bytes | bytearray]) -> bytearray:
    """Return the run of bytes that holds the files ``frames``, oldest first."""
    data = bytearray(MAGIC)
    for frame in frames:
        data += len(frame).to_bytes(_LENGTH_BYTES, "little")
        data += frame
    return data


def is_frame_list(data: mmap.mmap | bytes | bytearray) -> bool:
    """Return whether ``data`` holds pictures rather than a container."""
    return data[: len(MAGIC)] == MAGIC


def split_frames(data: mmap.mmap | bytes | bytearray) -> list[bytes]:
    """Return the files in ``data``.

    Raises:
        ValueError: ``data`` is no list of frames, or has none.
    """
    frames = []
    offset = len(MAGIC)
    while offset < len(data):
        start = offset + _LENGTH_BYTES
        end = start + int.from_bytes(data[offset:start], "little")
        if not is_frame_list(data) or end > len(data):
            raise ValueError("it is no list of frames")
        frames.append(bytes(data[start:end]))
        offset = end
    if not frames:
        raise ValueError("it has no frames")
    return frames
