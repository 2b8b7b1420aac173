"""Write decoded media into their memory file; runs in a decode worker."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mmap

    from chiasm.encoder.media_mappings import MediaMappings


class MediaWriter:
    """Fills a memory file, either from its start or as memory.

    New files are written and not mapped: touching new pages of a mapping one by one takes longer
    than copying what goes into them. Files that come again are mapped.
    """

    def __init__(self, fd: int, mappings: MediaMappings) -> None:
        """Write to the file behind ``fd``; ``mappings`` knows those that came before."""
        self._fd = fd
        self._mappings = mappings
        self._num_bytes = os.fstat(fd).st_size
        self._num_written = 0

    def memory(self) -> mmap.mmap:
        """Return the whole file as memory, to be filled in place; it holds anything."""
        return self._mappings.of(self._fd)

    @property
    def num_left(self) -> int:
        """Bytes that are still to be written."""
        return self._num_bytes - self._num_written

    def write(self, data: bytes | memoryview) -> None:
        """Append the bytes of ``data``.

        Raises:
            ValueError: The file has no room for them.
            OSError: There is no memory.
        """
        view = memoryview(data).cast("B")
        if len(view) > self.num_left:
            raise ValueError("there is more of it than its header tells")
        while view:
            # NOTE: with an offset; the file may have been written by a worker that died.
            num_bytes = os.pwrite(self._fd, view, self._num_written)
            self._num_written += num_bytes
            view = view[num_bytes:]
