"""Compute the towers of the Qwen-VL class: pictures and videos of any size as grids of patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from chiasm.common.packed_linear import PackedLinear
from chiasm.encoder.fused.description import UnsupportedTowerError, describe_blocks
from chiasm.encoder.fused.kernel_operators import make_operators
from chiasm.encoder.fused.linear import take_parameter
from chiasm.encoder.fused.patch_merger import PatchMerger, check_merger
from chiasm.encoder.fused.rotary import make_rotation
from chiasm.encoder.fused.segments import Segments
from chiasm.encoder.fused.tower_block import TowerBlock, check_block

if TYPE_CHECKING:
    from collections.abc import Callable

    import transformers

    from chiasm.kernels.cpu.native import CpuKernels


class GridTower(torch.nn.Module):
    """A tower and its merger; stands in a model where transformers' tower stood.

    Rotary frequencies, grids and learned positions are transformers' own.
    """

    def __init__(
        self, tower: transformers.PreTrainedModel, kernels: CpuKernels | None = None
    ) -> None:
        """Take the weights of ``tower``, one block at a time; it is unusable afterwards.

        Args:
            tower: Half-loaded tower.
            kernels: What computes that lies between its products; ``None`` for torch.

        Raises:
            UnsupportedTowerError: The tower is of another kind; it is unchanged and usable.
        """
        super().__init__()
        # Called in a forward before each block.
        self.before_block: Callable[[], None] = lambda: None
        self._config = config = tower.config
        description = describe_blocks(config)
        blocks = _children(tower, "blocks")
        level_mergers = _children(tower, "deepstack_merger_list")
        merger = tower.get_submodule("merger")
        for block in blocks:
            check_block(block, description)
        for module in (merger, *level_mergers):
            check_merger(module, config.model_type)
        frequencies = tower.get_submodule("rotary_pos_emb").get_buffer("inv_freq")
        if len(frequencies) * 4 != description.head_dim:
            raise UnsupportedTowerError("the rotation does not cover whole heads")
        self.spatial_merge_size: int = config.spatial_merge_size
        self._dtype = tower.dtype
        self._full_blocks = getattr(config, "fullatt_block_indexes", None)
        self._level_blocks: list[int] = getattr(config, "deepstack_visual_indexes", None) or []
        self._rotary = tower.get_submodule("rotary_pos_emb")
        has_positions = hasattr(tower, "pos_embed")
        self._positions = tower.get_submodule("pos_embed") if has_positions else None
        projection = tower.get_submodule("patch_embed.proj")
        bias = None if projection.bias is None else take_parameter(projection, "bias")
        self._patch_embed = PackedLinear(take_parameter(projection, "weight").flatten(1), bias)
        operators = make_operators(kernels, description, self._dtype)
        self._blocks = [TowerBlock(block, description, operators) for block in blocks]
        self._merger, *self._level_mergers = (
            PatchMerger(one, config.model_type, operators) for one in (merger, *level_mergers)
        )

    @property
    def dtype(self) -> torch.dtype:
        """Element type of weights and rows."""
        return self._dtype

    @property
    def num_packed_bytes(self) -> int:
        """Bytes of the weights that are no parameters of this module."""
        blocks = sum(block.num_bytes for block in self._blocks)
        mergers = sum(merger.num_bytes for merger in (self._merger, *self._level_mergers))
        return self._patch_embed.num_bytes + blocks + mergers

    def forward(
        self, patches: torch.Tensor, grid_thw: torch.Tensor, **_: object
    ) -> BaseModelOutputWithDeepstackFeatures:
        """Encode items in one forward.

        Args:
            patches: Pixels of the patches of all items. [num_patches, pixels of a patch].
            grid_thw: Frames, rows and columns of every item's patches. [num_items, 3], int64.

        Returns:
            ``pooler_output``, [num_rows, hidden size of the language model], and as many tensors
            of this shape in ``deepstack_features`` as the tower has levels.
        """
        hidden = self._patch_embed(patches.to(self._dtype))
        if self._positions is not None:
            hidden += self._learned_positions(grid_thw).to(hidden.dtype)
        position_ids = get_vision_position_ids(grid_thw, self.spatial_merge_size)
        cos, sin = self._rotary(hidden, position_ids)
        frames = windows = Segments(get_vision_cu_seqlens(grid_thw))
        order = None
        if self._full_blocks is not None:
            order, bounds = self._windows(grid_thw)
            windows = Segments(bounds)
            hidden, cos, sin = (self._permute(rows, order) for rows in (hidden, cos, sin))
        rotation = make_rotation(cos, sin)
        levels = []
        for index, block in enumerate(self._blocks):
            self.before_block()
            is_full = self._full_blocks is None or index in self._full_blocks
            hidden = block.forward(hidden, frames if is_full else windows, rotation)
            if index in self._level_blocks:
                levels.append(self._level_mergers[self._level_blocks.index(index)](hidden))
        merged = self._merger(hidden)
        if order is not None:
            merged = merged[order.argsort()]
        return BaseModelOutputWithDeepstackFeatures(pooler_output=merged, deepstack_features=levels)

    def _windows(self, grid_thw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the order of merged patches by window, and the windows' bounds in patches."""
        order, bounds = get_vision_window_index(
            grid_thw, self.spatial_merge_size, self._config.window_size, self._config.patch_size
        )
        return order.to(grid_thw.device), bounds.to(grid_thw.device)

    def _permute(self, rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        blocks = rows.view(len(order), self.spatial_merge_size**2, -1)
        return blocks[order].view(len(rows), -1)

    def _learned_positions(self, grid_thw: torch.Tensor) -> torch.Tensor:
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid_thw,
            num_grid_per_side=int(self._config.num_position_embeddings**0.5),
            align_corners=True,
            spatial_merge_size=self.spatial_merge_size,
        )
        assert self._positions is not None, "the caller has looked"
        corners: torch.Tensor = self._positions(indices)
        return (corners * weights[:, :, None]).sum(1)


def _children(tower: torch.nn.Module, name: str) -> list[torch.nn.Module]:
    return list(tower.get_submodule(name).children()) if hasattr(tower, name) else []
