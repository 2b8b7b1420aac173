"""The compiled kernels, where the product looks for them."""

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
from tests.harness.native_build import find_compiler

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module", autouse=True)
def _compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("kernels")
    if find_compiler() is not None:
        (folder / "_native.so").symlink_to(request.getfixturevalue("kernel_library"))
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
