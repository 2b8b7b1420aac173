"""Make small video files for tests, in every container, codec and state of damage."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

import av
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class VideoKind:
    """How a video is written.

    Attributes:
        codec: Encoder of FFmpeg.
        container: Format of FFmpeg.
        pixel_format: What the codec stores.
        options: Options of the encoder.
    """

    codec: str = "mpeg4"
    container: str = "mp4"
    pixel_format: str = "yuv420p"
    options: dict[str, str] = field(default_factory=dict)


# NOTE: with its defaults x265 writes behind its buffers when frames are this small.
_X265_PARAMS = (
    "log-level=none:pools=none:frame-threads=1:wpp=0:aq-mode=0:cutree=0:weightp=0:bframes=2"
)

H264 = VideoKind("libx264", options={"g": "8", "bf": "2", "x264-params": "log-level=none"})
MPEG4 = VideoKind()
KINDS = {
    "h264 in mp4": H264,
    "h264 with open groups": VideoKind(
        "libx264",
        options={"g": "6", "bf": "3", "x264-params": "open-gop=1:scenecut=0:log-level=none"},
    ),
    "hevc in mp4": VideoKind("libx265", options={"g": "7", "x265-params": _X265_PARAMS}),
    "vp8 in webm": VideoKind("libvpx", "webm", options={"g": "9", "auto-alt-ref": "1"}),
    "vp9 in webm": VideoKind("libvpx-vp9", "webm", options={"g": "9"}),
    "h264 in matroska": VideoKind("libx264", "matroska", options=H264.options),
    "mpeg4 in mp4": MPEG4,
    "h264 in avi": VideoKind("libx264", "avi", options=H264.options),
    "mpeg4 in avi": VideoKind("mpeg4", "avi", options={"g": "5", "bf": "2"}),
    "mjpeg in avi": VideoKind("mjpeg", "avi", "yuvj420p"),
    "mjpeg in mov": VideoKind("mjpeg", "mov", "yuvj420p"),
}


def moving_square(num_frames: int, width: int, height: int, seed: int = 0) -> np.ndarray:
    """Return frames that all differ. [num_frames, height, width, 3], uint8."""
    rng = np.random.default_rng(seed)
    background = rng.integers(0, 200, (height, width, 3), dtype=np.uint8)
    frames = np.repeat(background[None], num_frames, axis=0)
    side = max(2, min(width, height) // 3)
    for number, frame in enumerate(frames):
        top = number * 3 % max(1, height - side)
        left = number * 5 % max(1, width - side)
        frame[top : top + side, left : left + side] = (255, number * 7 % 256, 0)
    return frames


def write_video(
    frames: np.ndarray,
    kind: VideoKind = MPEG4,
    rate: int = 10,
    times: Sequence[int] | None = None,
    rotation: int = 0,
    sound_only: bool = False,
    key: str = "",
) -> bytes:
    """Return the file of a video.

    Args:
        frames: [num_frames, height, width, 3], uint8.
        kind: How it is written.
        rate: Frames per second.
        times: Time of every frame in units of ``1 / rate``; ``None``: one after another.
        rotation: Degrees by which a player turns the frames.
        sound_only: Write silence instead of the frames.
        key: Key of Common Encryption, 32 hexadecimal digits; empty: none.
    """
    buffer = io.BytesIO()
    if sound_only:
        return _write_silence(buffer, kind.container)
    cipher = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": key, "encryption_kid": key}
    options = cipher if key else {}
    with av.open(buffer, "w", format=kind.container, container_options=options) as container:
        stream = container.add_stream(kind.codec, rate=rate, options=kind.options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = kind.pixel_format
        if rotation:
            stream.set_display_rotation(rotation)
        container.start_encoding()
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number if times is None else times[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def still_video(num_frames: int, side: int, rate: int = 25) -> bytes:
    """Return an MP4 in which nothing moves; quick to write and small, however long it is.

    Decoding can start at its first frame alone: all others repeat the one packet that says that
    nothing has changed.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate, options={"g": "600"})
        assert isinstance(stream, av.VideoStream)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        picture = av.VideoFrame.from_ndarray(np.zeros((side, side, 3), np.uint8), "rgb24")
        first, second = (packet for _ in range(2) for packet in stream.encode(picture))
        for number in range(num_frames):
            packet = av.Packet(bytes(second if number else first))
            packet.stream = stream
            packet.pts = packet.dts = number
            packet.time_base = Fraction(1, rate)
            packet.is_keyframe = number == 0
            container.mux(packet)
    return buffer.getvalue()


def jpeg_video(jpegs: Sequence[bytes], width: int, height: int, rate: int = 10) -> bytes:
    """Return a QuickTime file whose frames are JPEG files as they are."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mov") as container:
        stream = container.add_stream("mjpeg", rate=rate)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuvj420p"
        for number, jpeg in enumerate(jpegs):
            packet = av.Packet(jpeg)
            packet.stream = stream
            packet.pts = packet.dts = number
            packet.time_base = Fraction(1, rate)
            packet.is_keyframe = True
            container.mux(packet)
    return buffer.getvalue()


def read_video(data: bytes) -> np.ndarray:
    """Return all frames of a video, decoded from its start. [num_frames, height, width, 3]."""
    with av.open(io.BytesIO(data), "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def with_bytes_at(data: bytes, offset: int, new: bytes) -> bytes:
    """Return ``data`` with the bytes from ``offset`` on replaced by ``new``."""
    return data[:offset] + new + data[offset + len(new) :]


def with_display_matrix(mp4: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """Return an MP4 that is shown through a matrix: of a pixel's ``x``, then of its ``y``."""
    x_to_x, x_to_y, y_to_x, y_to_y = (number << 16 for number in matrix)
    numbers = struct.pack(">9i", x_to_x, x_to_y, 0, y_to_x, y_to_y, 0, 0, 0, 1 << 30)
    # Behind the box's name, version, times, numbers and volume.
    return with_bytes_at(mp4, mp4.index(b"tkhd\0") + 44, numbers)


def _write_silence(buffer: io.BytesIO, container_format: str) -> bytes:
    with av.open(buffer, "w", format=container_format) as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()
