"""Read and decode audio files; meant for the decode workers, which may crash or be killed.

A file is told by its first bytes, never by a name, and only formats of the table are tried::

    WAV, RF64, FLAC, OGG, MP3   soundfile (libsndfile); the header tells the number of frames
    MP4 / M4A, WebM, ADTS AAC   PyAV (FFmpeg), one demuxer each; frames are counted by decoding
    FLAC, MP3 without a length  PyAV, which needs none

Sound is decoded block by block, and each block is mixed down and resampled at once, so that memory
holds one block besides the result. Channels are averaged and soxr resamples with quality
``RESAMPLER_QUALITY``, as librosa does.
"""

from __future__ import annotations

import io
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import av
import numpy as np
import soundfile
import soxr

from chiasm.encoder.decode_errors import MediaTooLargeError
from chiasm.encoder.mp3_header import is_frame, tells_length
from chiasm.encoder.wire_audio import RESAMPLER_QUALITY, AudioHeader, AudioTask

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator

    from av.container import InputContainer

    from chiasm.encoder.media_writer import MediaWriter
    from chiasm.encoder.wire_audio import AudioBounds

# Samples that are whole numbers of 32 bits fit; the square of a spectrum of larger ones would not.
MAX_AMPLITUDE = 2.0**31

_BLOCK_FRAMES = 1 << 16
_SUBTYPES = frozenset(
    {
        *("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"),
        *("IMA_ADPCM", "MS_ADPCM", "GSM610", "PCM_S8", "VORBIS", "OPUS", "MPEG_LAYER_III"),
    }
)
_CODECS = frozenset({"aac", "alac", "flac", "mp3", "opus", "vorbis"})
# By the names of decoders, of which one codec may have several.
_CONTAINER_OPTIONS = {
    "codec_whitelist": "aac,alac,flac,libopus,libvorbis,mp3,mp3float,opus,vorbis",
    "protocol_whitelist": "",
}
_SNIFFED_BYTES = 12
_UNKNOWN_LENGTH = (1 << 63) - 1
_BROKEN = (
    "Invalid or corrupted audio data. Ensure the input is a valid audio or video file"
    " (e.g. a complete WAV, MP3, or MP4)."
)


@dataclass(frozen=True, slots=True)
class _Sound:
    """An opened file; ``num_frames`` is ``None`` where only decoding tells."""

    rate: int
    num_channels: int
    num_frames: int | None
    blocks: Iterator[np.ndarray]  # each [frames, channels], float32


def probe(body: bytes, source: mmap.mmap) -> bytes:
    """Return what a file holds; sound is decoded only where no header tells its length.

    Raises:
        MediaTooLargeError: The clip is too long.
        ValueError: It is not an accepted kind of sound.
        Exception: The file is broken; libraries raise anything.
    """
    bounds = AudioTask.unpack(body).bounds
    with _open(source) as sound:
        _check_shape(sound, bounds)
        max_frames = bounds.max_frames(sound.rate, sound.num_channels)
        num_frames = sound.num_frames
        if num_frames is None:
            num_frames = _count(sound.blocks, max_frames)
        if num_frames > max_frames:
            raise MediaTooLargeError(_too_long(max_frames / sound.rate, bounds.max_duration_s))
        if num_frames <= 0:
            raise ValueError("it holds no sound")
        return AudioHeader(num_frames, sound.rate, sound.num_channels).pack()


def decode(body: bytes, source: mmap.mmap, media: MediaWriter) -> None:
    """Fill ``media`` with the one channel that a file's sound becomes.

    ``media`` has room for the resampled clip; if the resampler gives one sample less, as it does
    where the length is no whole number, the last one stays zero.

    Raises:
        ValueError: The file holds less than its header tells, or samples that are no numbers.
        Exception: The file is broken; libraries raise anything.
    """
    task = AudioTask.unpack(body)
    header = task.header
    resampler = soxr.ResampleStream(header.rate, task.rate, 1, "float32", RESAMPLER_QUALITY)
    num_frames = 0
    with _open(source) as sound:
        if (sound.rate, sound.num_channels) != (header.rate, header.num_channels):
            raise ValueError("its sampling rate or number of channels has changed")
        for block in sound.blocks:
            # What lies behind the announced frames is no part of the clip.
            mono = _mix_down(block[: header.num_frames - num_frames])
            num_frames += len(mono)
            is_last = num_frames == header.num_frames
            if header.rate != task.rate:
                mono = resampler.resample_chunk(mono, last=is_last)
            media.write(mono.tobytes()[: media.num_left])
            if is_last:
                return
    raise ValueError(f"it ends after {num_frames} of the {header.num_frames} frames it announces")


def _check_shape(sound: _Sound, bounds: AudioBounds) -> None:
    if not bounds.min_rate <= sound.rate <= bounds.max_rate:
        raise ValueError(
            f"its sampling rate of {sound.rate} Hz is not between {bounds.min_rate} and"
            f" {bounds.max_rate} Hz"
        )
    if not 1 <= sound.num_channels <= bounds.max_channels:
        raise ValueError(
            f"it has {sound.num_channels} channels, and 1 to {bounds.max_channels} are accepted"
        )


def _too_long(max_s: float, max_duration_s: int) -> str:
    if max_s < max_duration_s:
        return f"Audio exceeds the maximum of {max_s:.1f}s for its sampling rate and channels."
    return f"Audio exceeds maximum allowed duration of {max_duration_s}s."


def _count(blocks: Iterator[np.ndarray], max_frames: int) -> int:
    """Return the number of frames; one more than ``max_frames`` at most is looked at."""
    num_frames = 0
    for block in blocks:
        num_frames += len(block)
        if num_frames > max_frames:
            break
    return num_frames


def _mix_down(block: np.ndarray) -> np.ndarray:
    """Return the mean of the channels. [frames], float32."""
    with np.errstate(all="ignore"):
        mono: np.ndarray = block.mean(axis=1, dtype=np.float32)
        # NaN compares as false.
        is_sound = bool((np.abs(mono) <= MAX_AMPLITUDE).all())
    if not is_sound:
        raise ValueError("it has samples that are not finite numbers or far too loud")
    return mono


@contextmanager
def _open(source: mmap.mmap) -> Iterator[_Sound]:
    try:
        with _open_file(source) as sound:
            yield sound
    except MemoryError:
        raise
    except (soundfile.SoundFileError, av.FFmpegError) as error:
        raise ValueError(_BROKEN) from error


@contextmanager
def _open_file(source: mmap.mmap) -> Iterator[_Sound]:
    demuxer = _sniff(source)
    if demuxer is None:
        with _SequentialFile(io.BytesIO(source)) as file:
            if file.subtype not in _SUBTYPES:
                raise ValueError(f"sound coded as {file.subtype} is not accepted")
            demuxer = _find_counting_demuxer(file, source)
            if demuxer is None:
                num_frames = file.frames if file.frames < _UNKNOWN_LENGTH else None
                yield _Sound(file.samplerate, file.channels, num_frames, file.blocks())
                return
    with av.open(
        io.BytesIO(source),
        "r",
        format=demuxer,
        options=_CONTAINER_OPTIONS,
        # Titles in other encodings than UTF-8 are no fault of the sound.
        metadata_errors="ignore",
    ) as container:
        yield _open_stream(container)


def _find_counting_demuxer(file: _SequentialFile, source: mmap.mmap) -> str | None:
    """Return FFmpeg's demuxer for a file whose length libsndfile does not know, or guesses."""
    if file.format == "FLAC" and file.frames >= _UNKNOWN_LENGTH:
        return "flac"
    if file.format == "MP3" and not tells_length(source):
        return "mp3"
    return None


def _sniff(source: mmap.mmap) -> str | None:
    """Return FFmpeg's demuxer for a file; ``None`` for one that libsndfile reads."""
    start = source[:_SNIFFED_BYTES]
    if start[:4] in (b"RIFF", b"RF64") and start[8:12] == b"WAVE":
        return None
    if start.startswith((b"fLaC", b"OggS", b"ID3")):
        return None
    if start[4:8] == b"ftyp":
        return "mov"
    if start.startswith(b"\x1aE\xdf\xa3"):
        return "matroska"
    if is_frame(start):
        # Layer 0 is ADTS, the others are MP3 and its elders.
        return None if start[1] & 0x06 else "aac"
    raise ValueError("its format is not one of WAV, FLAC, OGG, MP3, M4A, WebM and AAC")


class _SequentialFile(soundfile.SoundFile):  # type: ignore[misc]  # has no types
    """A file that is read once, from its start, without the seeks between blocks.

    Where it can, ``SoundFile`` seeks behind every block that it has read; an MP3's decoder then
    lacks the bits that frames behind the seek have in those before it.
    """

    def seekable(self) -> bool:
        """Return that nobody may seek, whatever the format allows."""
        return False

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the file's sound as librosa reads it. [frames, channels] each, float32."""
        if super().seekable():
            # libsndfile drops what Opus plays before the first frame at a seek only.
            self.seek(0)
        while True:
            block: np.ndarray = self.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)
            if not len(block):
                return
            yield block


def _open_stream(container: InputContainer) -> _Sound:
    if not container.streams.audio:
        raise ValueError("No audio stream found.")
    stream = container.streams.audio[0]
    # PyAV's types do not say that there is none for a codec that it does not know.
    context: av.AudioCodecContext | None = stream.codec_context
    codec = context.codec.canonical_name if context else "something unknown"
    if context is None or codec not in _CODECS:
        raise ValueError(f"sound coded as {codec} is not accepted")
    context.thread_count = 1
    return _Sound(context.sample_rate, context.channels, None, _decode_blocks(container, stream))


def _decode_blocks(container: InputContainer, stream: av.AudioStream) -> Iterator[np.ndarray]:
    # Only the type of the samples changes; a stream that changes its rate midway is an error.
    to_float = av.AudioResampler(format="fltp")
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.InvalidDataError:
            if container.format.name != "mp3":
                raise
            # Tags, junk or damage between frames that follow each other without a container.
            # libsndfile passes over them, too.
            continue
        for frame in frames:
            for converted in to_float.resample(frame):
                yield converted.to_ndarray().T
