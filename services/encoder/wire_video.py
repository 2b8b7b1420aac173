"""Define the bodies of the messages about videos; see ``decode_wire.py``.

A decoded video is the sampled frames one after another, each as rows of 8-bit red, green, blue.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from chiasm.encoder.decode_wire import MAX_BODY_BYTES, WireError

MAX_SAMPLED_FRAMES = 2048

_TASK = struct.Struct("<QIdIII")
_HEADER = struct.Struct("<IIIddB")
_INDEX_BYTES = 4

assert _TASK.size + MAX_SAMPLED_FRAMES * _INDEX_BYTES <= MAX_BODY_BYTES


@dataclass(frozen=True, slots=True)
class VideoTask:
    """What a worker is told about a video.

    Attributes:
        max_frame_pixels: Most pixels of one frame.
        max_frames: Most frames that the file may hold.
        max_duration_s: Longest that it may run, in seconds.
        width: Expected columns of the upright frames; 0 for a probe.
        height: Expected rows of the upright frames; 0 for a probe.
        frame_indices: Frames to decode, in the order in which they are shown, ascending; a frame
            may be there more than once. Empty for a probe.
    """

    max_frame_pixels: int
    max_frames: int
    max_duration_s: float
    width: int = 0
    height: int = 0
    frame_indices: tuple[int, ...] = ()

    def pack(self) -> bytes:
        """Return the body of a request."""
        assert len(self.frame_indices) <= MAX_SAMPLED_FRAMES, "the sampling is bounded"
        fixed = _TASK.pack(
            self.max_frame_pixels,
            self.max_frames,
            self.max_duration_s,
            self.width,
            self.height,
            len(self.frame_indices),
        )
        return fixed + struct.pack(f"<{len(self.frame_indices)}I", *self.frame_indices)

    @classmethod
    def unpack(cls, body: bytes) -> VideoTask:
        """Return the task in ``body``; raise ``WireError`` if it is none."""
        if len(body) < _TASK.size:
            raise WireError("not a task about a video")
        pixels, frames, duration_s, width, height, num_indices = _TASK.unpack_from(body)
        if len(body) != _TASK.size + num_indices * _INDEX_BYTES:
            raise WireError("not a task about a video")
        indices = struct.unpack_from(f"<{num_indices}I", body, _TASK.size)
        return cls(pixels, frames, duration_s, width, height, indices)


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """What the container of a video tells.

    Attributes:
        width: Columns of a frame once it stands upright.
        height: Rows of a frame once it stands upright.
        num_frames: Frames that are really there, whatever a header says.
        fps: Frames per second on average; 0 for a list of pictures, which has no clock.
        duration_s: Seconds that it runs; 0 for a list of pictures.
        is_frame_list: Whether it is a list of pictures.
    """

    width: int
    height: int
    num_frames: int
    fps: float
    duration_s: float
    is_frame_list: bool = False

    def pack(self) -> bytes:
        """Return the body of the answer to a probe."""
        return _HEADER.pack(
            self.width,
            self.height,
            self.num_frames,
            self.fps,
            self.duration_s,
            self.is_frame_list,
        )

    @classmethod
    def unpack(cls, body: bytes) -> VideoHeader:
        """Return the header in ``body``; raise ``WireError`` if it is none."""
        if len(body) != _HEADER.size:
            raise WireError("not the header of a video")
        width, height, num_frames, fps, duration_s, is_frame_list = _HEADER.unpack(body)
        return cls(width, height, num_frames, fps, duration_s, bool(is_frame_list))
