"""The compiled kernels, once per run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chiasm.kernels.cpu.native import LEVELS, CpuKernels, KernelsUnavailableError, Level
from tests.harness.native_build import compile_kernels, find_compiler


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the kernels, or take those that the parent process has compiled."""
    if "KERNELS_UNDER_TEST" in os.environ:
        return Path(os.environ["KERNELS_UNDER_TEST"])
    if find_compiler() is None:
        pytest.skip("no C++ compiler")
    return compile_kernels(tmp_path_factory.mktemp("native"))


@pytest.fixture(params=LEVELS)
def kernels(request: pytest.FixtureRequest, library: Path) -> CpuKernels:
    """Return the kernels for each instruction set of this machine."""
    level: Level = request.param
    try:
        return CpuKernels(library, level)
    except KernelsUnavailableError as error:
        pytest.skip(str(error))
