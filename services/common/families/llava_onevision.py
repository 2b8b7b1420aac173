"""LLaVA-OneVision: a picture becomes one small view of all of it and tiles of a larger one.

The larger view has the best of a few resolutions, is cut to tiles, and its features, without those
of the padding, are laid out in rows that each end with a newline row; too many are interpolated
down. A video becomes the features of its frames, pooled by two along each side, and one newline.
Each picture is looked at on its own, however many there are in a prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.common.families.family import (
    Family,
    PositionScheme,
    VisualPlan,
    check_aspect_ratio,
)
from chiasm.common.families.reading import UnsupportedModelError, read_int, read_section
from chiasm.common.media import MediaLayout, Modality, ProcessingOptions, TokenRun

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chiasm.common.families.family import SampledVideo

Resolution = tuple[int, int]

_ASPECT_PREFIX = "anyres_max_"
# Features of the larger view may be over their bound by this much before they are interpolated.
_TOLERANCE = 1.1
_ROUNDING_DIGITS = 7
_FEATURE_STRATEGIES = {"siglip_vision_model": "full", "clip_vision_model": "default"}


@dataclass(frozen=True, slots=True)
class TilePlanner:
    """Plans images as one small view and tiles of a larger one.

    Attributes:
        token_id: Token of every position of the expansion.
        tile_size: Side of a tile, in pixels.
        tile_side: Features along each side of a tile.
        resolutions: Sizes of the larger view to choose from, ``(height, width)`` in pixels.
        max_tiles: Features of the larger view that are kept, in tiles.
    """

    token_id: int
    tile_size: int
    tile_side: int
    resolutions: tuple[Resolution, ...]
    max_tiles: int

    def plan(self, height: int, width: int, options: ProcessingOptions) -> VisualPlan:
        """Return the layout of an image; see ``ImagePlanner.plan``."""
        check_aspect_ratio(height, width, Modality.IMAGE)
        best_height, best_width = choose_resolution((height, width), self.resolutions)
        num_tiles = (best_height // self.tile_size) * (best_width // self.tile_size)
        rows, columns = self._keep_features(height, width, best_height, best_width)
        num_tokens = self.tile_side**2 + rows * (columns + 1)
        layout = MediaLayout(runs=(TokenRun(self.token_id, num_tokens, is_embedding=True),))
        return VisualPlan(layout, (num_tiles + 1) * self.tile_size**2)

    def processor_arguments(
        self, height: int, width: int, options: ProcessingOptions
    ) -> Mapping[str, object]:
        """Return nothing: the tower takes one size only."""
        return {}

    def _keep_features(
        self, height: int, width: int, best_height: int, best_width: int
    ) -> tuple[int, int]:
        """Return rows and columns of the larger view's features without padding."""
        rows = best_height // self.tile_size * self.tile_side
        columns = best_width // self.tile_size * self.tile_side
        if width / height > columns / rows:
            kept = int(round(height * (columns / width), _ROUNDING_DIGITS))
            rows -= (rows - kept) // 2 * 2
        else:
            kept = int(round(width * (rows / height), _ROUNDING_DIGITS))
            columns -= (columns - kept) // 2 * 2
        ratio = math.sqrt(rows * columns / (self.max_tiles * self.tile_side**2))
        if ratio > _TOLERANCE:
            rows, columns = int(rows // ratio), int(columns // ratio)
        return rows, columns


@dataclass(frozen=True, slots=True)
class PooledVideoPlanner:
    """Plans videos as the pooled features of their frames and one newline.

    Attributes:
        token_id: Token of every position of the expansion.
        frame_tokens: Features of one frame, pooled.
        frame_pixels: Pixels of a resized frame.
    """

    token_id: int
    frame_tokens: int
    frame_pixels: int

    def plan(self, video: SampledVideo, options: ProcessingOptions) -> VisualPlan:
        """Return the layout of a video; see ``VideoPlanner.plan``."""
        check_aspect_ratio(video.height, video.width, Modality.VIDEO)
        num_tokens = video.num_frames * self.frame_tokens + 1
        layout = MediaLayout(runs=(TokenRun(self.token_id, num_tokens, is_embedding=True),))
        return VisualPlan(layout, video.num_frames * self.frame_pixels)

    def processor_size(self, options: ProcessingOptions) -> Mapping[str, int] | None:
        """Return ``None``: the tower takes one size only."""
        return None


def choose_resolution(size: Resolution, resolutions: Sequence[Resolution]) -> Resolution:
    """Return the resolution that keeps most of a picture's pixels, then wastes fewest.

    Args:
        size: ``(height, width)`` of the picture.
        resolutions: Those to choose from; the first of equals is taken.

    Source: ``select_best_resolution`` of transformers.
    """
    height, width = size

    def rank(resolution: Resolution) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return max(resolutions, key=rank)


def make_tile_planner(
    config: Mapping[str, object], preprocessor: Mapping[str, object]
) -> TilePlanner:
    """Return the planner of a checkpoint's images.

    Raises:
        UnsupportedModelError: A value is missing, or tower and processor disagree.
    """
    tile_size, tile_side = _read_tile(config, preprocessor)
    resolutions = _read_resolutions(preprocessor)
    if "image_grid_pinpoints" in config and _read_resolutions(config) != resolutions:
        raise UnsupportedModelError("The processor and the tower choose from other resolutions.")
    aspect_ratio = str(config.get("vision_aspect_ratio", f"{_ASPECT_PREFIX}9"))
    max_tiles = aspect_ratio.removeprefix(_ASPECT_PREFIX)
    if not max_tiles.isdigit() or not int(max_tiles):
        raise UnsupportedModelError(f"The aspect ratio {aspect_ratio!r} is not supported.")
    return TilePlanner(
        token_id=LLAVA_ONEVISION.placeholder_token_id(config, Modality.IMAGE),
        tile_size=tile_size,
        tile_side=tile_side,
        resolutions=resolutions,
        max_tiles=int(max_tiles),
    )


def make_pooled_video_planner(
    config: Mapping[str, object], preprocessor: Mapping[str, object]
) -> PooledVideoPlanner:
    """Return the planner of a checkpoint's videos.

    Raises:
        UnsupportedModelError: A value is missing, or tower and processor disagree.
    """
    tile_size, tile_side = _read_tile(config, preprocessor)
    return PooledVideoPlanner(
        token_id=LLAVA_ONEVISION.placeholder_token_id(config, Modality.VIDEO),
        frame_tokens=math.ceil(tile_side / 2) ** 2,
        frame_pixels=tile_size**2,
    )


def _read_tile(config: Mapping[str, object], preprocessor: Mapping[str, object]) -> tuple[int, int]:
    """Return the side of a tile in pixels and in features."""
    vision_config = read_section(config, "vision_config")
    tower = str(vision_config.get("model_type"))
    strategy = config.get("vision_feature_select_strategy", "full")
    if _FEATURE_STRATEGIES.get(tower) != strategy:
        raise UnsupportedModelError(
            f"LLaVA-OneVision with a vision tower {tower!r} of which {strategy!r} features are"
            " taken is not supported."
        )
    image_size = read_int(vision_config, "image_size")
    size = read_section(preprocessor, "size")
    sides = {read_int(size, "height", "shortest_edge"), read_int(size, "width", "shortest_edge")}
    if sides != {image_size}:
        raise UnsupportedModelError(
            f"The processor makes tiles of {sorted(sides)} pixels but the tower takes {image_size}."
        )
    return image_size, image_size // read_int(vision_config, "patch_size")


def _read_resolutions(config: Mapping[str, object]) -> tuple[Resolution, ...]:
    found = config.get("image_grid_pinpoints")
    if not isinstance(found, list | tuple) or not found:
        raise UnsupportedModelError("The model configuration has no 'image_grid_pinpoints'.")
    return tuple((int(height), int(width)) for height, width in found)


LLAVA_ONEVISION = Family(
    name="llava_onevision",
    model_types=("llava_onevision",),
    positions=PositionScheme.LINEAR,
    make_image_planner=make_tile_planner,
    make_video_planner=make_pooled_video_planner,
)
