"""Read and make files that hold a secret, and their folders: whole and closed to other users."""

from __future__ import annotations

import os
import secrets
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class PrivateFileError(Exception):
    """A secret file or its folder cannot be read or made, or is open to others; the text tells."""


def make_private_folder(folder: Path) -> None:
    """Make ``folder`` with mode 0700; one that is there must be private and is left as it is.

    Raises:
        PrivateFileError: It cannot be made, belongs to another user, or others may read or write
            in it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise PrivateFileError(f"{folder} cannot be made: {error.strerror}.") from error
    if status.st_uid != os.geteuid():
        raise PrivateFileError(f"{folder} belongs to another user; choose another folder.")
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise PrivateFileError(
            f"{folder} is open to other users; choose another folder, or chmod it to 0700 if"
            " nobody else needs it."
        )


def read_private(path: Path, max_bytes: int) -> bytes:
    """Return the content of ``path``.

    Args:
        path: File to read.
        max_bytes: Most bytes it may hold; a larger file is refused after reading that many.

    Raises:
        PrivateFileError: The file cannot be read, is too large, or is open to every user.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise PrivateFileError(f"{path} cannot be read: {error.strerror}.") from error
    if mode & stat.S_IRWXO or mode & stat.S_IWGRP:
        raise PrivateFileError(f"{path} holds a secret but is open to others; chmod it to 0600.")
    if len(data) > max_bytes:
        raise PrivateFileError(f"{path} is larger than {max_bytes} bytes.")
    return data


def create_private(path: Path, data: bytes) -> None:
    """Make ``path`` with mode 0600 and content ``data``, unless it exists.

    Of several processes that do this at once, one wins and the others leave its file alone; nobody
    ever sees a part of it.

    Raises:
        PrivateFileError: The file cannot be written.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_and_link(draft, path, data)
    except OSError as error:
        raise PrivateFileError(f"{path} cannot be written: {error.strerror}.") from error


def _write_and_link(draft: Path, path: Path, data: bytes) -> None:
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return
    finally:
        draft.unlink()
