"""Plan items that come as ready-made rows: nothing is known of the media they were made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from chiasm.common.errors import InvalidRequestError
from chiasm.common.families.reading import read_int, read_section
from chiasm.common.media import MediaLayout, Modality, TokenRun

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from chiasm.common.families.family import Family
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
        lay_out: Lays out rows that need no grid.
        split: Returns the runs in which rows of a grid stand.
    """

    token_ids: Mapping[Modality, int]
    merge_size: int
    frames_per_patch: int = 1
    lay_out: Callable[[TokenRun], MediaLayout] = field(
        default=lambda rows: MediaLayout((rows,)), compare=False
    )
    split: Callable[[TokenRun, PatchGrid], tuple[TokenRun, ...]] = field(
        default=lambda rows, grid: (rows,), compare=False
    )

    @classmethod
    def of(cls, family: Family, config: Mapping[str, object]) -> RowPlanner:
        """Return the planner of a checkpoint.

        Raises:
            UnsupportedModelError: ``config`` lacks a value.
        """
        merge_size, frames_per_patch = family.read_merge_size(config), 1
        if merge_size and Modality.VIDEO in family.modalities:
            frames_per_patch = read_int(
                read_section(config, "vision_config"), "temporal_patch_size"
            )
        return cls(
            token_ids={
                modality: family.row_token_id(config, modality) for modality in family.modalities
            },
            lay_out=partial(family.lay_out_rows, config),
            split=partial(family.split_rows, config),
            merge_size=merge_size,
            frames_per_patch=frames_per_patch,
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
        rows = TokenRun(self.token_ids[modality], num_rows, is_embedding=True)
        if not self.merge_size or modality not in _GRID_MODALITIES:
            if grid is not None:
                raise _refusal(f"This model has no patch grid; leave {name} out.")
            return self.lay_out(rows)
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
            self.split(rows, grid),
            grid=grid,
            spatial_merge_size=self.merge_size,
            timestamps_s=self._times(modality, grid, fps),
        )

    def _times(self, modality: Modality, grid: PatchGrid, fps: float | None) -> tuple[float, ...]:
        if modality is not Modality.VIDEO:
            return ()
        interval_s = self.frames_per_patch / fps if fps else 1.0
        return tuple(patch * interval_s for patch in range(grid.t))


def _refusal(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, reason="INVALID_EMBEDDING")
