"""Make audio files in memory."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import soundfile
import soxr

# What makes LAME write frames of all sizes.
CHANGING_BIT_RATE = {"flags": "+qscale", "global_quality": "236"}

_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}


def tone(num_frames: int, num_channels: int = 1, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """Return a chord with noise, another one for each seed. [num_frames, num_channels], float32."""
    generator = np.random.default_rng(seed)
    time = np.arange(num_frames)[:, None] / rate
    pitches = generator.uniform(100, 3000, size=(3, num_channels))
    chord = np.sin(2 * np.pi * pitches[:, None] * time).sum(axis=0) / 8
    noise = 0.02 * generator.standard_normal((num_frames, num_channels))
    sound: np.ndarray = (chord + noise).astype(np.float32)
    return sound


def pitch(num_frames: int, num_channels: int = 1, rate: int = 16000) -> np.ndarray:
    """Return one pitch, for which codecs need few bits. [num_frames, num_channels], float32."""
    wave = 0.3 * np.sin(2 * np.pi * 440 / rate * np.arange(num_frames, dtype=np.float32))
    return np.repeat(wave[:, None], num_channels, axis=1).astype(np.float32)


def write(sound: np.ndarray, rate: int, kind: str = "WAV", subtype: str | None = None) -> bytes:
    """Return a file of libsndfile's format ``kind``; ``sound`` is [frames, channels]."""
    buffer = io.BytesIO()
    soundfile.write(buffer, sound, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def silence(seconds: int, num_channels: int, rate: int, kind: str, subtype: str) -> bytes:
    """Return a file of silence, which takes few bytes, without holding all of it in memory."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", rate, num_channels, format=kind, subtype=subtype) as file:
        for _ in range(seconds):
            file.write(np.zeros((rate, num_channels), np.float32))
    return buffer.getvalue()


def mux(
    sound: np.ndarray,
    rate: int,
    container: str,
    codec: str,
    *,
    video: bool = False,
    title: str = "",
    start: int = 0,
    options: dict[str, str] | None = None,
) -> bytes:
    """Return a file of FFmpeg's muxer ``container``; ``sound`` is [frames, channels], float32.

    ``options`` are the encoder's, and the file's clock is at frame ``start`` when sound begins.
    """
    buffer = io.BytesIO()
    layout = _LAYOUTS[sound.shape[1]]
    with av.open(buffer, "w", format=container) as output:
        output.metadata.update({"title": title} if title else {})
        # All streams before the first packet, which writes the header.
        stream = output.add_stream(codec, rate=rate, layout=layout, options=options)
        assert isinstance(stream, av.AudioStream)
        packets = _encode_picture(output) if video else []
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(sound.T), format="fltp", layout=layout
        )
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), start
        output.mux([*packets, *stream.encode(frame), *stream.encode(None)])
    return buffer.getvalue()


def silent_video() -> bytes:
    """Return an MP4 file with one frame and no sound."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        output.mux(_encode_picture(output))
    return buffer.getvalue()


def _encode_picture(output: av.container.OutputContainer) -> list[av.Packet[av.VideoStream]]:
    stream = output.add_stream("mpeg4", rate=10)
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 99, np.uint8), format="rgb24")
    picture.time_base, picture.pts = Fraction(1, 10), 0
    return [*stream.encode(picture), *stream.encode(None)]


def with_flac_length(data: bytes, num_frames: int) -> bytes:
    """Return a FLAC file whose header announces ``num_frames``; 0 says that it is unknown."""
    fields = int.from_bytes(data[18:26], "big")
    return data[:18] + (fields >> 36 << 36 | num_frames).to_bytes(8, "big") + data[26:]


def without_length(mp3: bytes) -> bytes:
    """Return an MP3 without its first frame, in which the encoder tells how many there are."""
    buffer = io.BytesIO()
    with (
        av.open(io.BytesIO(mp3), "r") as source,
        av.open(buffer, "w", format="mp3", container_options={"write_xing": "0"}) as output,
    ):
        stream = output.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.size:
                packet.stream = stream
                output.mux(packet)
    return buffer.getvalue()


def with_mp3_length(mp3: bytes, num_frames: int) -> bytes:
    """Return an MP3 whose header announces ``num_frames`` frames of MPEG audio."""
    at = mp3.index(b"Xing") + 8
    return mp3[:at] + num_frames.to_bytes(4, "big") + mp3[at + 4 :]


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """Return the largest correlation of two clips, however they are shifted. 1 for equal ones."""
    spectrum = np.fft.rfft(one, 2 * len(one)) * np.conj(np.fft.rfft(other, 2 * len(one)))
    return float(np.fft.irfft(spectrum).max() / np.linalg.norm(one) / np.linalg.norm(other))


def reference(data: bytes, rate: int) -> np.ndarray:
    """Return a file as librosa loads it: soundfile, mean of channels, soxr, fixed length."""
    sound, file_rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    mono = sound.mean(axis=1)
    resampled = soxr.resample(mono, file_rate, rate, "HQ")
    num_samples = int(np.ceil(len(mono) * rate / file_rate))
    return np.pad(resampled, (0, max(0, num_samples - len(resampled))))[:num_samples]
