"""Qwen2-Audio: a clip is padded to one length, and the sound in it becomes a token each 40 ms.

The tower takes ``hop_length`` samples as one frame and halves the frames twice. It hears one window
of ``n_samples`` only, of which the family's processor keeps the start of a longer clip without a
word; here such a clip is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.common.errors import InvalidRequestError, TooLargeError
from chiasm.common.families.family import AudioPlan, Family, PositionScheme
from chiasm.common.families.reading import UnsupportedModelError, read_int, read_section
from chiasm.common.media import MediaLayout, Modality, TokenRun

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class WindowPlanner:
    """Plans clips that are padded to one window.

    Attributes:
        token_id: Token of every position of the expansion.
        sampling_rate: Samples a second, in hertz.
        window_samples: Samples that the tower hears.
        hop_length: Samples of one frame.
    """

    token_id: int
    sampling_rate: int
    window_samples: int
    hop_length: int

    def plan(self, num_samples: int) -> AudioPlan:
        """Return the layout of a clip; see ``AudioPlanner.plan``."""
        if num_samples > self.window_samples:
            raise TooLargeError(
                "Audio exceeds maximum allowed duration of"
                f" {self.window_samples / self.sampling_rate:g}s: the model does not hear more of"
                f" a clip, and this one has {num_samples / self.sampling_rate:.2f}s. Send it as"
                " several clips."
            )
        num_tokens = self._count_tokens(num_samples)
        if num_tokens < 1:
            raise InvalidRequestError(
                f"Failed to load audio: {num_samples / self.sampling_rate:.3f}s are too short to be"
                " heard.",
                reason="INVALID_MEDIA",
            )
        layout = MediaLayout(
            runs=(TokenRun(self.token_id, num_tokens, is_embedding=True),),
            audio_lengths=(num_samples,),
        )
        return AudioPlan(layout, self.window_samples // self.hop_length // 2)

    def _count_tokens(self, num_samples: int) -> int:
        num_frames = -(-num_samples // self.hop_length)
        num_positions = (num_frames - 1) // 2 + 1
        return (num_positions - 2) // 2 + 1


def make_window_planner(
    config: Mapping[str, object], extractor: Mapping[str, object]
) -> WindowPlanner:
    """Return the planner of a checkpoint.

    Raises:
        UnsupportedModelError: A value is missing, or tower and feature extractor disagree.
    """
    window_samples, hop_length = read_int(extractor, "n_samples"), read_int(extractor, "hop_length")
    num_positions = read_int(read_section(config, "audio_config"), "max_source_positions")
    if window_samples != 2 * num_positions * hop_length:
        raise UnsupportedModelError(
            f"The feature extractor gives windows of {window_samples} samples but the tower takes"
            f" {2 * num_positions * hop_length}."
        )
    return WindowPlanner(
        token_id=QWEN2_AUDIO.placeholder_token_id(config, Modality.AUDIO),
        sampling_rate=read_int(extractor, "sampling_rate"),
        window_samples=window_samples,
        hop_length=hop_length,
    )


QWEN2_AUDIO = Family(
    name="qwen2_audio",
    model_types=("qwen2_audio",),
    positions=PositionScheme.LINEAR,
    make_audio_planner=make_window_planner,
)
