"""The compiled kernels, for each instruction set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chiasm.kernels.cpu.native import LEVELS, CpuKernels, KernelsUnavailableError, Level

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(params=LEVELS)
def kernels(request: pytest.FixtureRequest, kernel_library: Path) -> CpuKernels:
    """Return the kernels for each instruction set of this machine."""
    level: Level = request.param
    try:
        return CpuKernels(kernel_library, level)
    except KernelsUnavailableError as error:
        pytest.skip(str(error))
