"""Choose who multiplies by the weights of the fused decoder."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

import torch

from chiasm.common.packed_linear import PackedLinear
from chiasm.generator.model.fused.description import UnsupportedDecoderError
from chiasm.generator.model.fused.quantized_linear import QuantizedLinear, can_quantize
from chiasm.generator.model.fused.tiled_linear import TiledLinear
from chiasm.kernels.cpu.native import CpuKernels
from chiasm.kernels.cpu.weight_panels import WeightMemory

if TYPE_CHECKING:
    from chiasm.generator.model.fused.layer_weights import MakeLinear
    from chiasm.generator.model.kv_cache import KVCache

Quantization = Literal["none", "w8a8"]


def choose_linear(cache: KVCache, quantization: Quantization) -> MakeLinear:
    """Return what lays out a weight and its bias.

    Without quantization our kernel multiplies where the processor has tiles for bfloat16, and
    oneDNN elsewhere on a CPU.

    Args:
        cache: Where the decoder keeps keys and values.
        quantization: ``w8a8`` multiplies by 8-bit integers.

    Raises:
        UnsupportedDecoderError: The device has no such products.
    """
    kernels = cache.kernels if isinstance(cache.kernels, CpuKernels) else None
    if quantization == "w8a8":
        if not can_quantize(cache.keys[0].device, kernels):
            raise UnsupportedDecoderError("w8a8 needs a CPU, and our kernels or oneDNN")
        return partial(QuantizedLinear, kernels=kernels, memory=WeightMemory())
    if kernels and kernels.tiled and cache.keys[0].dtype is torch.bfloat16:
        return partial(TiledLinear, kernel=kernels.tiled, memory=WeightMemory())
    return PackedLinear
