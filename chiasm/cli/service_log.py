"""Keep what a service writes in a file of bounded size."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, BinaryIO

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
        """Append one line."""
        data = text.encode("utf-8", "replace") + b"\n"
        if self._num_bytes + len(data) > self._max_bytes:
            self._file.close()
            self.path.replace(self.path.with_name(f"{self.path.name}.1"))
            self._file = self._open()
            self._num_bytes = 0
        self._file.write(data)
        self._file.flush()
        self._num_bytes += len(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _open(self) -> BinaryIO:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        return os.fdopen(descriptor, "wb")
