"""What a tower's forward needs to know of the grids of its items, besides their pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from chiasm.encoder.fused.rotary import make_rotation
from chiasm.encoder.fused.segments import Segments

if TYPE_CHECKING:
    import transformers

    Grids = tuple[tuple[int, ...], ...]

# Plans that are kept, and the most patches of each: it holds some 400 bytes for every one.
_MAX_PLANS = 16
_MAX_PATCHES = 8192


@dataclass(frozen=True, slots=True, eq=False)
class GridPlan:
    """How the patches of one forward are placed.

    Attributes:
        positions: Added to the patches; ``None`` if no positions are learned.
            [num_patches, hidden_size], dtype of the tower.
        order: Which block of merged patches stands where; ``None`` for the order in which they
            come. [num_patches / patches of a block], int64.
        inverse: The order back.
        rotation: See ``make_rotation``; in that order.
        frames: Segments of the blocks that see whole frames.
        windows: Segments of the others.
    """

    positions: torch.Tensor | None
    order: torch.Tensor | None
    inverse: torch.Tensor | None
    rotation: torch.Tensor
    frames: Segments
    windows: Segments


class GridPlanner:
    """Makes plans, and keeps those of the last grids; all by transformers' own functions."""

    def __init__(
        self, tower: transformers.PreTrainedModel, positions: torch.nn.Module | None
    ) -> None:
        """Plan for ``tower``.

        Args:
            tower: Tells how large windows are; its rotary module is kept.
            positions: Table of learned positions, if it has one.
        """
        self._config = tower.config
        self._dtype = tower.dtype
        self._rotary = tower.get_submodule("rotary_pos_emb")
        self._positions = positions
        self._has_windows = getattr(tower.config, "fullatt_block_indexes", None) is not None
        self._kept = lru_cache(_MAX_PLANS)(self._make_plan)

    def plan(self, grids: Grids, device: torch.device) -> GridPlan:
        """Return the plan of items with ``grids``: frames, rows and columns of patches each."""
        is_large = sum(frames * rows * columns for frames, rows, columns in grids) > _MAX_PATCHES
        return self._make_plan(grids, device) if is_large else self._kept(grids, device)

    def _make_plan(self, grids: Grids, device: torch.device) -> GridPlan:
        # On the CPU, whatever computes the tower: these are small steps with numbers between them.
        grid_thw = torch.tensor(grids, dtype=torch.int64)
        merge_size = self._config.spatial_merge_size
        position_ids = get_vision_position_ids(grid_thw, merge_size).to(device)
        cos, sin = self._rotary(torch.empty(0, dtype=self._dtype, device=device), position_ids)
        frames = windows = Segments(get_vision_cu_seqlens(grid_thw), device)
        order = inverse = None
        if self._has_windows:
            order, bounds = get_vision_window_index(
                grid_thw, merge_size, self._config.window_size, self._config.patch_size
            )
            order = order.to(device)
            inverse = order.argsort()
            windows = Segments(bounds, device)
            cos, sin = (permute_blocks(rows, order) for rows in (cos, sin))
        positions = None if self._positions is None else self._learned_positions(grid_thw, device)
        return GridPlan(positions, order, inverse, make_rotation(cos, sin), frames, windows)

    def _learned_positions(self, grid_thw: torch.Tensor, device: torch.device) -> torch.Tensor:
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid_thw,
            num_grid_per_side=int(self._config.num_position_embeddings**0.5),
            align_corners=True,
            spatial_merge_size=self._config.spatial_merge_size,
        )
        assert self._positions is not None, "the caller has looked"
        corners: torch.Tensor = self._positions(indices.to(device))
        return (corners * weights.to(device)[:, :, None]).sum(1).to(self._dtype)


def permute_blocks(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return the rows of equal blocks in another order.

    Args:
        rows: [num_rows, width].
        order: Which block stands where. [num_blocks], int64.
    """
    return rows.view(len(order), len(rows) // len(order), -1)[order].view(len(rows), -1)
