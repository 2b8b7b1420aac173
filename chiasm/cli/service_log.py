"""Keep what a service writes in a file of bounded size."""

from __future__ import annotations

import contextlib
import io
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class ServiceLog:
    """A log file that moves to ``<name>.1`` when it is full, so two files bound its size."""

    def __init__(self, path: Path, max_bytes: int = 16 << 20) -> None:
        """Start an empty file at ``path``, readable by its owner only."""
        self.path = path
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._file = self._open()

    def write(self, text: str) -> None:
        """Append one line.

        Raises:
            OSError: The line could not be kept, or not all of it; later ones are tried anew.
        """
        data = text.encode("utf-8", "replace") + b"\n"
        if self._file.closed or self._num_bytes + len(data) > self._max_bytes:
            self._start_next_file()
        self._num_bytes += self._file.write(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _start_next_file(self) -> None:
        self._file.close()
        # It is not there if an earlier attempt moved it and then could not make the next one.
        with contextlib.suppress(FileNotFoundError):
            self.path.replace(self.path.with_name(f"{self.path.name}.1"))
        self._file = self._open()
        self._num_bytes = 0

    def _open(self) -> io.FileIO:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        # Without a buffer, so that a line which cannot be written is not kept for the next one.
        return io.FileIO(descriptor, "wb")
