"""What Triton kernels are compiled for."""

from __future__ import annotations

from typing import Any

import triton


def find_architecture(kernel: Any) -> int:
    """Return the compute capability, such as 90, that ``kernel`` is compiled for; 0 if interpreted.

    Args:
        kernel: A function with ``triton.jit``. The current device is asked.
    """
    if not isinstance(kernel, triton.JITFunction):
        return 0
    return int(triton.runtime.driver.active.get_current_target().arch)
