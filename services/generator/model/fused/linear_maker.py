"""Choose who multiplies by the weights of the fused decoder, and lay them out."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from chiasm.common.gate_after import GateAfter
from chiasm.common.packed_linear import PackedLinear
from chiasm.generator.model.fused.description import UnsupportedDecoderError
from chiasm.kernels.cpu.elementwise import ACTIVATIONS
from chiasm.kernels.cpu.native import CpuKernels
from chiasm.kernels.cpu.quantized_layer import Quantization, QuantizedLinear, can_quantize
from chiasm.kernels.cpu.tiled_linear import TiledLinear
from chiasm.kernels.cpu.weight_panels import WeightMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from chiasm.generator.model.fused.layer_operators import Gate
    from chiasm.generator.model.kv_cache import KVCache

    Linear = PackedLinear | QuantizedLinear | TiledLinear

# Rows for which oneDNN is asked to choose its layout; the layout serves any number of rows.
_TYPICAL_ROWS = 512


class LinearMaker:
    """Makes the linear layers of one decoder.

    Without quantization our kernel multiplies where the processor has tiles for bfloat16, and
    oneDNN elsewhere on a CPU.
    """

    def __init__(self, cache: KVCache, quantization: Quantization) -> None:
        """Choose who multiplies.

        Args:
            cache: Where the decoder keeps keys and values.
            quantization: ``w8a8`` multiplies by 8-bit integers.

        Raises:
            UnsupportedDecoderError: The device has no such products.
        """
        kernels = cache.kernels if isinstance(cache.kernels, CpuKernels) else None
        self._gates_itself = kernels is not None
        self._make: Callable[..., Linear]
        if quantization == "w8a8":
            if not can_quantize(cache.keys[0].device, kernels):
                raise UnsupportedDecoderError("w8a8 needs a CPU, and our kernels or oneDNN")
            self._make = partial(QuantizedLinear, kernels=kernels, memory=WeightMemory())
        elif kernels and kernels.tiled and cache.keys[0].dtype is torch.bfloat16:
            self._make = partial(TiledLinear, kernel=kernels.tiled, memory=WeightMemory())
        else:
            self._gates_itself = False
            self._make = PackedLinear

    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, typical_rows: int = _TYPICAL_ROWS
    ) -> Linear:
        """Return a linear layer.

        Args:
            weight: [num_outputs, num_inputs].
            bias: [num_outputs], or ``None``.
            typical_rows: Rows that it is mostly called with.
        """
        return self._make(weight, bias, typical_rows)

    def gated(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str,
        make_gate: Callable[[int], Gate],
    ) -> Linear | GateAfter:
        """Return a linear layer whose outputs are gated.

        Args:
            weight: Of the gates and then of their factors. [2 * width, num_inputs].
            bias: [2 * width], or ``None``.
            activation: Name of the gate's function, as transformers spells it.
            make_gate: Makes a gate from its width; called if the product does not gate itself.
        """
        if self._gates_itself and activation in ACTIVATIONS:
            return self._make(weight, bias, _TYPICAL_ROWS, gate=activation)
        return GateAfter(self.linear(weight, bias), make_gate(len(weight) // 2))
