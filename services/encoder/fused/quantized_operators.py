"""Multiply by 8-bit integers in the blocks of a tower on a CPU."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from chiasm.common.packed_linear import activation_of
from chiasm.kernels.cpu.elementwise import ACTIVATIONS
from chiasm.kernels.cpu.quantized_layer import QuantizedLinear
from chiasm.kernels.cpu.weight_panels import WeightMemory

if TYPE_CHECKING:
    import torch

    from chiasm.encoder.fused.block_operators import (
        BlockOperators,
        InnerLinear,
        MakeGated,
        NormRows,
    )
    from chiasm.encoder.fused.norm import Norm
    from chiasm.encoder.fused.segments import Segments
    from chiasm.kernels.cpu.native import CpuKernels


class _InnerLinear(QuantizedLinear):
    def activate(self, rows: torch.Tensor, activation: str) -> torch.Tensor:
        return activation_of(activation)(self(rows))


class QuantizedOperators:
    """The operators of blocks, see ``BlockOperators``, with products of 8-bit integers.

    All but the products is what other operators compute.
    """

    width_multiple = 1

    def __init__(self, others: BlockOperators, kernels: CpuKernels | None) -> None:
        """Multiply by ``kernels``, or oneDNN if there are none; ``others`` computes the rest."""
        self._others = others
        self._kernels = kernels
        self._memory = WeightMemory()

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> QuantizedLinear:
        """See ``BlockOperators.linear``."""
        return QuantizedLinear(weight, bias, kernels=self._kernels, memory=self._memory)

    def inner(self, weight: torch.Tensor, bias: torch.Tensor | None) -> _InnerLinear:
        """See ``BlockOperators.inner``."""
        return _InnerLinear(weight, bias, kernels=self._kernels, memory=self._memory)

    def gated(self, activation: str) -> MakeGated | None:
        """See ``BlockOperators.gated``."""
        if self._kernels is None or activation not in ACTIVATIONS:
            return None
        return partial(QuantizedLinear, kernels=self._kernels, memory=self._memory, gate=activation)

    def norm(self, norm: Norm) -> NormRows:
        """See ``BlockOperators.norm``."""
        return self._others.norm(norm)

    def activate(self, layer: InnerLinear, rows: torch.Tensor, activation: str) -> torch.Tensor:
        """See ``BlockOperators.activate``."""
        return self._others.activate(layer, rows, activation)

    def rotate(self, heads: torch.Tensor, rotation: torch.Tensor) -> None:
        """See ``BlockOperators.rotate``."""
        self._others.rotate(heads, rotation)

    def attend(self, heads: torch.Tensor, segments: Segments) -> torch.Tensor:
        """See ``BlockOperators.attend``."""
        return self._others.attend(heads, segments)
