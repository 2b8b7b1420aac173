"""Tell a client which fields of its request had no effect."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_LISTED_CHARS = 2048
_MAX_PATH_CHARS = 128
_SEPARATOR = ", "
_MORE = "..."
_UNSAFE = re.compile(r"[^A-Za-z0-9_.\[\]-]")


def list_ignored(paths: Iterable[str]) -> tuple[str, ...]:
    """Return ``paths`` as a header can carry them, ``MAX_LISTED_CHARS`` at most when joined.

    Characters that plain names do not have become ``?``; what is too much becomes one ``...``.
    """
    names: list[str] = []
    room = MAX_LISTED_CHARS - len(_MORE)
    for path in paths:
        name = _UNSAFE.sub("?", path[:_MAX_PATH_CHARS])
        room -= len(name) + len(_SEPARATOR)
        if room < 0:
            return (*names, _MORE)
        names.append(name)
    return tuple(names)
