"""The thinker of Qwen2.5-Omni: the pictures of Qwen2.5-VL, and sound of up to 300 s beside them.

Sound is numbered as text is, one position for each token. The talker, which speaks, is not served.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.common.families.family import Family, PositionScheme
from chiasm.common.families.qwen_vl import make_grid_planner
from chiasm.common.families.sound_window import WindowPlanner
from chiasm.common.media import Modality

if TYPE_CHECKING:
    from collections.abc import Mapping


def make_audio_planner(
    config: Mapping[str, object], extractor: Mapping[str, object]
) -> WindowPlanner:
    """Return the planner of a checkpoint's clips.

    Raises:
        UnsupportedModelError: A value is missing.
    """
    token_id = QWEN2_5_OMNI.placeholder_token_id(config, Modality.AUDIO)
    return WindowPlanner.read(token_id, extractor, packs_frames=True)


QWEN2_5_OMNI = Family(
    name="qwen2_5_omni",
    model_types=("qwen2_5_omni_thinker",),
    positions=PositionScheme.MROPE,
    make_image_planner=make_grid_planner,
    make_audio_planner=make_audio_planner,
)
