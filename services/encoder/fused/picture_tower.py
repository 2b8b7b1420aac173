"""Compute the towers of LLaVA's class, CLIP and SigLIP: pictures of one size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from chiasm.encoder.fused.description import UnsupportedTowerError, describe_blocks
from chiasm.encoder.fused.kernel_operators import make_operators
from chiasm.encoder.fused.linear import activate, check_linears, take_linears
from chiasm.encoder.fused.segments import Segments
from chiasm.encoder.fused.tower_block import TowerBlock, check_block

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import transformers

    from chiasm.kernels.cpu.native import CpuKernels

_PROJECTOR_LINEARS = ("linear_1", "linear_2")


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
    ) -> None:
        """Take the weights of ``tower``, one block at a time; it is unusable afterwards.

        Args:
            tower: Half-loaded tower.
            layers: Indices of the hidden states that are read, negative ones counted from the end;
                0 are those before the first block.
            kernels: What computes that lies between its products; ``None`` for torch.

        Raises:
            UnsupportedTowerError: The tower is of another kind; it is unchanged and usable.
        """
        super().__init__()
        # Called in a forward before each block.
        self.before_block: Callable[[], None] = lambda: None
        description = describe_blocks(tower.config)
        blocks = list(tower.get_submodule("encoder.layers").children())
        for block in blocks:
            check_block(block, description)
        self._num_states = len(blocks) + 1
        self._read = {layer % self._num_states for layer in layers}
        self._dtype = tower.dtype
        self._embeddings = tower.get_submodule("embeddings")
        self._pre_norm = getattr(tower, "pre_layrnorm", None)
        operators = make_operators(kernels, description, self._dtype)
        self._blocks = [
            TowerBlock(block, description, operators) for block in blocks[: max(self._read)]
        ]

    @property
    def dtype(self) -> torch.dtype:
        """Element type of weights and rows."""
        return self._dtype

    @property
    def num_packed_bytes(self) -> int:
        """Bytes of the weights that are no parameters of this module."""
        return sum(block.num_bytes for block in self._blocks)

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
        hidden = embedded.reshape(-1, width)
        states = [hidden.new_empty(0)] * self._num_states
        for index in range(self._num_states):
            if index in self._read:
                states[index] = hidden.view(num_pictures, length, width)
            if index == len(self._blocks):
                break
            self.before_block()
            hidden = self._blocks[index].forward(hidden, segments)
        return BaseModelOutputWithPooling(hidden_states=tuple(states))


class FusedProjector(torch.nn.Module):
    """Two linear layers, a function between them; stands where transformers' projector stood."""

    def __init__(self, projector: torch.nn.Module, activation: str) -> None:
        """Take the weights of ``projector``, which ``check_projector`` has accepted."""
        super().__init__()
        first, second = _PROJECTOR_LINEARS
        self._activation = activation
        self._first = take_linears(projector, (first,))
        self._second = take_linears(projector, (second,))

    @property
    def num_packed_bytes(self) -> int:
        """Bytes of the weights."""
        return self._first.num_bytes + self._second.num_bytes

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return rows of the language model's width for [num_pictures, num_patches, width]."""
        rows = states.reshape(-1, states.shape[-1])
        rows = self._second(activate(self._first, rows, self._activation))
        return rows.view(*states.shape[:-1], -1)


def check_projector(projector: torch.nn.Module) -> None:
    """Check that a ``FusedProjector`` knows all modules of ``projector``; nothing is changed.

    Raises:
        UnsupportedTowerError: It does not.
    """
    check_linears(projector, _PROJECTOR_LINEARS)
    owners = {name.rpartition(".")[0] for name, _ in projector.named_parameters()}
    if owners != set(_PROJECTOR_LINEARS):
        raise UnsupportedTowerError(f"the projector has other weights: {', '.join(sorted(owners))}")
