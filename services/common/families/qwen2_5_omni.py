"""The thinker of Qwen2.5-Omni: pictures and videos as Qwen2.5-VL has them, and sound beside them.

Sound is numbered as text is, one position for each token, 25 a second. So are the patches of
videos, and text behind a video goes on behind its last second. The sound in a video is not heard;
send it as a clip. The talker, which speaks, is not served.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from chiasm.common.families.family import Family, PositionScheme
from chiasm.common.families.qwen_vl import (
    GridVideoPlanner,
    make_grid_planner,
    make_grid_video_planner,
    read_merge_size,
)
from chiasm.common.families.reading import read_int
from chiasm.common.families.sound_window import WindowPlanner
from chiasm.common.media import Modality

if TYPE_CHECKING:
    from collections.abc import Mapping

# The family's processor has it in its code, over what the configuration of a checkpoint says.
_VIDEO_SIZE = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}


def make_video_planner(
    config: Mapping[str, object], preprocessor: Mapping[str, object]
) -> GridVideoPlanner:
    """Return the planner of a checkpoint's videos.

    Raises:
        UnsupportedModelError: A value is missing, or tower and processor disagree.
    """
    planner = make_grid_video_planner(config, {**preprocessor, "size": _VIDEO_SIZE})
    return replace(planner, tells_bounds=True)


def make_audio_planner(
    config: Mapping[str, object], extractor: Mapping[str, object]
) -> WindowPlanner:
    """Return the planner of a checkpoint's clips.

    Raises:
        UnsupportedModelError: A value is missing.
    """
    token_id = QWEN2_5_OMNI.placeholder_token_id(config, Modality.AUDIO)
    return WindowPlanner.read(token_id, extractor, packs_frames=True)


def read_positions_per_s(config: Mapping[str, object]) -> float:
    """Return how many time positions a second takes."""
    return float(read_int(config, "position_id_per_seconds"))


QWEN2_5_OMNI = Family(
    name="qwen2_5_omni",
    model_types=("qwen2_5_omni_thinker",),
    positions=PositionScheme.TMROPE,
    make_image_planner=make_grid_planner,
    make_video_planner=make_video_planner,
    make_audio_planner=make_audio_planner,
    read_positions_per_s=read_positions_per_s,
    read_merge_size=read_merge_size,
)
