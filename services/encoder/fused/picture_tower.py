"""Compute the towers of LLaVA's class, CLIP and SigLIP: pictures of one size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from chiasm.encoder.fused.block_stack import BlockStack
from chiasm.encoder.fused.segments import Segments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import transformers

    from chiasm.kernels.cpu.native import CpuKernels
    from chiasm.kernels.cpu.quantized_layer import Quantization


class PictureTower(torch.nn.Module):
    """A tower up to the last block that is read; stands where transformers' tower stood.

    The embedding of patches and the norm behind it are transformers' own. Blocks and norms that no
    projector reads are dropped.
    """

    def __init__(
        self,
        tower: transformers.PreTrainedModel,
        layers: Sequence[int],
        kernels: CpuKernels | None = None,
        quantization: Quantization = "none",
    ) -> None:
        """Take the weights of ``tower``, one block at a time; it is unusable afterwards.

        Args:
            tower: Half-loaded tower.
            layers: Indices of the hidden states that are read, negative ones counted from the end;
                0 are those before the first block.
            kernels: What computes that lies between its products; ``None`` for torch.
            quantization: How the weights of blocks are held.

        Raises:
            UnsupportedTowerError: The tower is of another kind; it is unchanged and usable.
        """
        super().__init__()
        # Called in a forward before each block.
        self.before_block: Callable[[], None] = lambda: None
        blocks = list(tower.get_submodule("encoder.layers").children())
        self._blocks = BlockStack(tower, blocks, layers, kernels, quantization)
        self._dtype = tower.dtype
        self._embeddings = tower.get_submodule("embeddings")
        self._pre_norm = getattr(tower, "pre_layrnorm", None)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of weights and rows."""
        return self._dtype

    @property
    def num_packed_bytes(self) -> int:
        """Bytes of the weights that are no parameters of this module."""
        return self._blocks.num_bytes

    def forward(self, pixel_values: torch.Tensor, **_: object) -> BaseModelOutputWithPooling:
        """Encode pictures in one forward.

        Args:
            pixel_values: [num_pictures, 3, height, width].

        Returns:
            ``hidden_states``, by index; [num_pictures, num_patches, hidden_size] where the index
            is read, and an empty tensor elsewhere.
        """
        embedded = self._embeddings(pixel_values)
        if self._pre_norm is not None:
            embedded = self._pre_norm(embedded)
        num_pictures, length, width = embedded.shape
        segments = Segments(torch.arange(num_pictures + 1, device=embedded.device) * length)
        states = self._blocks.forward(embedded.reshape(-1, width), segments, self.before_block)
        shape = (num_pictures, length, width)
        hidden_states = tuple(state.view(shape) if len(state) else state for state in states)
        return BaseModelOutputWithPooling(hidden_states=hidden_states)
