"""Decode a video that came as a list of pictures; runs in a decode worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.encoder.decode_errors import MediaTooLargeError
from chiasm.encoder.decode_image import read_header, write_pixels
from chiasm.encoder.frame_list import split_frames
from chiasm.encoder.wire_image import ImageTask
from chiasm.encoder.wire_video import VideoHeader

if TYPE_CHECKING:
    import mmap

    from chiasm.encoder.media_writer import MediaWriter
    from chiasm.encoder.wire_video import VideoTask

_WHITE = 0xFFFFFF


def probe_frames(task: VideoTask, source: mmap.mmap) -> VideoHeader:
    """Return the header of a list of pictures; raise if they differ in size."""
    frames = split_frames(source)
    if len(frames) > task.max_frames:
        raise MediaTooLargeError(f"Videos may have at most {task.max_frames} frames.")
    headers = {read_header(frame, task.max_frame_pixels) for frame in frames}
    if len(headers) != 1:
        raise ValueError("its frames have different sizes")
    header = headers.pop()
    return VideoHeader(header.width, header.height, len(frames), 0.0, 0.0, is_frame_list=True)


def decode_frames(task: VideoTask, source: mmap.mmap, media: MediaWriter) -> None:
    """Fill ``media`` with the pictures that ``task`` names; see ``decode_video.decode``."""
    frames = split_frames(source)
    picture = ImageTask(task.max_frame_pixels, task.width, task.height, _WHITE)
    for index in task.frame_indices:
        write_pixels(frames[index], picture, media)
