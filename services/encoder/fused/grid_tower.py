"""Compute the towers of the Qwen-VL class: pictures and videos of any size as grids of patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from chiasm.common.packed_linear import PackedLinear
from chiasm.encoder.fused.description import UnsupportedTowerError, describe_blocks
from chiasm.encoder.fused.grid_plan import GridPlanner, permute_blocks
from chiasm.encoder.fused.linear import take_parameter
from chiasm.encoder.fused.make_operators import make_operators, quantize
from chiasm.encoder.fused.patch_merger import PatchMerger, check_merger
from chiasm.encoder.fused.replays import Replays
from chiasm.encoder.fused.tower_block import TowerBlock, check_block

if TYPE_CHECKING:
    from collections.abc import Callable

    import transformers

    from chiasm.common.graph_recorder import Recorder
    from chiasm.encoder.fused.grid_plan import GridPlan
    from chiasm.kernels.cpu.native import CpuKernels
    from chiasm.kernels.cpu.quantized_layer import Quantization
    from chiasm.kernels.triton_kernels import TritonKernels


class GridTower(torch.nn.Module):
    """A tower and its merger; stands in a model where transformers' tower stood.

    Rotary frequencies, grids and learned positions are transformers' own.
    """

    def __init__(
        self,
        tower: transformers.PreTrainedModel,
        kernels: CpuKernels | TritonKernels | None = None,
        record: Recorder | None = None,
        quantization: Quantization = "none",
    ) -> None:
        """Take the weights of ``tower``, one block at a time; it is unusable afterwards.

        Args:
            tower: Half-loaded tower.
            kernels: What computes that lies between its products; ``None`` for torch.
            record: Records forwards of grids that come again; ``None``: all are computed.
            quantization: How the weights of blocks are held.

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
        has_positions = hasattr(tower, "pos_embed")
        self._positions = tower.get_submodule("pos_embed") if has_positions else None
        self._planner = GridPlanner(tower, self._positions)
        self._replays = Replays(record)
        projection = tower.get_submodule("patch_embed.proj")
        bias = None if projection.bias is None else take_parameter(projection, "bias")
        self._patch_embed = PackedLinear(take_parameter(projection, "weight").flatten(1), bias)
        operators = make_operators(kernels, description, self._dtype)
        products = quantize(operators, kernels, quantization)
        self._blocks = [TowerBlock(block, description, products) for block in blocks]
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
        grids = tuple(tuple(grid) for grid in grid_thw.tolist())
        plan = self._planner.plan(grids, patches.device)
        merged, *levels = self._replays.run(
            grids, patches.to(self._dtype), lambda rows: self._compute(rows, plan)
        )
        return BaseModelOutputWithDeepstackFeatures(pooler_output=merged, deepstack_features=levels)

    def _compute(self, patches: torch.Tensor, plan: GridPlan) -> list[torch.Tensor]:
        """Return the merged rows, and behind them those of each level."""
        hidden = self._patch_embed(patches)
        if plan.positions is not None:
            hidden += plan.positions
        if plan.order is not None:
            hidden = permute_blocks(hidden, plan.order)
        levels = []
        for index, block in enumerate(self._blocks):
            self.before_block()
            is_full = self._full_blocks is None or index in self._full_blocks
            segments = plan.frames if is_full else plan.windows
            hidden = block.forward(hidden, segments, plan.rotation)
            if index in self._level_blocks:
                levels.append(self._level_mergers[self._level_blocks.index(index)](hidden))
        merged = self._merger(hidden)
        return [merged if plan.inverse is None else merged[plan.inverse], *levels]


def _children(tower: torch.nn.Module, name: str) -> list[torch.nn.Module]:
    return list(tower.get_submodule(name).children()) if hasattr(tower, name) else []
