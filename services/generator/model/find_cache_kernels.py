"""Find the kernels that read a KV cache where it lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.kernels.cpu.native import DTYPES, find_kernels
from chiasm.kernels.find_triton_kernels import find_triton_kernels

if TYPE_CHECKING:
    import torch

    from chiasm.kernels.cache_kernels import CacheKernels
    from chiasm.kernels.cpu.native import KernelChoice


def find_cache_kernels(
    device: torch.device, dtype: torch.dtype, choice: KernelChoice
) -> CacheKernels | None:
    """Return the kernels for a cache, or ``None`` for torch, and log which.

    Args:
        device: Where the cache lies.
        dtype: Of the cache.
        choice: Which compiled kernels are taken on a CPU; see ``find_kernels``.

    Raises:
        KernelsUnavailableError: An instruction set was asked for that cannot be had.
    """
    if device.type == "cuda":
        return find_triton_kernels(device, "chiasm.generator")
    if device.type == "cpu" and dtype in DTYPES:
        return find_kernels(choice)
    return None
