"""Find the kernels that read a KV cache where it lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from chiasm.kernels.cpu.native import DTYPES, find_kernels

if TYPE_CHECKING:
    import torch

    from chiasm.kernels.cache_kernels import CacheKernels
    from chiasm.kernels.cpu.native import KernelChoice

_REMEDY = "install triton (make TORCH=cuda) and, for its launchers, a C compiler"

log = structlog.get_logger("chiasm.generator")


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
        return _find_triton_kernels(device)
    if device.type == "cpu" and dtype in DTYPES:
        return find_kernels(choice)
    return None


def _find_triton_kernels(device: torch.device) -> CacheKernels | None:
    try:
        # Triton comes with CUDA builds of torch alone.
        from chiasm.kernels.triton_kernels import TritonKernels  # noqa: PLC0415

        kernels = TritonKernels()
        kernels.check(device)
    # Triton and the compilers that it calls raise anything.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        log.warning("gpu_kernels_chosen", kernels="torch", reason=reason, remedy=_REMEDY)
        return None
    log.info("gpu_kernels_chosen", kernels="triton")
    return kernels
