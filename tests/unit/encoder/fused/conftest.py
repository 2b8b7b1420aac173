"""The compiled kernels, once per run, where the product looks for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chiasm.kernels.cpu import native
from chiasm.kernels.cpu.native import (
    LEVELS,
    KernelChoice,
    KernelsUnavailableError,
    Level,
    find_kernels,
)
from tests.harness.native_build import compile_kernels, find_compiler

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """Compile the kernels; ``None`` without a compiler."""
    if find_compiler() is None:
        return None
    library = compile_kernels(tmp_path_factory.mktemp("native"))
    return library.rename(library.with_name("_native.so"))


@pytest.fixture(scope="module", autouse=True)
def _compiled(library: Path | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("none") if library is None else library.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "__file__", str(folder / "native.py"))
        yield


@pytest.fixture(scope="module", params=["off", *LEVELS])
def kernels(request: pytest.FixtureRequest) -> KernelChoice:
    """Name each instruction set that there is, and ``off``."""
    choice: KernelChoice = request.param
    _skip_unless_available(choice)
    return choice


@pytest.fixture(scope="module", params=LEVELS)
def level(request: pytest.FixtureRequest) -> Level:
    """Name each instruction set that there is."""
    level: Level = request.param
    _skip_unless_available(level)
    return level


def _skip_unless_available(choice: KernelChoice) -> None:
    try:
        find_kernels(choice)
    except KernelsUnavailableError as error:
        pytest.skip(str(error))
