"""LLaVA-1.5: every image is resized, cropped to one size and becomes a fixed number of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.common.families.family import Family, PositionScheme, VisualPlan, check_aspect_ratio
from chiasm.common.families.reading import UnsupportedModelError, read_int, read_section
from chiasm.common.media import MediaLayout, Modality, ProcessingOptions, TokenRun

if TYPE_CHECKING:
    from collections.abc import Mapping

_NUM_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


@dataclass(frozen=True, slots=True)
class CropPlanner:
    """Plans images that all get the same number of tokens.

    Attributes:
        token_id: Token of every position of the expansion.
        num_tokens: Rows that the tower gives for one image.
        shortest_edge: Side to which the shorter side is resized before the crop, in pixels; 0 if
            images are resized straight to ``height`` and ``width``.
        height: Rows of pixels that the tower takes.
        width: Columns of pixels that the tower takes.
    """

    token_id: int
    num_tokens: int
    shortest_edge: int
    height: int
    width: int

    def plan(self, height: int, width: int, options: ProcessingOptions) -> VisualPlan:
        """Return the fixed layout; see ``ImagePlanner.plan``."""
        check_aspect_ratio(height, width, Modality.IMAGE)
        layout = MediaLayout(
            runs=(TokenRun(self.token_id, self.num_tokens, is_embedding=True),),
        )
        if not self.shortest_edge:
            return VisualPlan(layout, self.height * self.width)
        longest_edge = self.shortest_edge * max(height, width) // min(height, width)
        return VisualPlan(layout, self.shortest_edge * longest_edge)

    def processor_arguments(
        self, height: int, width: int, options: ProcessingOptions
    ) -> Mapping[str, object]:
        """Return nothing: the tower takes one size only."""
        return {}


def make_crop_planner(
    config: Mapping[str, object], preprocessor: Mapping[str, object]
) -> CropPlanner:
    """Return the planner of a checkpoint.

    Raises:
        UnsupportedModelError: A value is missing, or the vision tower is of an unknown kind.
    """
    vision_config = read_section(config, "vision_config")
    tower = str(vision_config.get("model_type"))
    if tower not in _NUM_CLASS_TOKENS:
        raise UnsupportedModelError(f"LLaVA with a vision tower {tower!r} is not supported.")
    size = read_section(preprocessor, "size")
    final = read_section(preprocessor, "crop_size") if preprocessor.get("do_center_crop") else size
    height, width = read_int(final, "height"), read_int(final, "width")
    patch_size = read_int(vision_config, "patch_size")
    num_tokens = (height // patch_size) * (width // patch_size) + _NUM_CLASS_TOKENS[tower]
    if config.get("vision_feature_select_strategy", "default") == "default":
        num_tokens -= 1
    return CropPlanner(
        token_id=LLAVA.placeholder_token_id(config, Modality.IMAGE),
        num_tokens=num_tokens,
        shortest_edge=read_int(size, "shortest_edge") if "shortest_edge" in size else 0,
        height=height,
        width=width,
    )


LLAVA = Family(
    name="llava",
    model_types=("llava",),
    positions=PositionScheme.LINEAR,
    make_image_planner=make_crop_planner,
)
