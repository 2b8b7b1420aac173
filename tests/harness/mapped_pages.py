"""Tell what of a file this process has in its memory."""

from __future__ import annotations

from pathlib import Path


def num_mapped_bytes(path: Path) -> int:
    """Return the bytes of the pages of the file at ``path`` that this process has mapped."""
    name, num_bytes, is_it = str(path.resolve()), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split()
        if not key.endswith(":"):
            is_it = line.endswith(name)
        elif is_it and key == "Rss:":
            num_bytes += int(values[0]) * 1024
    return num_bytes
