"""Compute the blocks of a tower whose hidden states are read behind some of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.encoder.fused.description import describe_blocks
from chiasm.encoder.fused.make_operators import make_operators, quantize
from chiasm.encoder.fused.tower_block import TowerBlock, check_block

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    import transformers

    from chiasm.encoder.fused.segments import Segments
    from chiasm.kernels.cpu.native import CpuKernels
    from chiasm.kernels.cpu.quantized_layer import Quantization


class BlockStack:
    """The blocks up to the last whose hidden states are read; those behind it are dropped."""

    def __init__(
        self,
        tower: transformers.PreTrainedModel,
        blocks: Sequence[torch.nn.Module],
        layers: Sequence[int],
        kernels: CpuKernels | None,
        quantization: Quantization,
    ) -> None:
        """Take the weights of ``blocks``, one at a time.

        Args:
            tower: The tower that they are of.
            blocks: All blocks, in order.
            layers: Indices of the hidden states that are read, negative ones counted from the end;
                0 are those before the first block.
            kernels: What computes that lies between products; ``None`` for torch.
            quantization: How the weights of blocks are held.

        Raises:
            UnsupportedTowerError: The tower is of another kind; its blocks are unchanged.
        """
        description = describe_blocks(tower.config)
        for block in blocks:
            check_block(block, description)
        self._num_states = len(blocks) + 1
        self._read = {layer % self._num_states for layer in layers}
        operators = make_operators(kernels, description, tower.dtype)
        operators = quantize(operators, kernels, quantization)
        self._blocks = [
            TowerBlock(block, description, operators) for block in blocks[: max(self._read)]
        ]

    def __len__(self) -> int:
        """Return the number of blocks that are computed."""
        return len(self._blocks)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(block.num_bytes for block in self._blocks)

    def forward(
        self,
        hidden: torch.Tensor,
        segments: Segments,
        before_block: Callable[[], None],
        rotation: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Compute the blocks.

        Args:
            hidden: Input of the first block. [num_rows, hidden_size], dtype of the tower.
            segments: Which rows see each other.
            before_block: Called before each block.
            rotation: See ``make_rotation``; ``None`` for towers without.

        Returns:
            The hidden states by index, as ``hidden``; empty tensors for those that are not read.
        """
        states = [hidden.new_empty(0)] * self._num_states
        for index in range(self._num_states):
            if index in self._read:
                states[index] = hidden
            if index == len(self._blocks):
                break
            before_block()
            hidden = self._blocks[index].forward(hidden, segments, rotation)
        return states
