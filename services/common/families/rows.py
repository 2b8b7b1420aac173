"""Plan items that come as ready-made rows: nothing is known of the media they were made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.common.errors import InvalidRequestError
from chiasm.common.families.family import PositionScheme
from chiasm.common.families.reading import read_int, read_section
from chiasm.common.media import MediaLayout, Modality, TokenRun

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chiasm.common.families.family import Family, ImageFrame
    from chiasm.common.media import PatchGrid

MAX_TEMPORAL_PATCHES = 2048
_GRID_MODALITIES = (Modality.IMAGE, Modality.VIDEO)


@dataclass(frozen=True, slots=True)
class RowPlanner:
    """Lays out ready-made rows for one checkpoint.

    Attributes:
        token_ids: Token of every position of an item, by modality.
        merge_size: Patches per token along each side; 0 if the family has no patch grid.
        frames_per_patch: Frames of one temporal patch of a video.
        image_frame: What stands around the rows of an image; ``None``: nothing.
    """

    token_ids: Mapping[Modality, int]
    merge_size: int
    frames_per_patch: int = 1
    image_frame: ImageFrame | None = None

    @classmethod
    def of(cls, family: Family, config: Mapping[str, object]) -> RowPlanner:
        """Return the planner of a checkpoint.

        Raises:
            UnsupportedModelError: ``config`` lacks a value.
        """
        merge_size, frames_per_patch = 0, 1
        if family.positions is PositionScheme.MROPE:
            vision_config = read_section(config, "vision_config")
            merge_size = read_int(vision_config, "spatial_merge_size")
            frames_per_patch = read_int(vision_config, "temporal_patch_size")
        return cls(
            token_ids={
                modality: family.row_token_id(config, modality) for modality in family.modalities
            },
            merge_size=merge_size,
            frames_per_patch=frames_per_patch,
            image_frame=family.read_image_frame(config),
        )

    def plan(
        self,
        modality: Modality,
        num_rows: int,
        grid: PatchGrid | None,
        fps: float | None = None,
    ) -> MediaLayout:
        """Return the layout of ``num_rows`` rows.

        Args:
            modality: Kind of the item; one that the checkpoint takes.
            num_rows: Rows of the embedding, at least 1.
            grid: Patches that the rows were made from.
            fps: Frames that made a second of a video; ``None``: a temporal patch is a second, as
                transformers assumes.

        Raises:
            InvalidRequestError: The family needs a grid and there is none, or the other way round,
                or the grid makes another number of rows.
        """
        name = f"{modality.value}_grid_thw"
        runs = (TokenRun(self.token_ids[modality], num_rows, is_embedding=True),)
        if not self.merge_size or modality not in _GRID_MODALITIES:
            if grid is not None:
                raise _refusal(f"This model has no patch grid; leave {name} out.")
            return self._enclose(modality, runs)
        if grid is None:
            field = f"{modality.value}_embeds"
            raise _refusal(
                f"The data should contain the fields: {{{field}, {name}}}, but only found the"
                f" following keys: {field}"
            )
        if grid.h % self.merge_size or grid.w % self.merge_size:
            raise _refusal(f"Rows and columns of {name} must be multiples of {self.merge_size}.")
        if modality is Modality.IMAGE and grid.t != 1:
            raise _refusal(f"An image has one temporal patch, but {name} says {grid.t}.")
        if grid.t > MAX_TEMPORAL_PATCHES:
            raise _refusal(f"A video may have at most {MAX_TEMPORAL_PATCHES} temporal patches.")
        wanted = grid.t * grid.h * grid.w // self.merge_size**2
        if wanted != num_rows:
            raise _refusal(
                f"The grid {grid.t}x{grid.h}x{grid.w} makes {wanted} embeddings, but there are"
                f" {num_rows} rows."
            )
        return MediaLayout(
            runs,
            grid=grid,
            spatial_merge_size=self.merge_size,
            timestamps_s=self._times(modality, grid, fps),
        )

    def _enclose(self, modality: Modality, runs: tuple[TokenRun, ...]) -> MediaLayout:
        """Return the layout of rows that may have tokens around them."""
        frame = self.image_frame if modality is Modality.IMAGE else None
        if frame is None:
            return MediaLayout(runs)
        if runs[0].count != frame.num_rows:
            raise _refusal(
                f"An image of this model has {frame.num_rows} embeddings, but there are"
                f" {runs[0].count} rows."
            )
        return frame.enclose(runs[0].token_id)

    def _times(self, modality: Modality, grid: PatchGrid, fps: float | None) -> tuple[float, ...]:
        if modality is not Modality.VIDEO:
            return ()
        interval_s = self.frames_per_patch / fps if fps else 1.0
        return tuple(patch * interval_s for patch in range(grid.t))


def _refusal(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, reason="INVALID_EMBEDDING")
