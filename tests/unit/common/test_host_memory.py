"""Tests of ``chiasm.common.host_memory``."""

from __future__ import annotations

import mmap

import pytest

from chiasm.common.host_memory import allocate


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, (2 << 20) - 1, 2 << 20, 5_000_001])
def test_memory_has_the_size_is_zero_and_can_be_written(num_bytes: int) -> None:
    memory = allocate(num_bytes)

    assert (memory.nbytes, memory.format, memory.readonly) == (num_bytes, "B", False)
    assert memory == bytes(num_bytes)
    memory[:] = b"x" * num_bytes
    assert memory == b"x" * num_bytes


def test_memory_outlives_the_view_that_it_came_with() -> None:
    memory = allocate(3 << 20)
    end = memory[-4:].toreadonly()
    memory[-4:] = b"last"
    del memory

    assert bytes(end) == b"last"


def test_kernel_without_huge_pages_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 1 << 20, raising=False)

    assert allocate(2 << 20).nbytes == 2 << 20
