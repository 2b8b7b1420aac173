"""Choose who computes the blocks of a tower."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.encoder.fused.gpu_operators import GpuOperators
from chiasm.encoder.fused.kernel_operators import KernelOperators
from chiasm.encoder.fused.quantized_operators import QuantizedOperators
from chiasm.encoder.fused.torch_operators import TorchOperators
from chiasm.kernels.cpu.native import CpuKernels

if TYPE_CHECKING:
    import torch

    from chiasm.encoder.fused.block_operators import BlockOperators
    from chiasm.encoder.fused.description import BlockDescription
    from chiasm.kernels.cpu.quantized_layer import Quantization
    from chiasm.kernels.triton_kernels import TritonKernels


def make_operators(
    kernels: CpuKernels | TritonKernels | None, description: BlockDescription, dtype: torch.dtype
) -> BlockOperators:
    """Return the operators of blocks; without ``kernels`` those of torch."""
    if kernels is None:
        return TorchOperators()
    if isinstance(kernels, CpuKernels):
        return KernelOperators(kernels, description, dtype)
    return GpuOperators(kernels, description)


def quantize(
    operators: BlockOperators,
    kernels: CpuKernels | TritonKernels | None,
    quantization: Quantization,
) -> BlockOperators:
    """Return ``operators`` with products of 8-bit integers, if ``quantization`` asks for them.

    Args:
        operators: What ``make_operators`` has returned for ``kernels``.
        kernels: Kernels for the device of the tower; ``None`` if there are none.
        quantization: How weights are held; all but ``none`` needs a CPU.
    """
    if quantization == "none":
        return operators
    assert kernels is None or isinstance(kernels, CpuKernels), "checked before anything is taken"
    return QuantizedOperators(operators, kernels)
