"""Keep mappings of memory files that come again; runs in a decode worker."""

from __future__ import annotations

import mmap
import os

# The encoder keeps as many buffers for each worker, of as many bytes: 16 megapixels.
NUM_KEPT = 2
MAX_KEPT_BYTES = 64 << 20


class MediaMappings:
    """The mappings of the newest memory files, whose pages need not be found once more."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], mmap.mmap] = {}

    def of(self, fd: int) -> mmap.mmap:
        """Return the memory of the file behind ``fd``, whose size is sealed.

        Raises:
            OSError: There is no room for it.
        """
        status = os.fstat(fd)
        # While its mapping is kept, no other file can have these numbers.
        identity = (status.st_dev, status.st_ino)
        mapping = self._kept.pop(identity, None) or mmap.mmap(fd, status.st_size)
        if status.st_size <= MAX_KEPT_BYTES:
            self._kept[identity] = mapping
        if len(self._kept) > NUM_KEPT:
            del self._kept[next(iter(self._kept))]
        return mapping
