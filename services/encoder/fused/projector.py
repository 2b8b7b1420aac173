"""Bring a tower's rows to the width of the language model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from chiasm.common.packed_linear import PackedLinear
from chiasm.encoder.fused.description import UnsupportedTowerError
from chiasm.encoder.fused.linear import activate, check_linears, take_linears, take_parameter
from chiasm.encoder.fused.norm import check_norm, take_norm

if TYPE_CHECKING:
    import transformers

_LINEARS = ("linear_1", "linear_2")
_NORM = "norm"
_MERGER = "patch_merger.merging_layer"


class FusedProjector(torch.nn.Module):
    """Two linear layers, a function between them; stands where transformers' projector stood."""

    def __init__(self, projector: torch.nn.Module, activation: str) -> None:
        """Take the weights of ``projector``, which ``check_projector`` has accepted."""
        super().__init__()
        first, second = _LINEARS
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


class MergingProjector(torch.nn.Module):
    """A norm, a layer that joins blocks of patches, and a ``FusedProjector`` behind them."""

    def __init__(self, projector: torch.nn.Module, config: transformers.PreTrainedConfig) -> None:
        """Take the weights of ``projector``, which ``check_merging_projector`` has accepted."""
        super().__init__()
        self._merge_size: int = config.spatial_merge_size
        self._patch_size: int = config.vision_config.patch_size
        self._norm = take_norm(projector.get_submodule(_NORM))
        weight = take_parameter(projector.get_submodule(_MERGER), "weight")
        # Its inputs are the patches of a block for each value; ours are the values of each patch.
        by_value = weight.view(len(weight), -1, self._merge_size**2)
        self._merger = PackedLinear(by_value.transpose(1, 2).flatten(1))
        self._projector = FusedProjector(projector, config.projector_hidden_act)

    @property
    def num_packed_bytes(self) -> int:
        """Bytes of the weights, without those of the ``FusedProjector``."""
        return self._norm.num_bytes + self._merger.num_bytes

    def forward(self, states: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
        """Return one row of the language model's width for every block of patches.

        Args:
            states: Patches of all pictures, row by row. [num_patches, width].
            image_sizes: Height and width of each, in pixels. [num_pictures, 2], int64.
        """
        normed = self._norm(states)
        grids = (image_sizes // self._patch_size).tolist()
        pictures = torch.split(normed, [rows * columns for rows, columns in grids])
        blocks = torch.cat(
            [
                self._gather_blocks(picture.view(rows, columns, -1))
                for picture, (rows, columns) in zip(pictures, grids, strict=True)
            ]
        )
        projected: torch.Tensor = self._projector(self._merger(blocks))
        return projected

    def _gather_blocks(self, picture: torch.Tensor) -> torch.Tensor:
        """Return the patches of every block side by side, for [rows, columns, width]."""
        size = self._merge_size
        rows, columns, width = picture.shape
        blocks = picture.view(rows // size, size, columns // size, size, width).transpose(1, 2)
        return blocks.reshape(-1, size**2 * width)


def check_projector(projector: torch.nn.Module, *, has_bias: bool) -> None:
    """Check that a ``FusedProjector`` knows all modules of ``projector``; nothing is changed.

    Raises:
        UnsupportedTowerError: It does not.
    """
    check_linears(projector, _LINEARS, has_bias=has_bias)
    _check_owners(projector, set(_LINEARS))


def check_merging_projector(projector: torch.nn.Module, *, has_bias: bool) -> None:
    """Check that a ``MergingProjector`` knows all modules of ``projector``; nothing is changed.

    Raises:
        UnsupportedTowerError: It does not.
    """
    check_linears(projector, _LINEARS, has_bias=has_bias)
    check_linears(projector, (_MERGER,), has_bias=False)
    check_norm(projector.get_submodule(_NORM))
    _check_owners(projector, {*_LINEARS, _MERGER, _NORM})


def _check_owners(projector: torch.nn.Module, known: set[str]) -> None:
    owners = {name.rpartition(".")[0] for name, _ in projector.named_parameters()}
    if owners != known:
        raise UnsupportedTowerError(f"the projector has other weights: {', '.join(sorted(owners))}")
