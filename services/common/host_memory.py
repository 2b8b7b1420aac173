"""Allocate memory for embeddings such that filling it costs no more than copying into it."""

from __future__ import annotations

import mmap

_HUGE_PAGE_BYTES = 2 << 20


def allocate(num_bytes: int) -> memoryview:
    """Return zeroed memory that is freed with the last view of it.

    The system hands large fresh memory out page by page while it is filled, which takes ten times
    as long as the copy itself; so large memory asks for huge pages, where the system has them.

    Args:
        num_bytes: Size; its caller has checked it.

    Returns:
        A writable view of bytes.
    """
    if num_bytes < _HUGE_PAGE_BYTES:
        return memoryview(bytearray(num_bytes))
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            return memoryview(memory)  # a kernel without huge pages; small ones do too
    return memoryview(memory)
