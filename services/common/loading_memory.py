"""Give back the memory that a process holds after it has loaded a checkpoint, and no longer needs.

Weights are mapped from their files, and most are then packed: copied into the order in which a
processor reads them. Their pages stay, since what is left unpacked, such as the table of
embeddings, keeps the whole mapping alive.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_SMAPS = "/proc/self/smaps"
_MAPPING = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+\s*(.*)")
# What a process has written to in a private mapping is no longer the file's.
_WRITTEN = re.compile(rb"Anonymous:\s+(\d+) kB")

_libc = ctypes.CDLL(None)


def give_back_loading_memory(model_path: Path) -> None:
    """Take the pages of a checkpoint's files out of this process, and return what the heap freed.

    Weights that are still mapped stay valid: their pages come back from the system's cache, or
    from the file, when something reads them. A mapping that was written to is left alone.

    Args:
        model_path: Directory of the checkpoint.
    """
    files = {str(path.resolve()).encode() for path in model_path.glob("*.safetensors")}
    for start, end in list(_clean_mappings(files)):
        _libc.madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(mmap.MADV_DONTNEED)
        )
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(ctypes.c_size_t(0))


def _clean_mappings(files: set[bytes]) -> Iterator[tuple[int, int]]:
    """Yield first address and end of the mappings of ``files`` that hold nothing but the file."""
    found: tuple[int, int] | None = None
    with open(_SMAPS, "rb") as lines:
        for line in lines:
            if mapping := _MAPPING.match(line):
                start, end, name = mapping.groups()
                found = (int(start, 16), int(end, 16)) if name in files else None
            elif found and (written := _WRITTEN.match(line)) and not int(written.group(1)):
                yield found
