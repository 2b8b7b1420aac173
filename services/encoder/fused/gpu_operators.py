"""Compute blocks with our kernels for GPUs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from chiasm.common.gate_after import GateAfter
from chiasm.common.packed_linear import PackedLinear
from chiasm.common.rms_norm import RMSNorm
from chiasm.encoder.fused.linear import activate
from chiasm.kernels.cache_kernels import PrefillRule

if TYPE_CHECKING:
    from chiasm.encoder.fused.block_operators import InnerLinear, MakeGated, NormRows
    from chiasm.encoder.fused.description import BlockDescription
    from chiasm.encoder.fused.norm import Norm
    from chiasm.encoder.fused.segments import Segments
    from chiasm.kernels.triton_kernels import TritonKernels


class GpuOperators:
    """The operators of blocks, each one launch besides the products; see ``BlockOperators``.

    A segment is a context of its own, whose keys and values are read where the projection left
    them. Nothing waits for the device.
    """

    # Rows of 16 bytes: without them, as with the 3,420 values of Qwen2.5-VL, cuBLAS falls back to
    # kernels of an older generation, which took 58 instead of some 15 microseconds on an H200.
    width_multiple = 8

    def __init__(self, kernels: TritonKernels, description: BlockDescription) -> None:
        """Prepare the operators of the blocks that ``description`` tells of."""
        self._kernels = kernels
        self._num_turned = 2 * description.num_heads
        self._score_rule = PrefillRule(block_size=1, scale=description.head_dim**-0.5)

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
        """See ``BlockOperators.linear``."""
        return PackedLinear(weight, bias)

    def inner(self, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
        """See ``BlockOperators.inner``."""
        return PackedLinear(weight, bias)

    def gated(self, activation: str) -> MakeGated | None:
        """See ``BlockOperators.gated``; the gate is a launch of its own."""
        if not self._kernels.can_gate(activation):
            return None
        gate = partial(self._kernels.gate, activation=activation)
        return lambda weight, bias: GateAfter(PackedLinear(weight, bias), gate)

    def norm(self, norm: Norm) -> NormRows:
        """See ``BlockOperators.norm``; a layer norm is one operator of torch already."""
        if not isinstance(norm, RMSNorm):
            return norm
        kernels, weight, epsilon = self._kernels, norm.weight.contiguous(), norm.epsilon
        return lambda rows: kernels.add_rms_norm(rows, None, weight, epsilon, 1.0)

    def activate(self, layer: InnerLinear, rows: torch.Tensor, activation: str) -> torch.Tensor:
        """See ``BlockOperators.activate``."""
        return activate(layer, rows, activation)

    def rotate(self, heads: torch.Tensor, rotation: torch.Tensor) -> None:
        """See ``BlockOperators.rotate``."""
        self._kernels.turn_pairs(heads.flatten(1, 2), self._num_turned, rotation)

    def attend(self, heads: torch.Tensor, segments: Segments) -> torch.Tensor:
        """See ``BlockOperators.attend``."""
        query, key, value = heads.unbind(1)
        attended = torch.empty(query.shape, dtype=heads.dtype, device=heads.device)
        self._kernels.paged_prefill(
            query, (key, value), segments.contexts, self._score_rule, attended
        )
        return attended.flatten(1)
