"""Pixtral: pictures keep their aspect ratio and are written out row by row.

A picture whose longer side is over a bound is made smaller, then both sides are stretched to whole
tokens. A break token stands behind every row of tokens, an end token behind the last. A token is
one patch, or ``spatial_merge_size ** 2`` patches in Mistral 3.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chiasm.common.errors import InvalidRequestError
from chiasm.common.families.family import Family, PositionScheme, VisualPlan, check_aspect_ratio
from chiasm.common.families.reading import UnsupportedModelError, read_int, read_section
from chiasm.common.media import MediaLayout, Modality, PatchGrid, TokenRun

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chiasm.common.media import ProcessingOptions

MAX_TOKEN_ROWS = 2048
# Names that tokens have in the processor's configuration, and what they are if it has none.
_TOKENS = {"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}


@dataclass(frozen=True, slots=True)
class EdgeBound:
    """How pictures are resized.

    Attributes:
        token_side: Pixels of which both sides of a resized picture are multiples.
        longest_edge: Longest side before it is stretched to whole tokens, in pixels.
    """

    token_side: int
    longest_edge: int

    def resize(self, height: int, width: int) -> tuple[int, int]:
        """Return the ``(height, width)`` of a resized picture; 0 where nothing would be left.

        Source: ``get_resize_output_image_size`` of transformers.
        """
        ratio = max(height / self.longest_edge, width / self.longest_edge)
        if ratio > 1:
            height, width = math.floor(height / ratio), math.floor(width / ratio)
        side = self.token_side
        return -(-height // side) * side, -(-width // side) * side

    def lower(self, height: int, width: int, max_pixels: int) -> EdgeBound:
        """Return the widest bound under which a resized picture has at most ``max_pixels``.

        One pixel of the shorter side is always left, and a picture is never less than one token.
        """

        def area(longest_edge: int) -> int:
            return math.prod(replace(self, longest_edge=longest_edge).resize(height, width))

        least = -(-max(height, width) // min(height, width))
        edges = range(least, self.longest_edge + 1)
        num_fitting = bisect.bisect_right(edges, max_pixels, key=area)
        wished = least + max(num_fitting - 1, 0)
        return replace(self, longest_edge=min(wished, self.longest_edge))


@dataclass(frozen=True, slots=True)
class RowBreaks:
    """What stands behind the rows of tokens of an image.

    Attributes:
        break_token_id: Token behind every row but the last.
        end_token_id: Token behind the last row.
        merge_size: Patches per token along each side.
    """

    break_token_id: int
    end_token_id: int
    merge_size: int

    @classmethod
    def read(cls, config: Mapping[str, object]) -> RowBreaks:
        """Return those of a checkpoint, from ``config.json`` with the processor's tokens.

        Raises:
            UnsupportedModelError: A token is missing.
        """
        break_token_id, end_token_id = (read_int(config, f"{name}_id") for name in _TOKENS)
        return cls(break_token_id, end_token_id, read_merge_size(config))

    def split(self, rows: TokenRun, grid: PatchGrid) -> tuple[TokenRun, ...]:
        """Return the runs in which ``rows``, those of all patches of ``grid``, stand.

        Raises:
            InvalidRequestError: There are more rows of tokens than any image has.
        """
        num_token_rows = grid.h // self.merge_size
        if num_token_rows > MAX_TOKEN_ROWS:
            raise InvalidRequestError(
                f"An image may have at most {MAX_TOKEN_ROWS} rows of tokens.",
                reason="INVALID_EMBEDDING",
            )
        row = replace(rows, count=rows.count // num_token_rows)
        behind = TokenRun(self.break_token_id, 1, is_embedding=False)
        end = TokenRun(self.end_token_id, 1, is_embedding=False)
        return (*(row, behind) * (num_token_rows - 1), row, end)


@dataclass(frozen=True, slots=True)
class EdgePlanner:
    """Plans images as rows of tokens with breaks between them.

    Attributes:
        token_id: Token of every position that takes a row of the embedding.
        breaks: What stands between rows.
        patch_size: Side of a patch, in pixels.
        bound: How images are resized.
    """

    token_id: int
    breaks: RowBreaks
    patch_size: int
    bound: EdgeBound

    def plan(self, height: int, width: int, options: ProcessingOptions) -> VisualPlan:
        """Return the rows of an image; see ``ImagePlanner.plan``."""
        check_aspect_ratio(height, width, Modality.IMAGE)
        rows, columns = self._bound_of(height, width, options).resize(height, width)
        if not rows or not columns:
            raise InvalidRequestError(
                f"Failed to load image: of {width}x{height} pixels nothing would be left at"
                f" {self.bound.longest_edge} pixels along the longer side.",
                reason="INVALID_MEDIA",
            )
        grid = PatchGrid(1, rows // self.patch_size, columns // self.patch_size)
        num_tokens = grid.h * grid.w // self.breaks.merge_size**2
        run = TokenRun(self.token_id, num_tokens, is_embedding=True)
        layout = MediaLayout(
            self.breaks.split(run, grid), grid=grid, spatial_merge_size=self.breaks.merge_size
        )
        return VisualPlan(layout, rows * columns)

    def processor_arguments(
        self, height: int, width: int, options: ProcessingOptions
    ) -> Mapping[str, object]:
        """Return the side of a token, and the bound where the client has a wish."""
        # The family's processor says it, too, over what its image processor is configured for.
        arguments: dict[str, object] = {"patch_size": self.bound.token_side}
        if options.max_pixels is not None:
            bound = self._bound_of(height, width, options)
            arguments["size"] = {"longest_edge": bound.longest_edge}
        return arguments

    def _bound_of(self, height: int, width: int, options: ProcessingOptions) -> EdgeBound:
        """Return the bound that holds for a client with these wishes; images are not enlarged."""
        if options.max_pixels is None:
            return self.bound
        return self.bound.lower(height, width, options.max_pixels)


def make_edge_planner(
    config: Mapping[str, object], preprocessor: Mapping[str, object]
) -> EdgePlanner:
    """Return the planner of a checkpoint's images.

    Raises:
        UnsupportedModelError: A value is missing, or rows of the tower would be left out.
    """
    has_strategy = config.get("model_type") == "llava"
    if has_strategy and config.get("vision_feature_select_strategy", "default") != "full":
        raise UnsupportedModelError(
            "Pixtral has no class token to leave out; vision_feature_select_strategy must be"
            " 'full'."
        )
    breaks = RowBreaks.read(config)
    patch_size = read_int(read_section(config, "vision_config"), "patch_size")
    return EdgePlanner(
        token_id=PIXTRAL.placeholder_token_id(config, Modality.IMAGE),
        breaks=breaks,
        patch_size=patch_size,
        bound=EdgeBound(
            token_side=patch_size * breaks.merge_size,
            longest_edge=read_int(read_section(preprocessor, "size"), "longest_edge"),
        ),
    )


def split_rows(
    config: Mapping[str, object], rows: TokenRun, grid: PatchGrid
) -> tuple[TokenRun, ...]:
    """Return the runs in which ``rows`` stand in the prompt; see ``RowBreaks``."""
    return RowBreaks.read(config).split(rows, grid)


def read_merge_size(config: Mapping[str, object]) -> int:
    """Return how many patches are a token along each side.

    Raises:
        UnsupportedModelError: The configuration of a model that merges patches does not tell.
    """
    return read_int(config, "spatial_merge_size") if config.get("model_type") == "mistral3" else 1


PIXTRAL = Family(
    name="pixtral",
    model_types=("llava", "mistral3"),
    tower_types=("pixtral",),
    positions=PositionScheme.LINEAR,
    make_image_planner=make_edge_planner,
    processor_tokens=_TOKENS,
    joins_any_size=True,
    read_merge_size=read_merge_size,
    split_rows=split_rows,
)
