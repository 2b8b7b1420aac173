"""Qwen3-VL: pictures as of Qwen2-VL, but a video is written out patch by patch with its times.

Before each temporal patch stands the time of its middle, as text. The bounds of a video's area hold
for all its frames together. The tower gives, besides the spliced rows, rows of some of its layers
that are added behind the first layers of the language model (deepstack).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chiasm.common.families.family import (
    Family,
    PositionScheme,
    VisualPlan,
    check_aspect_ratio,
)
from chiasm.common.families.qwen_vl import (
    AreaBounds,
    make_grid_planner,
    read_bounds,
    read_merge_size,
)
from chiasm.common.families.reading import UnsupportedModelError, read_int, read_section
from chiasm.common.media import MediaLayout, Modality, PatchGrid, ProcessingOptions, TokenRun

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chiasm.common.families.family import SampledVideo

# Of the reference implementation: no frame is made smaller than this much of the smallest area.
_LEAST_SHARE = 1.05


def smart_resize_video(
    video: SampledVideo, frames_per_patch: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Return the ``(height, width)`` to which the processor resizes the frames of a video.

    Args:
        video: The sampled frames.
        frames_per_patch: Frames of one temporal patch.
        factor: Pixels of which both results are multiples.
        min_pixels: Area of all frames below which they are enlarged.
        max_pixels: Area of all frames above which they are reduced.

    Source: ``Qwen3VLVideoProcessor`` of transformers.
    """
    num_frames, height, width = video.num_frames, video.height, video.width
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    area = round(num_frames / frames_per_patch) * frames_per_patch * rows * columns
    if area > max_pixels:
        scale = math.sqrt((num_frames * height * width) / max_pixels)
        rows = max(factor, math.floor(height / scale / factor) * factor)
        columns = max(factor, math.floor(width / scale / factor) * factor)
    elif area < min_pixels:
        scale = math.sqrt(min_pixels / (num_frames * height * width))
        rows = math.ceil(height * scale / factor) * factor
        columns = math.ceil(width * scale / factor) * factor
    return rows, columns


@dataclass(frozen=True, slots=True)
class TimedVideoPlanner:
    """Plans videos as temporal patches between texts that tell their times.

    Attributes:
        token_id: Token of every position that takes a row.
        start_token_id: Token before the rows of a temporal patch.
        end_token_id: Token behind them.
        bounds: How frames are resized and cut; areas are of all frames together.
        frames_per_patch: Frames of one temporal patch; the last frame is repeated to fill one.
        max_frame_pixels: Area of one frame over which frames are made smaller; 0: none.
    """

    token_id: int
    start_token_id: int
    end_token_id: int
    bounds: AreaBounds
    frames_per_patch: int
    max_frame_pixels: int

    def plan(self, video: SampledVideo, options: ProcessingOptions) -> VisualPlan:
        """Return the grid and the pieces of a video; see ``VideoPlanner.plan``."""
        check_aspect_ratio(video.height, video.width, Modality.VIDEO)
        bounds = self._share(self.bounds.clamp(options), video.num_frames)
        factor = bounds.patch_size * bounds.merge_size
        rows, columns = smart_resize_video(
            video, self.frames_per_patch, factor, bounds.min_pixels, bounds.max_pixels
        )
        times = self._patch_times(video)
        num_tokens = (rows // factor) * (columns // factor)
        pieces: list[str | TokenRun] = []
        for time_s in times:
            pieces += [
                f"<{time_s:.1f} seconds>",
                TokenRun(self.start_token_id, 1, is_embedding=False),
                TokenRun(self.token_id, num_tokens, is_embedding=True),
                TokenRun(self.end_token_id, 1, is_embedding=False),
            ]
        layout = MediaLayout(
            runs=tuple(piece for piece in pieces if isinstance(piece, TokenRun)),
            grid=PatchGrid(len(times), rows // bounds.patch_size, columns // bounds.patch_size),
            spatial_merge_size=bounds.merge_size,
            timestamps_s=times,
        )
        num_pixels = len(times) * self.frames_per_patch * rows * columns
        return VisualPlan(layout, num_pixels, tuple(pieces))

    def processor_size(self, options: ProcessingOptions) -> Mapping[str, int] | None:
        """Return the area bounds under the processor's names; ``None`` without wishes."""
        return self.bounds.processor_size(options)

    def _share(self, bounds: AreaBounds, num_frames: int) -> AreaBounds:
        """Return the bounds of all frames where each alone is bounded, too."""
        if not self.max_frame_pixels:
            return bounds
        frame = min(self.max_frame_pixels, bounds.max_pixels // num_frames)
        frame = max(frame, int(bounds.min_pixels * _LEAST_SHARE))
        return replace(bounds, max_pixels=frame * num_frames)

    def _patch_times(self, video: SampledVideo) -> tuple[float, ...]:
        """Return the middle between the first and the last frame of every patch, in seconds."""
        size = self.frames_per_patch
        times = video.times_s + video.times_s[-1:] * (-len(video.times_s) % size)
        return tuple(
            (times[first] + times[first + size - 1]) / 2 for first in range(0, len(times), size)
        )


def make_timed_video_planner(
    config: Mapping[str, object], preprocessor: Mapping[str, object]
) -> TimedVideoPlanner:
    """Return the planner of a checkpoint's videos.

    Raises:
        UnsupportedModelError: A value is missing, or tower and processor disagree.
    """
    bounds = read_bounds(config, preprocessor)
    max_frame_pixels = 0
    if preprocessor.get("cap_pixels_per_frame"):
        token_side = bounds.patch_size * bounds.merge_size
        max_frame_pixels = read_int(preprocessor, "max_video_tokens") * token_side**2
    return TimedVideoPlanner(
        token_id=QWEN3_VL.placeholder_token_id(config, Modality.VIDEO),
        start_token_id=read_int(config, "vision_start_token_id"),
        end_token_id=read_int(config, "vision_end_token_id"),
        bounds=bounds,
        frames_per_patch=read_int(preprocessor, "temporal_patch_size"),
        max_frame_pixels=max_frame_pixels,
    )


def count_deepstack_levels(config: Mapping[str, object]) -> int:
    """Return how many layers of the tower give rows that are added.

    Raises:
        UnsupportedModelError: The configuration does not tell.
    """
    indexes = read_section(config, "vision_config").get("deepstack_visual_indexes")
    if not isinstance(indexes, list | tuple):
        raise UnsupportedModelError(
            "The model configuration has no list 'deepstack_visual_indexes'."
        )
    return len(indexes)


QWEN3_VL = Family(
    name="qwen3_vl",
    model_types=("qwen3_vl",),
    positions=PositionScheme.MROPE,
    make_image_planner=make_grid_planner,
    make_video_planner=make_timed_video_planner,
    read_merge_size=read_merge_size,
    count_deepstack_levels=count_deepstack_levels,
)
