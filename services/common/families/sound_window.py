"""Plan clips for towers in the manner of Whisper: a window of sound, a token each 40 ms.

The feature extractor makes a frame of ``hop_length`` samples, the tower halves the frames twice. It
hears one window only. Processors keep the start of a longer clip without a word; here such a clip
is refused, because nobody would learn that the rest was not heard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.common.errors import InvalidRequestError, TooLargeError
from chiasm.common.families.family import AudioPlan
from chiasm.common.families.reading import read_int
from chiasm.common.media import MediaLayout, TokenRun

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class WindowPlanner:
    """Plans clips that fit into one window.

    Attributes:
        token_id: Token of every position of the expansion.
        sampling_rate: Samples a second, in hertz.
        window_samples: Samples that the tower hears at most.
        hop_length: Samples of one frame.
        fft_samples: Samples that a frame is computed from.
        packs_frames: Whether the tower takes the frames of clips one behind the other; otherwise
            it takes whole windows.
    """

    token_id: int
    sampling_rate: int
    window_samples: int
    hop_length: int
    fft_samples: int
    packs_frames: bool

    @classmethod
    def read(
        cls, token_id: int, extractor: Mapping[str, object], *, packs_frames: bool
    ) -> WindowPlanner:
        """Return the planner for a feature extractor's attributes.

        Raises:
            UnsupportedModelError: A value is missing.
        """
        return cls(
            token_id=token_id,
            sampling_rate=read_int(extractor, "sampling_rate"),
            window_samples=read_int(extractor, "n_samples"),
            hop_length=read_int(extractor, "hop_length"),
            fft_samples=read_int(extractor, "n_fft"),
            packs_frames=packs_frames,
        )

    def plan(self, num_samples: int) -> AudioPlan:
        """Return the layout of a clip; see ``AudioPlanner.plan``."""
        if num_samples > self.window_samples:
            raise TooLargeError(
                "Audio exceeds maximum allowed duration of"
                f" {self.window_samples / self.sampling_rate:g}s: the model does not hear more of"
                f" a clip, and this one has {num_samples / self.sampling_rate:.2f}s. Send it as"
                " several clips."
            )
        num_frames = -(-num_samples // self.hop_length)
        num_tokens = ((num_frames - 1) // 2 + 1 - 2) // 2 + 1
        if num_tokens < 1:
            raise InvalidRequestError(
                f"Failed to load audio: {num_samples / self.sampling_rate:.3f}s are too short to be"
                " heard.",
                reason="INVALID_MEDIA",
            )
        layout = MediaLayout(
            runs=(TokenRun(self.token_id, num_tokens, is_embedding=True),),
            audio_lengths=(num_frames,),
        )
        num_computed = num_samples if self.packs_frames else self.window_samples
        return AudioPlan(layout, -(-num_computed // self.hop_length // 2))

    def padded_length(self, num_samples: int) -> int:
        """Return the samples to which a clip is padded; see ``AudioPlanner.padded_length``."""
        if not self.packs_frames:
            return self.window_samples
        # No frame of the clip itself reaches behind this.
        num_frames = -(-(num_samples + self.fft_samples) // self.hop_length)
        return min(self.window_samples, num_frames * self.hop_length)
