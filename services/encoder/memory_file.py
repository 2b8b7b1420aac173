"""Hold the source and the decoded media of an item in anonymous memory files.

A memory file can be handed to another process without copying it. It is sealed at its size before
it is: a process gone wrong can neither grow it nor shrink it under our feet.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref


class MemoryFile:
    """An anonymous file in memory, of fixed size; freed when nothing refers to it any more."""

    def __init__(self, num_bytes: int) -> None:
        """Make a file of ``num_bytes`` zero bytes; at least one."""
        self._num_bytes = num_bytes
        self._fd = os.memfd_create("chiasm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self._fd)
        os.ftruncate(self._fd, num_bytes)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)

    @classmethod
    def of_bytes(cls, data: bytes | bytearray) -> MemoryFile:
        """Return a read-only file that holds ``data``."""
        memory = cls(len(data))
        rest = memoryview(data)
        while rest:
            # Written, not mapped: touching new pages one by one takes longer than the copy.
            rest = rest[os.pwrite(memory._fd, rest, len(data) - len(rest)) :]
        fcntl.fcntl(memory._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        return memory

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self._num_bytes

    @property
    def fd(self) -> int:
        """Descriptor to hand to another process."""
        return self._fd

    def map(self) -> mmap.mmap:
        """Return the contents, writable; the mapping outlives the file."""
        return mmap.mmap(self._fd, self._num_bytes)
