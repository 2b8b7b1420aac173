"""Qwen2-VL and Qwen2.5-VL: pictures keep their aspect ratio and become a grid of merged patches.

A picture is resized so that both sides are multiples of ``patch_size * merge_size`` and its area
lies between two bounds; every ``merge_size ** 2`` patches make one token. The frames of a video are
resized alike, and patches reach over two frames. Qwen2.5-VL numbers time by the clock.
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
from chiasm.common.families.reading import UnsupportedModelError, read_int, read_section
from chiasm.common.media import MediaLayout, Modality, PatchGrid, ProcessingOptions, TokenRun

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chiasm.common.families.family import SampledVideo

# Of the reference implementation: a video may fill this much of the context, and no frame is made
# smaller than this much of the smallest area.
_SHARE_OF_CONTEXT = 0.9
_LEAST_SHARE = 1.05


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Return the ``(height, width)`` to which the processor resizes an image.

    Args:
        height: Rows of pixels, at least 1.
        width: Columns of pixels, at least 1; the ratio of the sides is at most 200.
        factor: Pixels of which both results are multiples.
        min_pixels: Area below which the image is enlarged.
        max_pixels: Area above which the image is reduced.

    Source: ``Qwen2VLImageProcessor`` of transformers.
    """
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        scale = math.sqrt((height * width) / max_pixels)
        rows = max(factor, math.floor(height / scale / factor) * factor)
        columns = max(factor, math.floor(width / scale / factor) * factor)
    elif rows * columns < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * scale / factor) * factor
        columns = math.ceil(width * scale / factor) * factor
    return rows, columns


@dataclass(frozen=True, slots=True)
class AreaBounds:
    """How pictures are resized and cut.

    Attributes:
        patch_size: Side of a patch, in pixels.
        merge_size: Patches per token along each side.
        min_pixels: The checkpoint's smallest area.
        max_pixels: The checkpoint's largest area; clients may only lower it.
    """

    patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int

    def clamp(self, options: ProcessingOptions) -> AreaBounds:
        """Return the bounds that hold for a client with these wishes."""
        if options.min_pixels is None and options.max_pixels is None:
            return self
        least = (self.patch_size * self.merge_size) ** 2
        wished_high = self.max_pixels if options.max_pixels is None else options.max_pixels
        wished_low = self.min_pixels if options.min_pixels is None else options.min_pixels
        high = max(least, min(wished_high, self.max_pixels))
        return replace(self, min_pixels=max(least, min(wished_low, high)), max_pixels=high)

    def processor_size(self, options: ProcessingOptions) -> Mapping[str, int] | None:
        """Return the bounds under the processor's names; ``None`` without wishes."""
        if options.min_pixels is None and options.max_pixels is None:
            return None
        return self.clamp(options).as_size()

    def as_size(self) -> Mapping[str, int]:
        """Return the bounds under the processor's names."""
        return {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}

    def resize(self, height: int, width: int) -> tuple[int, int]:
        """Return the ``(height, width)`` to which a picture is resized."""
        factor = self.patch_size * self.merge_size
        return smart_resize(height, width, factor, self.min_pixels, self.max_pixels)

    def lay_out(self, token_id: int, num_patches: int, rows: int, columns: int) -> MediaLayout:
        """Return the layout of ``num_patches`` temporal patches of a resized size."""
        grid = PatchGrid(num_patches, rows // self.patch_size, columns // self.patch_size)
        num_tokens = grid.t * grid.h * grid.w // self.merge_size**2
        return MediaLayout(
            runs=(TokenRun(token_id, num_tokens, is_embedding=True),),
            grid=grid,
            spatial_merge_size=self.merge_size,
        )


@dataclass(frozen=True, slots=True)
class GridPlanner:
    """Plans images as one temporal patch of a grid.

    Attributes:
        token_id: Token of every position of the expansion.
        bounds: How images are resized.
    """

    token_id: int
    bounds: AreaBounds

    def plan(self, height: int, width: int, options: ProcessingOptions) -> VisualPlan:
        """Return the grid of an image; see ``ImagePlanner.plan``."""
        check_aspect_ratio(height, width, Modality.IMAGE)
        rows, columns = self.bounds.clamp(options).resize(height, width)
        return VisualPlan(self.bounds.lay_out(self.token_id, 1, rows, columns), rows * columns)

    def processor_arguments(
        self, height: int, width: int, options: ProcessingOptions
    ) -> Mapping[str, object]:
        """Return the area bounds under the processor's names, where the client has wishes."""
        size = self.bounds.processor_size(options)
        return {} if size is None else {"size": dict(size)}


@dataclass(frozen=True, slots=True)
class GridVideoPlanner:
    """Plans videos as a grid whose temporal patches reach over several frames.

    Attributes:
        token_id: Token of every position of the expansion.
        bounds: How frames are resized.
        frames_per_patch: Frames of one temporal patch; the last frame is repeated to fill one.
        max_total_pixels: Area of all resized frames over which frames are made smaller; 0: none.
        tells_bounds: Whether the processor is told the bounds also where the client has no wish,
            because its own are others.
    """

    token_id: int
    bounds: AreaBounds
    frames_per_patch: int
    max_total_pixels: int
    tells_bounds: bool = False

    def plan(self, video: SampledVideo, options: ProcessingOptions) -> VisualPlan:
        """Return the grid of a video; see ``VideoPlanner.plan``."""
        check_aspect_ratio(video.height, video.width, Modality.VIDEO)
        bounds = self._share(self.bounds.clamp(options), video.num_frames)
        rows, columns = bounds.resize(video.height, video.width)
        num_patches = -(-video.num_frames // self.frames_per_patch)
        layout = self.bounds.lay_out(self.token_id, num_patches, rows, columns)
        interval_s = self.frames_per_patch / video.fps
        times = tuple(patch * interval_s for patch in range(num_patches))
        num_pixels = num_patches * self.frames_per_patch * rows * columns
        return VisualPlan(replace(layout, timestamps_s=times), num_pixels)

    def processor_size(self, options: ProcessingOptions) -> Mapping[str, int] | None:
        """Return the bounds under the processor's names; ``None`` if its own hold."""
        if self.tells_bounds:
            return self.bounds.clamp(options).as_size()
        return self.bounds.processor_size(options)

    def _share(self, bounds: AreaBounds, num_frames: int) -> AreaBounds:
        """Return the bounds of one frame where all frames together are bounded."""
        if not self.max_total_pixels:
            return bounds
        share = self.max_total_pixels * self.frames_per_patch // num_frames
        high = max(min(bounds.max_pixels, share), int(bounds.min_pixels * _LEAST_SHARE))
        return replace(bounds, max_pixels=high)


def make_grid_planner(
    config: Mapping[str, object], preprocessor: Mapping[str, object]
) -> GridPlanner:
    """Return the planner of a checkpoint's images.

    Raises:
        UnsupportedModelError: A value is missing, or tower and processor disagree.
    """
    token_id = QWEN_VL.placeholder_token_id(config, Modality.IMAGE)
    return GridPlanner(token_id, read_bounds(config, preprocessor))


def make_grid_video_planner(
    config: Mapping[str, object], preprocessor: Mapping[str, object]
) -> GridVideoPlanner:
    """Return the planner of a checkpoint's videos.

    Raises:
        UnsupportedModelError: A value is missing, or tower and processor disagree.
    """
    bounds = read_bounds(config, preprocessor)
    max_total_pixels = 0
    if preprocessor.get("cap_pixels_per_frame"):
        token_side = bounds.patch_size * bounds.merge_size
        max_tokens = read_int(preprocessor, "max_video_tokens")
        max_total_pixels = int(max_tokens * token_side**2 * _SHARE_OF_CONTEXT)
    return GridVideoPlanner(
        token_id=QWEN_VL.placeholder_token_id(config, Modality.VIDEO),
        bounds=bounds,
        frames_per_patch=read_int(preprocessor, "temporal_patch_size"),
        max_total_pixels=max_total_pixels,
    )


def read_positions_per_s(config: Mapping[str, object]) -> float | None:
    """Return how many time positions a second takes; ``None`` for Qwen2-VL."""
    vision_config = read_section(config, "vision_config")
    if "tokens_per_second" not in vision_config:
        return None
    return float(read_int(vision_config, "tokens_per_second"))


def read_merge_size(config: Mapping[str, object]) -> int:
    """Return how many patches are a token along each side.

    Raises:
        UnsupportedModelError: The configuration does not tell.
    """
    return read_int(read_section(config, "vision_config"), "spatial_merge_size")


def read_bounds(config: Mapping[str, object], preprocessor: Mapping[str, object]) -> AreaBounds:
    """Return how a checkpoint resizes and cuts pictures or frames.

    Raises:
        UnsupportedModelError: A value is missing, or tower and processor disagree.
    """
    size = read_section(preprocessor, "size")
    merge_size = read_int(preprocessor, "merge_size")
    tower_merge_size = read_section(config, "vision_config").get("spatial_merge_size", merge_size)
    if merge_size != tower_merge_size:
        raise UnsupportedModelError(
            f"The processor merges {merge_size} patches but the tower {tower_merge_size}."
        )
    return AreaBounds(
        patch_size=read_int(preprocessor, "patch_size"),
        merge_size=merge_size,
        min_pixels=read_int(size, "shortest_edge", "min_pixels"),
        max_pixels=read_int(size, "longest_edge", "max_pixels"),
    )


QWEN_VL = Family(
    name="qwen_vl",
    model_types=("qwen2_vl", "qwen2_5_vl"),
    positions=PositionScheme.MROPE,
    make_image_planner=make_grid_planner,
    make_video_planner=make_grid_video_planner,
    read_positions_per_s=read_positions_per_s,
    read_merge_size=read_merge_size,
)
