"""Define the bodies of the messages about audio clips; see ``decode_wire.py``.

A decoded clip is one channel of float32 samples without a header.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from chiasm.encoder.decode_wire import WireError

SAMPLE_BYTES = 4
RESAMPLER_QUALITY = "HQ"

_TASK = struct.Struct("<QIIIIQIII")
_HEADER = struct.Struct("<QII")


@dataclass(frozen=True, slots=True)
class AudioBounds:
    """What a clip may be, as its file stores it.

    Attributes:
        max_samples: Most samples of all channels together.
        max_duration_s: Most seconds.
        max_channels: Most channels.
        min_rate: Fewest samples of a channel a second.
        max_rate: Most samples of a channel a second.
    """

    max_samples: int
    max_duration_s: int
    max_channels: int
    min_rate: int
    max_rate: int

    def max_frames(self, rate: int, num_channels: int) -> int:
        """Return the most samples that each of the channels may have."""
        return min(self.max_duration_s * rate, self.max_samples // num_channels)

    def accepts(self, header: AudioHeader) -> bool:
        """Return whether a clip is within the bounds."""
        return (
            self.min_rate <= header.rate <= self.max_rate
            and 1 <= header.num_channels <= self.max_channels
            and 1 <= header.num_frames <= self.max_frames(header.rate, header.num_channels)
        )


@dataclass(frozen=True, slots=True)
class AudioHeader:
    """What is known of a clip before it is decoded.

    Attributes:
        num_frames: Samples of each channel.
        rate: Samples of each channel a second.
        num_channels: Channels.
    """

    num_frames: int
    rate: int
    num_channels: int

    @property
    def duration_s(self) -> float:
        """Seconds of the clip."""
        return self.num_frames / self.rate

    def pack(self) -> bytes:
        """Return the body of the answer to a probe."""
        return _HEADER.pack(self.num_frames, self.rate, self.num_channels)

    @classmethod
    def unpack(cls, body: bytes) -> AudioHeader:
        """Return the header in ``body``; raise ``WireError`` if it is none."""
        if len(body) != _HEADER.size:
            raise WireError("not the header of a clip")
        return cls(*_HEADER.unpack(body))


@dataclass(frozen=True, slots=True)
class AudioTask:
    """What a worker is told about a clip.

    Attributes:
        bounds: What is accepted.
        header: What the probe told; zeros for a probe.
        rate: Samples a second of the decoded clip; 0 for a probe.
    """

    bounds: AudioBounds
    header: AudioHeader = AudioHeader(0, 0, 0)
    rate: int = 0

    def pack(self) -> bytes:
        """Return the body of a request."""
        bounds, header = self.bounds, self.header
        return _TASK.pack(
            bounds.max_samples,
            bounds.max_duration_s,
            bounds.max_channels,
            bounds.min_rate,
            bounds.max_rate,
            header.num_frames,
            header.rate,
            header.num_channels,
            self.rate,
        )

    @classmethod
    def unpack(cls, body: bytes) -> AudioTask:
        """Return the task in ``body``; raise ``WireError`` if it is none."""
        if len(body) != _TASK.size:
            raise WireError("not a task about a clip")
        fields = _TASK.unpack(body)
        return cls(AudioBounds(*fields[:5]), AudioHeader(*fields[5:8]), fields[8])
