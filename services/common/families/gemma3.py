"""Gemma 3: every image is resized to one square and becomes a fixed number of tokens.

They stand between a begin token, which is also the placeholder, and an end token, and attend to one
another in both directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.common.errors import InvalidRequestError
from chiasm.common.families.family import Family, PositionScheme, VisualPlan, check_aspect_ratio
from chiasm.common.families.reading import UnsupportedModelError, read_int, read_section
from chiasm.common.media import MediaLayout, Modality, TokenRun

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chiasm.common.media import ProcessingOptions

_BEGIN_KEYS = ("boi_token_index", "boi_token_id")
_END_KEYS = ("eoi_token_index", "eoi_token_id")
_IMAGE_KEYS = ("image_token_index", "image_token_id")


@dataclass(frozen=True, slots=True)
class SquarePlanner:
    """Plans images that all become the same.

    Attributes:
        layout: Expansion of an image.
        num_pixels: Pixels of a resized image.
    """

    layout: MediaLayout
    num_pixels: int

    def plan(self, height: int, width: int, options: ProcessingOptions) -> VisualPlan:
        """Return the fixed layout; see ``ImagePlanner.plan``."""
        check_aspect_ratio(height, width, Modality.IMAGE)
        return VisualPlan(self.layout, self.num_pixels)

    def processor_arguments(
        self, height: int, width: int, options: ProcessingOptions
    ) -> Mapping[str, object]:
        """Return nothing: the tower takes one size only."""
        return {}


def make_square_planner(
    config: Mapping[str, object], preprocessor: Mapping[str, object]
) -> SquarePlanner:
    """Return the planner of a checkpoint.

    Raises:
        UnsupportedModelError: A value is missing, or the processor cuts images into crops.
    """
    if preprocessor.get("do_pan_and_scan"):
        raise UnsupportedModelError(
            "Gemma 3 with do_pan_and_scan is not supported; set it to false in"
            " preprocessor_config.json."
        )
    size = read_section(preprocessor, "size")
    image_size = read_int(read_section(config, "vision_config"), "image_size")
    if {read_int(size, "height"), read_int(size, "width")} != {image_size}:
        raise UnsupportedModelError("The processor and the tower disagree on the size of images.")
    run = TokenRun(read_int(config, *_IMAGE_KEYS), count_group_tokens(config), is_embedding=True)
    return SquarePlanner(lay_out_image(config, run), image_size**2)


def lay_out_image(config: Mapping[str, object], rows: TokenRun) -> MediaLayout:
    """Return how ``rows`` of an image stand in the prompt: between their begin and end tokens.

    Raises:
        InvalidRequestError: There are more or fewer than every image has.
        UnsupportedModelError: A value is missing.
    """
    size = count_group_tokens(config)
    if rows.count != size:
        raise InvalidRequestError(
            f"An image of this model has {size} embeddings, but there are {rows.count} rows.",
            reason="INVALID_EMBEDDING",
        )
    begin, end = (
        TokenRun(read_int(config, *keys), 1, is_embedding=False)
        for keys in (_BEGIN_KEYS, _END_KEYS)
    )
    return MediaLayout((begin, rows, end), attends_both_ways=True)


def count_group_tokens(config: Mapping[str, object]) -> int:
    """Return how many rows every image has.

    Raises:
        UnsupportedModelError: The configuration does not tell.
    """
    return read_int(config, "mm_tokens_per_image")


GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3",),
    positions=PositionScheme.LINEAR,
    make_image_planner=make_square_planner,
    placeholder_keys={Modality.IMAGE: _BEGIN_KEYS},
    # The processor puts it around the token, and the tokenizer joins it with what stands there.
    placeholder_margin="\n\n",
    lay_out_rows=lay_out_image,
    count_group_tokens=count_group_tokens,
)
