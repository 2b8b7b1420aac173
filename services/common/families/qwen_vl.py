"""Qwen2-VL and Qwen2.5-VL: images keep their aspect ratio and become a grid of merged patches.

An image is resized so that both sides are multiples of ``patch_size * merge_size`` and its area
lies between two bounds; every ``merge_size ** 2`` patches make one token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.common.families.family import Family, ImagePlan, PositionScheme, check_aspect_ratio
from chiasm.common.families.reading import UnsupportedModelError, read_int, read_section
from chiasm.common.media import MediaLayout, Modality, PatchGrid, ProcessingOptions, TokenRun

if TYPE_CHECKING:
    from collections.abc import Mapping


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
class GridPlanner:
    """Plans images as one temporal patch of a grid.

    Attributes:
        token_id: Token of every position of the expansion.
        patch_size: Side of a patch, in pixels.
        merge_size: Patches per token along each side.
        min_pixels: The checkpoint's smallest area.
        max_pixels: The checkpoint's largest area; clients may only lower it.
    """

    token_id: int
    patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int

    def plan(self, height: int, width: int, options: ProcessingOptions) -> ImagePlan:
        """Return the grid of an image; see ``ImagePlanner.plan``."""
        check_aspect_ratio(height, width)
        low, high = self._bounds(options)
        factor = self.patch_size * self.merge_size
        rows, columns = smart_resize(height, width, factor, low, high)
        grid = PatchGrid(1, rows // self.patch_size, columns // self.patch_size)
        num_tokens = grid.t * grid.h * grid.w // self.merge_size**2
        layout = MediaLayout(
            runs=(TokenRun(self.token_id, num_tokens, is_embedding=True),),
            grid=grid,
            spatial_merge_size=self.merge_size,
        )
        return ImagePlan(layout, rows * columns)

    def processor_size(self, options: ProcessingOptions) -> Mapping[str, int] | None:
        """Return the area bounds under the processor's names; ``None`` without wishes."""
        if options.min_pixels is None and options.max_pixels is None:
            return None
        low, high = self._bounds(options)
        return {"shortest_edge": low, "longest_edge": high}

    def _bounds(self, options: ProcessingOptions) -> tuple[int, int]:
        if options.min_pixels is None and options.max_pixels is None:
            return self.min_pixels, self.max_pixels
        least = (self.patch_size * self.merge_size) ** 2
        wished_high = self.max_pixels if options.max_pixels is None else options.max_pixels
        wished_low = self.min_pixels if options.min_pixels is None else options.min_pixels
        high = max(least, min(wished_high, self.max_pixels))
        return max(least, min(wished_low, high)), high


def make_grid_planner(
    config: Mapping[str, object], preprocessor: Mapping[str, object]
) -> GridPlanner:
    """Return the planner of a checkpoint.

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
    return GridPlanner(
        token_id=QWEN_VL.placeholder_token_id(config, Modality.IMAGE),
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
)
