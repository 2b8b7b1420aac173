"""Qwen2-Audio: clips are padded to windows of 30 s, of which the sound becomes tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.common.families.family import Family, PositionScheme
from chiasm.common.families.reading import UnsupportedModelError, read_int, read_section
from chiasm.common.families.sound_window import WindowPlanner
from chiasm.common.media import Modality

if TYPE_CHECKING:
    from collections.abc import Mapping


def make_audio_planner(
    config: Mapping[str, object], extractor: Mapping[str, object]
) -> WindowPlanner:
    """Return the planner of a checkpoint.

    Raises:
        UnsupportedModelError: A value is missing, or tower and feature extractor disagree.
    """
    token_id = QWEN2_AUDIO.placeholder_token_id(config, Modality.AUDIO)
    planner = WindowPlanner.read(token_id, extractor, packs_frames=False)
    num_positions = read_int(read_section(config, "audio_config"), "max_source_positions")
    if planner.window_samples != 2 * num_positions * planner.hop_length:
        raise UnsupportedModelError(
            f"The feature extractor gives windows of {planner.window_samples} samples but the tower"
            f" takes {2 * num_positions * planner.hop_length}."
        )
    return planner


QWEN2_AUDIO = Family(
    name="qwen2_audio",
    model_types=("qwen2_audio",),
    positions=PositionScheme.LINEAR,
    make_audio_planner=make_audio_planner,
)
