"""Fixtures of unit tests: compiled kernels, and where those of Triton run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests.harness.native_build import compile_kernels, find_compiler


@pytest.fixture(scope="session")
def kernel_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the kernels, or take those that the parent process has compiled."""
    if "KERNELS_UNDER_TEST" in os.environ:
        return Path(os.environ["KERNELS_UNDER_TEST"])
    if find_compiler() is None:
        pytest.skip("no C++ compiler")
    # Workers of one run have folders of their own beside each other, and compile once.
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    library = folder / "native" / "kernels.so"
    with FileLock(folder / "native.lock"):
        if not library.exists():
            library.parent.mkdir()
            compile_kernels(library.parent)
    return library


@pytest.fixture(scope="session")
def triton_device() -> str:
    """Return where Triton's kernels run: on a CPU, in its interpreter, or on a GPU."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch uses, and one that turns the interpreter off")
    return "cuda"
