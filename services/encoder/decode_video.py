"""Decode the sampled frames of a video with PyAV; runs in a decode worker.

A probe reads the container's packets but decodes no more than the first frame, which tells how the
picture is turned. Frames are numbered as they are shown, by the times of their packets, so that
index ``i`` is the ``i``-th picture that a decoder gives from the start. To reach a frame, decoding
starts at the last key frame before it.
"""

from __future__ import annotations

import bisect
import io
import math
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import av
import av.error
import av.logging
from av.sidedata.sidedata import SideDataContainer, Type
from av.stream import Disposition
from PIL import Image

from chiasm.encoder.decode_errors import MediaTooLargeError
from chiasm.encoder.decode_frames import decode_frames, probe_frames
from chiasm.encoder.frame_list import is_frame_list
from chiasm.encoder.wire_image import MAX_SIDE
from chiasm.encoder.wire_video import VideoHeader, VideoTask

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator

    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    from chiasm.encoder.media_writer import MediaWriter

CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg")

# The demuxers that have one of these names; FFmpeg refuses all others, playlists among them.
_DEMUXERS = "mov,mp4,matroska,webm,avi"
_DECODERS = "h264,hevc,vp8,libvpx,vp9,libvpx-vp9,av1,libdav1d,mpeg4,mjpeg"
_OPTIONS = {
    "format_whitelist": _DEMUXERS,
    "codec_whitelist": _DECODERS,
    # No protocol has this name: a container can open nothing but the bytes that it came in.
    "protocol_whitelist": "none",
}
_DEFAULT_FPS = 24.0
_MATRIX = struct.Struct("=9i")
# What makes a frame upright, by whether it is upside down and how far it then turns to the left.
_TRANSPOSES = {
    (False, 90): Image.Transpose.ROTATE_90,
    (False, 180): Image.Transpose.ROTATE_180,
    (False, 270): Image.Transpose.ROTATE_270,
    (True, 0): Image.Transpose.FLIP_TOP_BOTTOM,
    (True, 90): Image.Transpose.TRANSVERSE,
    (True, 180): Image.Transpose.FLIP_LEFT_RIGHT,
    (True, 270): Image.Transpose.TRANSPOSE,
}


@dataclass(frozen=True, slots=True)
class _Packets:
    """When the frames of a stream are shown, in units of its time base.

    Attributes:
        times: Time of every frame, ascending; empty if the container does not tell times.
        key_times: Times of the frames at which decoding can start, ascending.
        num_frames: Frames of the stream.
    """

    times: list[int]
    key_times: list[int]
    num_frames: int


def probe(body: bytes, source: mmap.mmap) -> bytes:
    """Return the header of a video.

    Args:
        body: A ``VideoTask`` with the limits.
        source: The file.

    Returns:
        A ``VideoHeader``.

    Raises:
        MediaTooLargeError: It has too many pixels or frames, or runs too long.
        ValueError: It is not a video that is accepted.
        Exception: FFmpeg cannot read it; of any class.
    """
    task = VideoTask.unpack(body)
    if is_frame_list(source):
        return probe_frames(task, source).pack()
    with _open(source) as container:
        stream = _find_stream(container)
        _check_size(stream.codec_context.width, stream.codec_context.height, task)
        packets = _read_packets(container, stream, task.max_frames)
        fps = _frame_rate(stream, packets)
        duration_s = _check_duration(stream, packets, fps, task.max_duration_s)
        container.seek(0)
        first = next(container.decode(stream), None)
        if first is None:
            raise ValueError("it has no frames")
        width, height = _upright_size(first)
        _check_size(width, height, task)
    return VideoHeader(width, height, packets.num_frames, fps, duration_s).pack()


def decode(body: bytes, source: mmap.mmap, media: MediaWriter) -> None:
    """Decode the frames of a video that was probed.

    Args:
        body: A ``VideoTask`` with the size that the probe told and the frames that are wanted.
        source: The file.
        media: Takes the frames. [num_frames, height, width, 3], uint8.

    Raises:
        ValueError: The frames do not have that size, or are not there.
        Exception: FFmpeg cannot decode it; of any class.
    """
    task = VideoTask.unpack(body)
    if is_frame_list(source):
        decode_frames(task, source, media)
        return
    with _open(source) as container:
        stream = _find_stream(container)
        packets = _read_packets(container, stream, task.max_frames)
        frames = _select(container, stream, packets, task.frame_indices)
        for frame in frames:
            if _upright_size(frame) != (task.width, task.height):
                raise ValueError("the size of the frames changes")
            media.write(_upright_pixels(frame))


@contextmanager
def _open(source: mmap.mmap) -> Iterator[InputContainer]:
    """Yield the container; FFmpeg's errors, whose texts name objects, become ``ValueError``."""
    av.logging.set_level(None)
    try:
        container = av.open(io.BytesIO(source), "r", options=_OPTIONS)
    except av.error.FFmpegError:
        raise ValueError(
            "it is no MP4, QuickTime, WebM, Matroska or AVI file, or is cut off"
        ) from None
    with container:
        try:
            yield container
        except av.error.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            raise ValueError("it is damaged") from None


def _find_stream(container: InputContainer) -> VideoStream:
    for stream in container.streams.video:
        if stream.disposition & Disposition.attached_pic:
            continue  # the cover of an audio file
        codec = stream.codec_context.codec.canonical_name
        if codec not in CODECS:
            raise ValueError(f"the video codec {codec} is not accepted; use one of {_names()}")
        # One worker is one core; frames are decoded in the order of their packets.
        stream.codec_context.thread_count = 1
        return stream
    raise ValueError("it has no video stream")


def _names() -> str:
    return ", ".join(CODECS)


def _check_size(width: int, height: int, task: VideoTask) -> None:
    if not width or not height:
        raise ValueError("it does not tell the size of its frames")
    if max(width, height) > MAX_SIDE or width * height > task.max_frame_pixels:
        raise MediaTooLargeError(
            f"Video frames of {width}x{height} pixels exceed the maximum of"
            f" {task.max_frame_pixels} pixels or {MAX_SIDE} pixels a side."
        )


def _read_packets(container: InputContainer, stream: VideoStream, max_frames: int) -> _Packets:
    times: list[int] = []
    key_times: list[int] = []
    num_frames = 0
    for packet in container.demux(stream):
        if not packet.size or packet.is_discard:
            continue
        if packet.is_corrupt:
            raise ValueError("it is cut off or damaged")
        num_frames += 1
        if num_frames > max_frames:
            raise MediaTooLargeError(f"Videos may have at most {max_frames} frames.")
        if packet.pts is not None:
            times.append(packet.pts)
            if packet.is_keyframe:
                key_times.append(packet.pts)
    if not num_frames:
        raise ValueError("it has no frames")
    # AVI tells no times: FFmpeg makes them up in the order of packets, in which frames that
    # refer to later ones are not shown.
    has_times = container.format.name != "avi" and len(set(times)) == num_frames
    if not has_times:
        return _Packets([], [], num_frames)
    return _Packets(sorted(times), sorted(key_times), num_frames)


def _frame_rate(stream: VideoStream, packets: _Packets) -> float:
    rate = float(stream.average_rate or 0)
    if math.isfinite(rate) and rate > 0:
        return rate
    span_s = _span_s(stream, packets)
    return (packets.num_frames - 1) / span_s if span_s > 0 else _DEFAULT_FPS


def _check_duration(
    stream: VideoStream, packets: _Packets, fps: float, max_duration_s: float
) -> float:
    duration_s = max(packets.num_frames / fps, _span_s(stream, packets))
    if duration_s > max_duration_s:
        raise MediaTooLargeError(
            f"A video of {duration_s:.0f} seconds exceeds the maximum of {max_duration_s:g} s."
        )
    return duration_s


def _span_s(stream: VideoStream, packets: _Packets) -> float:
    if not packets.times or stream.time_base is None:
        return 0.0
    return float((packets.times[-1] - packets.times[0]) * stream.time_base)


def _select(
    container: InputContainer, stream: VideoStream, packets: _Packets, indices: tuple[int, ...]
) -> Iterator[VideoFrame]:
    """Yield the frame of every index; a frame once more for each time that its index is there."""
    if any(index >= packets.num_frames for index in indices):
        raise ValueError("the number of frames has changed")
    if packets.times:
        yield from _select_by_time(container, stream, packets, indices)
    else:
        yield from _select_by_count(container, stream, indices)


def _select_by_count(
    container: InputContainer, stream: VideoStream, indices: tuple[int, ...]
) -> Iterator[VideoFrame]:
    container.seek(0)
    frames = enumerate(container.decode(stream))
    number, frame = -1, None
    for index in indices:
        while number < index:
            try:
                number, frame = next(frames)
            except StopIteration:
                raise ValueError("it has fewer frames than packets") from None
        assert frame is not None, "index is at least 0"
        yield frame


def _select_by_time(
    container: InputContainer, stream: VideoStream, packets: _Packets, indices: tuple[int, ...]
) -> Iterator[VideoFrame]:
    frames: Iterator[VideoFrame] = iter(())
    frame: VideoFrame | None = None
    reached: float = -math.inf  # time of `frame`; nothing is decoded before the first seek
    for index in indices:
        wanted = packets.times[index]
        key_time = _last_key_time(packets, wanted)
        if key_time > reached and wanted > reached:
            frames = _decode_from(container, stream, key_time)
        while reached < wanted:
            frame = next(frames, None)
            if frame is None or frame.pts is None:
                raise ValueError("a frame cannot be decoded")
            reached = frame.pts
        assert frame is not None, "something was decoded to get here"
        yield frame


def _decode_from(
    container: InputContainer, stream: VideoStream, key_time: int
) -> Iterator[VideoFrame]:
    """Yield the frames from the key frame at ``key_time`` on, maybe some before it."""
    container.seek(key_time, stream=stream)
    frames = container.decode(stream)
    first = next(frames, None)
    if first is None or first.pts is None or first.pts > key_time:
        # Seeking goes by decoding times, which may lead behind a key frame that is shown late.
        container.seek(0)
        frames = container.decode(stream)
    else:
        yield first
    yield from frames


def _last_key_time(packets: _Packets, wanted: int) -> int:
    """Return the time of the last key frame up to ``wanted``; of the first frame if none is."""
    number = bisect.bisect_right(packets.key_times, wanted)
    return packets.key_times[number - 1] if number else packets.times[0]


def _turn(frame: VideoFrame) -> int:
    return round(frame.rotation / 90) * 90 % 360


def _is_mirrored(frame: VideoFrame) -> bool:
    """Return whether the frame's matrix, which may also turn it, has a negative determinant."""
    # NOTE: not `frame.side_data`, which keeps the frame until the garbage collector runs.
    try:
        side_data = SideDataContainer(frame)  # type: ignore[call-arg]  # missing in PyAV's types
    except ValueError:
        return False  # there is a kind of side data that PyAV does not know
    matrix = next((data for data in side_data if data.type == Type.DISPLAYMATRIX), None)
    if matrix is None:
        return False
    x_to_x, x_to_y, _, y_to_x, y_to_y, *_ = _MATRIX.unpack(bytes(matrix))
    return bool(x_to_x * y_to_y < x_to_y * y_to_x)


def _upright_size(frame: VideoFrame) -> tuple[int, int]:
    is_turned = _turn(frame) in (90, 270)
    return (frame.height, frame.width) if is_turned else (frame.width, frame.height)


def _upright_pixels(frame: VideoFrame) -> bytes:
    picture: Image.Image = frame.to_image()  # type: ignore[no-untyped-call]  # PyAV's own
    transpose = _TRANSPOSES.get((_is_mirrored(frame), _turn(frame)))
    return (picture if transpose is None else picture.transpose(transpose)).tobytes()
