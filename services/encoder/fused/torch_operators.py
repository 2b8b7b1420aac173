"""Compute what lies between the matrix products of a block with torch, on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import scaled_dot_product_attention

from chiasm.common.packed_linear import PackedLinear
from chiasm.encoder.fused.linear import activate
from chiasm.encoder.fused.rotary import rotate

if TYPE_CHECKING:
    import torch

    from chiasm.encoder.fused.block_operators import InnerLinear, NormRows
    from chiasm.encoder.fused.norm import Norm
    from chiasm.encoder.fused.segments import Segments


class TorchOperators:
    """The operators of blocks; see ``BlockOperators``. Segments of a length attend in one call."""

    width_multiple = 1

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
        """See ``BlockOperators.linear``."""
        return PackedLinear(weight, bias)

    def inner(self, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
        """See ``BlockOperators.inner``."""
        return PackedLinear(weight, bias)

    def gated(self, activation: str) -> None:
        """See ``BlockOperators.gated``; products apply the function alone."""

    def norm(self, norm: Norm) -> NormRows:
        """See ``BlockOperators.norm``."""
        return norm

    def activate(self, layer: InnerLinear, rows: torch.Tensor, activation: str) -> torch.Tensor:
        """See ``BlockOperators.activate``."""
        return activate(layer, rows, activation)

    def rotate(self, heads: torch.Tensor, rotation: torch.Tensor) -> None:
        """See ``BlockOperators.rotate``."""
        rotate(heads, rotation)

    def attend(self, heads: torch.Tensor, segments: Segments) -> torch.Tensor:
        """See ``BlockOperators.attend``."""
        first = segments.groups[0]
        if first.rows is None:
            return _attend_equal(heads, first.length)
        attended = heads.new_empty(len(heads), heads.shape[2] * heads.shape[3])
        for group in segments.groups:
            assert group.rows is not None, "several groups name their rows"
            attended[group.rows] = _attend_equal(heads[group.rows], group.length)
        return attended


def _attend_equal(heads: torch.Tensor, length: int) -> torch.Tensor:
    num_rows, _, num_heads, head_dim = heads.shape
    parts = heads.view(-1, length, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4)
    query, key, value = parts.unbind(0)
    attended = scaled_dot_product_attention(query, key, value)
    return attended.transpose(1, 2).reshape(num_rows, num_heads * head_dim)
