"""Find pictures that stand in a text as ``<image>BASE64</image>``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_OPEN, _CLOSE = "<image>", "</image>"
_MIN_BASE64_CHARS = 32
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")


@dataclass(frozen=True, slots=True)
class InlineImage:
    """The base64 of a picture."""

    content: str


def split_inline_images(text: str) -> Iterator[str | InlineImage]:
    """Yield the pieces of ``text`` in their order; empty texts are left out.

    What stands between the marks is a picture only if all of it is base64, at least 32 characters
    with its padding; otherwise the marks are text like any other. Takes time in proportion to the
    text.
    """
    end = 0
    start = text.find(_OPEN)
    while start >= 0:
        close = text.find(_CLOSE, start)
        if close < 0:
            break
        # Of several opening marks the last one belongs to the closing mark.
        start = text.rfind(_OPEN, start, close)
        content = text[start + len(_OPEN) : close].strip()
        after = close + len(_CLOSE)
        if _is_base64(content):
            if start > end:
                yield text[end:start]
            yield InlineImage(content)
            end = after
        start = text.find(_OPEN, after)
    if end < len(text) or not text:
        yield text[end:]


def _is_base64(content: str) -> bool:
    return (
        len(content) >= _MIN_BASE64_CHARS
        and len(content) % 4 == 0
        and _BASE64.fullmatch(content) is not None
    )
