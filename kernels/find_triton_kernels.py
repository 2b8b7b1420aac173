"""Find the kernels for GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    import torch

    from chiasm.kernels.triton_kernels import TritonKernels

_REMEDY = "install triton (make TORCH=cuda) and, for its launchers, a C compiler"


def find_triton_kernels(device: torch.device, logger: str) -> TritonKernels | None:
    """Return the kernels for a GPU, or ``None`` where they do not run, and log which.

    Args:
        device: The GPU.
        logger: Whose log it is.
    """
    log = structlog.get_logger(logger)
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
