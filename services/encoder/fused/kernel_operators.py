"""Compute blocks with our kernels for CPUs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from chiasm.common.packed_linear import PackedLinear
from chiasm.common.rms_norm import RMSNorm
from chiasm.encoder.fused.linear import activate
from chiasm.kernels.cache_kernels import PrefillRule
from chiasm.kernels.cpu.elementwise import ACTIVATIONS, NormRule, PairRule
from chiasm.kernels.cpu.tiled_linear import TiledLinear
from chiasm.kernels.cpu.weight_panels import WeightMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from chiasm.encoder.fused.block_operators import InnerLinear, Linear, MakeGated, NormRows
    from chiasm.encoder.fused.description import BlockDescription
    from chiasm.encoder.fused.norm import Norm
    from chiasm.encoder.fused.segments import Segments
    from chiasm.kernels.cpu.native import CpuKernels


class KernelOperators:
    """The operators of blocks; see ``BlockOperators``. Rows are bfloat16 or float32.

    A segment is a context of its own, whose keys and values are read where the projection left
    them; what a row attends to depends on its own segment alone, to the bit.
    """

    width_multiple = 1

    def __init__(
        self, kernels: CpuKernels, description: BlockDescription, dtype: torch.dtype
    ) -> None:
        """Prepare the operators of the blocks that ``description`` tells of."""
        num_heads, head_dim = description.num_heads, description.head_dim
        self._kernels = kernels
        self._dtype = dtype
        self._pair_rule = PairRule((3 * num_heads, 2 * num_heads, head_dim), dtype)
        self._score_rule = PrefillRule(block_size=1, scale=head_dim**-0.5)
        self._tiled: Callable[..., TiledLinear] | None = None
        if kernels.tiled is not None and dtype is torch.bfloat16:
            self._tiled = partial(TiledLinear, kernel=kernels.tiled, memory=WeightMemory())

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """See ``BlockOperators.linear``; tiles multiply bfloat16, where the processor has any."""
        return (self._tiled or PackedLinear)(weight, bias)

    def inner(self, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
        """See ``BlockOperators.inner``."""
        return PackedLinear(weight, bias)

    def gated(self, activation: str) -> MakeGated | None:
        """See ``BlockOperators.gated``."""
        if self._tiled is None or activation not in ACTIVATIONS:
            return None
        return partial(self._tiled, gate=activation)

    def norm(self, norm: Norm) -> NormRows:
        """See ``BlockOperators.norm``; a layer norm is one operator of torch already."""
        if not isinstance(norm, RMSNorm):
            return norm
        rule = NormRule(norm.weight, norm.epsilon, self._dtype)
        return partial(self._kernels.elementwise.add_rms_norm, rule, addend=None)

    def activate(self, layer: InnerLinear, rows: torch.Tensor, activation: str) -> torch.Tensor:
        """See ``BlockOperators.activate``; products apply the other functions themselves."""
        if activation == "quick_gelu":
            return self._kernels.elementwise.quick_gelu(layer(rows))
        return activate(layer, rows, activation)

    def rotate(self, heads: torch.Tensor, rotation: torch.Tensor) -> None:
        """See ``BlockOperators.rotate``."""
        self._kernels.elementwise.turn_pairs(self._pair_rule, heads.flatten(1), rotation)

    def attend(self, heads: torch.Tensor, segments: Segments) -> torch.Tensor:
        """See ``BlockOperators.attend``."""
        query, key, value = heads.unbind(1)
        attended = heads.new_empty(query.shape)
        self._kernels.paged_prefill(
            query, (key, value), segments.contexts, self._score_rule, attended
        )
        return attended.flatten(1)
