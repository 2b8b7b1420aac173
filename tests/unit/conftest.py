"""Fixtures of unit tests: the kernels for CPUs, compiled once per run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.harness.native_build import compile_kernels, find_compiler


@pytest.fixture(scope="session")
def kernel_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the kernels, or take those that the parent process has compiled."""
    if "KERNELS_UNDER_TEST" in os.environ:
        return Path(os.environ["KERNELS_UNDER_TEST"])
    if find_compiler() is None:
        pytest.skip("no C++ compiler")
    return compile_kernels(tmp_path_factory.mktemp("native"))
