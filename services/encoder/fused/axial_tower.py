"""Compute the tower of Pixtral: pictures of any size, their patches turned by row and column."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from chiasm.common.packed_linear import PackedLinear
from chiasm.encoder.fused.block_stack import BlockStack
from chiasm.encoder.fused.description import UnsupportedTowerError
from chiasm.encoder.fused.linear import take_parameter
from chiasm.encoder.fused.norm import check_norm, take_norm
from chiasm.encoder.fused.rotary import make_rotation
from chiasm.encoder.fused.segments import Segments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import transformers

    from chiasm.kernels.cpu.native import CpuKernels
    from chiasm.kernels.cpu.quantized_layer import Quantization


class AxialTower(torch.nn.Module):
    """A tower up to the last block that is read; stands where transformers' tower stood.

    Rotary frequencies are transformers' own. Patches of a picture see each other and no others.
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
            layers: Indices of the hidden states that are read; see ``BlockStack``.
            kernels: What computes that lies between its products; ``None`` for torch.
            quantization: How the weights of blocks are held.

        Raises:
            UnsupportedTowerError: The tower is of another kind; it is unchanged and usable.
        """
        super().__init__()
        # Called in a forward before each block.
        self.before_block: Callable[[], None] = lambda: None
        config = tower.config
        pre_norm, projection = tower.get_submodule("ln_pre"), tower.get_submodule("patch_conv")
        self._rotary = tower.get_submodule("patch_positional_embedding")
        head_dim = config.hidden_size // config.num_attention_heads
        if len(self._rotary.get_buffer("inv_freq")) * 2 != head_dim:
            raise UnsupportedTowerError("the rotation does not cover whole heads")
        if getattr(projection, "bias", None) is not None:
            raise UnsupportedTowerError("the embedding of patches has a bias")
        check_norm(pre_norm)
        self.patch_size: int = config.patch_size
        self._dtype = tower.dtype
        blocks = list(tower.get_submodule("transformer.layers").children())
        self._blocks = BlockStack(tower, blocks, layers, kernels, quantization)
        self._pre_norm = take_norm(pre_norm)
        self._patch_embed = PackedLinear(take_parameter(projection, "weight").flatten(1))

    @property
    def dtype(self) -> torch.dtype:
        """Element type of weights and rows."""
        return self._dtype

    @property
    def num_packed_bytes(self) -> int:
        """Bytes of the weights that are no parameters of this module."""
        return self._patch_embed.num_bytes + self._pre_norm.num_bytes + self._blocks.num_bytes

    def forward(
        self, pixel_values: Sequence[torch.Tensor], image_sizes: torch.Tensor, **_: object
    ) -> BaseModelOutputWithPooling:
        """Encode pictures in one forward.

        Args:
            pixel_values: Pictures, each [3, height, width]; what is outside of its size is padding.
            image_sizes: Height and width of each in pixels, multiples of the side of a patch.
                [num_pictures, 2], int64.

        Returns:
            ``hidden_states``, by index; [1, num_patches, hidden_size], the patches of all pictures
            row by row, where the index is read, and an empty tensor elsewhere.
        """
        sizes = image_sizes.tolist()
        grids = [(height // self.patch_size, width // self.patch_size) for height, width in sizes]
        patches = [
            self._cut(pixels, *grid) for pixels, grid in zip(pixel_values, grids, strict=True)
        ]
        hidden = self._pre_norm(self._patch_embed(torch.cat(patches).to(self._dtype)))
        bounds = torch.tensor([0, *(len(one) for one in patches)]).cumsum(0)
        segments = Segments(bounds.to(hidden.device))
        rotation = self._rotation(grids, hidden.device)
        states = self._blocks.forward(hidden, segments, self.before_block, rotation)
        hidden_states = tuple(state[None] if len(state) else state for state in states)
        return BaseModelOutputWithPooling(hidden_states=hidden_states)

    def _cut(self, pixels: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Return the patches of a picture, row by row. [rows * columns, pixels of a patch]."""
        size = self.patch_size
        picture = pixels[:, : rows * size, : columns * size]
        grid = picture.reshape(-1, rows, size, columns, size)
        return grid.permute(1, 3, 0, 2, 4).reshape(rows * columns, -1)

    def _rotation(self, grids: Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor:
        """Return what turns the patches of pictures of these rows and columns."""
        positions = torch.cat(
            [torch.cartesian_prod(torch.arange(r), torch.arange(c)) for r, c in grids]
        ).to(device)
        # The module gives the element type of its first argument.
        cos, sin = self._rotary(torch.empty(0, device=device), positions)
        return make_rotation(cos, sin)
