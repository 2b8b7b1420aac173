"""Read files that lie below the one folder that the operator has opened for media."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from chiasm.common.errors import InvalidRequestError, MediaFetchError
from chiasm.common.limits import check_size

if TYPE_CHECKING:
    from collections.abc import Callable

_SCHEME = "file:"
_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW


def is_file_url(url: str) -> bool:
    """Return whether ``url`` names a file of the server."""
    return url[: len(_SCHEME)].lower() == _SCHEME


class LocalFiles:
    """Reads regular files below a folder; links that lead out of it are not followed.

    Errors never tell whether a file outside the folder exists.
    """

    def __init__(self, folder: Path | None) -> None:
        """Take the folder; ``None`` refuses every file."""
        self._folder = None if folder is None else Path(os.path.realpath(folder))

    async def read(self, url: str, max_bytes: int, charge: Callable[[int], None]) -> bytearray:
        """Return the bytes of the file that ``url`` names.

        Args:
            url: ``file:///PATH``, percent-encoded.
            max_bytes: Most bytes of the file.
            charge: Told the file's size before it is read; may raise.

        Raises:
            InvalidRequestError: No folder is open, the file is not below it, or the URL is
                malformed.
            MediaFetchError: There is no such file, or it cannot be read.
            TooLargeError: The file is over ``max_bytes``.
        """
        if self._folder is None:
            raise _invalid("Cannot load local files without `--allowed-local-media-path`.")
        path = _path_of(url)
        fd = await asyncio.to_thread(_open, path, self._folder)
        try:
            num_bytes = os.fstat(fd).st_size
            check_size(num_bytes, max_bytes, "bytes of media", "url")
            charge(num_bytes)
            return await asyncio.to_thread(_read, fd, num_bytes)
        finally:
            os.close(fd)


def _path_of(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        raise _invalid("The file URL is malformed.") from None
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or not path.startswith("/") or "\0" in path:
        raise _invalid("A file URL must have the form file:///PATH.")
    return path


def _open(path: str, folder: Path) -> int:
    """Return a descriptor of the file; what lies outside ``folder`` is never opened."""
    real = os.path.realpath(path)
    if not Path(real).is_relative_to(folder):
        raise _outside()
    try:
        fd = os.open(real, _OPEN_FLAGS)
    except OSError:
        raise _unreadable() from None
    # A folder of the path may have become a link since it was looked at.
    if not Path(os.readlink(f"/proc/self/fd/{fd}")).is_relative_to(folder):
        os.close(fd)
        raise _outside()
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _unreadable()
    return fd


def _read(fd: int, num_bytes: int) -> bytearray:
    data = bytearray(num_bytes)
    view = memoryview(data)
    num_read = 0
    while num_read < num_bytes:
        count = os.readv(fd, [view[num_read:]])
        if not count:
            raise _unreadable()
        num_read += count
    return data


def _invalid(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, reason="INVALID_MEDIA_URL")


def _outside() -> InvalidRequestError:
    return _invalid("The file path must be a subpath of `--allowed-local-media-path`.")


def _unreadable() -> MediaFetchError:
    return MediaFetchError("Failed to fetch media from URL: the file cannot be read")
