"""Keep the memory that a worker decodes pictures into: new memory takes longer than the decoding.

Who may use a buffer when::

    kept ──take──▶ the worker writes ──reply──▶ the encoder reads ──free──▶ kept
                        │                             │
                  the worker ends           a tensor still looks at it
                        ▼                             ▼
                     dropped                       dropped

Why that is as safe as memory of one picture's own: a buffer serves one worker as long as that
lives, and is dropped with it. A worker that a file has taken over could write to a buffer behind
its reply, but only to those that it decodes into: it alters what it could have told wrongly, and
sees what it was given to decode. The encoder takes no size or offset from a buffer, and every byte
is a valid colour, so a change under its eyes makes another picture and no more. The files are
sealed at their sizes. A sound worker writes every byte of a picture, so nothing of the one before
is left; what may stay unwritten, such as the end of a sound, gets new memory.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from chiasm.encoder.media_mappings import MAX_KEPT_BYTES, NUM_KEPT
from chiasm.encoder.memory_file import MemoryFile

if TYPE_CHECKING:
    from collections.abc import Callable


class MediaBuffer:
    """A memory file and this process's mapping of it."""

    def __init__(self, num_bytes: int) -> None:
        """Make a buffer of ``num_bytes`` zero bytes; at least one."""
        self._file = MemoryFile(num_bytes)
        self._mapping = self._file.map()

    @property
    def num_bytes(self) -> int:
        """Size of the buffer."""
        return self._file.num_bytes

    @property
    def fd(self) -> int:
        """Descriptor to hand to the worker."""
        return self._file.fd

    def lend(self, num_bytes: int) -> np.ndarray:
        """Return the first ``num_bytes`` bytes, as an array that all views of them keep alive."""
        return np.frombuffer(self._mapping, np.uint8, num_bytes)

    def close(self) -> None:
        """Free the memory; no view of it may be left. Takes milliseconds per megabyte."""
        self._mapping.close()


class DecodedMedia:
    """The bytes of decoded media, to be freed by who has read them; one thread at a time."""

    def __init__(
        self, buffer: MediaBuffer, num_bytes: int, take_back: Callable[[MediaBuffer], None]
    ) -> None:
        """Show the first ``num_bytes`` of ``buffer``, which goes to ``take_back`` when freed."""
        self._buffer: MediaBuffer | None = buffer
        self._take_back = take_back
        lent = buffer.lend(num_bytes)
        self._memory = lent.data
        self._lent = weakref.ref(lent)

    @property
    def memory(self) -> memoryview:
        """The bytes; valid until they are freed."""
        return self._memory

    def free(self) -> None:
        """Give the memory back; where something still looks at it, it is freed with that."""
        with suppress(BufferError):
            self._memory.release()
        # NOTE: who has a memoryview of the memory, and no array, is known by this alone.
        if self._lent() is None and self._buffer is not None:
            self._take_back(self._buffer)
        self._buffer = None


class MediaBuffers:
    """The buffers of one worker that nobody uses: at most ``NUM_KEPT``, the largest ones.

    None has more than ``MAX_KEPT_BYTES``.
    """

    def __init__(self) -> None:
        # Buffers come back in the threads that have read them.
        self._lock = threading.Lock()
        self._kept: list[MediaBuffer] = []

    def take(self, num_bytes: int) -> MediaBuffer:
        """Return a buffer of at least ``num_bytes``, which holds anything."""
        with self._lock:
            fitting = [buffer for buffer in self._kept if buffer.num_bytes >= num_bytes]
            if fitting:
                smallest = min(fitting, key=lambda buffer: buffer.num_bytes)
                self._kept.remove(smallest)
                return smallest
        return MediaBuffer(num_bytes)

    def give_back(self, buffer: MediaBuffer) -> None:
        """Keep a buffer that was taken, or free its memory."""
        with self._lock:
            candidates = sorted([*self._kept, buffer], key=lambda kept: kept.num_bytes)
            fitting = [kept for kept in candidates if kept.num_bytes <= MAX_KEPT_BYTES]
            self._kept = fitting[-NUM_KEPT:]
            dropped = [each for each in candidates if each not in self._kept]
        for each in dropped:
            each.close()
