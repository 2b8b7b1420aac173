"""Gemma 3: every picture is resized to one square and becomes a fixed number of tokens.

They stand between a start and an end token, with a blank line around the whole, and see each other
whatever their order. Pan and scan, which adds crops of long pictures, is off in the checkpoints and
not supported: what a picture becomes would depend on its shape in a way that nothing here plans.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.common.families.family import (
    Family,
    ImageFrame,
    PositionScheme,
    VisualPlan,
    check_aspect_ratio,
)
from chiasm.common.families.reading import UnsupportedModelError, read_int, read_section
from chiasm.common.media import MediaLayout, Modality, ProcessingOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

_BLANK_LINE = "\n\n"


@dataclass(frozen=True, slots=True)
class SquarePlanner:
    """Plans images that all become the same.

    Attributes:
        layout: What each becomes.
        num_pixels: Pixels of the resized image.
    """

    layout: MediaLayout
    num_pixels: int

    def plan(self, height: int, width: int, options: ProcessingOptions) -> VisualPlan:
        """Return the fixed layout; see ``ImagePlanner.plan``."""
        check_aspect_ratio(height, width, Modality.IMAGE)
        return VisualPlan(self.layout, self.num_pixels)

    def processor_size(self, options: ProcessingOptions) -> Mapping[str, int] | None:
        """Return ``None``: the tower takes one size only."""
        return None


def make_square_planner(
    config: Mapping[str, object], preprocessor: Mapping[str, object]
) -> SquarePlanner:
    """Return the planner of a checkpoint.

    Raises:
        UnsupportedModelError: A value is missing, the processor cuts pictures into crops, or it
            gives another size than the tower takes.
    """
    if preprocessor.get("do_pan_and_scan"):
        raise UnsupportedModelError(
            "Gemma 3 with pan and scan is not supported; set do_pan_and_scan to false in the"
            " processor's configuration."
        )
    size = read_section(preprocessor, "size")
    height, width = read_int(size, "height"), read_int(size, "width")
    side = read_int(read_section(config, "vision_config"), "image_size")
    if (height, width) != (side, side):
        raise UnsupportedModelError(
            f"The processor makes pictures of {width}x{height} pixels but the tower takes"
            f" {side}x{side}."
        )
    layout = read_image_frame(config).enclose(GEMMA3.row_token_id(config, Modality.IMAGE))
    return SquarePlanner(layout, side * side)


def read_image_frame(config: Mapping[str, object]) -> ImageFrame:
    """Return what stands around the rows of an image.

    Raises:
        UnsupportedModelError: A value is missing.
    """
    return ImageFrame(
        start_token_id=read_int(config, "boi_token_id", "boi_token_index"),
        end_token_id=read_int(config, "eoi_token_id", "eoi_token_index"),
        num_rows=read_int(config, "mm_tokens_per_image"),
        text_before=_BLANK_LINE,
        text_after=_BLANK_LINE,
    )


GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3",),
    positions=PositionScheme.LINEAR,
    make_image_planner=make_square_planner,
    read_image_frame=read_image_frame,
)
