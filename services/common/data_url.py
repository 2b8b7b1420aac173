"""Read the bytes out of base64, alone or in data URLs."""

from __future__ import annotations

import binascii

import pybase64

from chiasm.common.errors import InvalidRequestError
from chiasm.common.limits import check_size

_SCHEME = "data:"


def is_data_url(url: str) -> bool:
    """Return whether ``url`` carries its content itself."""
    return url[: len(_SCHEME)].lower() == _SCHEME


def decode_data_url(url: str, *, max_bytes: int, param: str) -> bytes:
    """Return the bytes of a base64 data URL.

    The size is checked before anything is decoded. Slow for large URLs: call it in a thread.

    Args:
        url: ``data:[media type];base64,CONTENT``; the media type is not looked at.
        max_bytes: Most bytes after decoding.
        param: Path of the part at fault, for errors.

    Raises:
        InvalidRequestError: The URL is malformed.
        TooLargeError: The content is over ``max_bytes``.
    """
    head, comma, content = url.partition(",")
    if not comma:
        raise _invalid(f"Invalid data URL '{_shorten(url)}': missing ',' separator.", param)
    if not head.lower().endswith(";base64"):
        raise _invalid("Only base64 data URLs are supported for now.", param)
    if not content:
        raise _invalid("The data URL has no content.", param)
    return decode_base64(content, max_bytes=max_bytes, what="The data URL", param=param)


def decode_base64(content: str, *, max_bytes: int, what: str, param: str) -> bytes:
    """Return the bytes of base64; their number is checked before anything is decoded.

    Args:
        content: The base64, with its padding.
        max_bytes: Most bytes after decoding.
        what: What holds the base64, as the start of a sentence.
        param: Path of the part at fault, for errors.

    Raises:
        InvalidRequestError: It is not valid base64.
        TooLargeError: The content is over ``max_bytes``.
    """
    check_size(len(content) // 4 * 3, max_bytes + 2, "bytes of media", param)
    try:
        data = pybase64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _invalid(f"{what} is not valid base64: {_reason(error)}", param) from error
    check_size(len(data), max_bytes, "bytes of media", param)
    return data


def _reason(error: Exception) -> str:
    text = str(error) or "unreadable"
    return text if text.endswith(".") else f"{text}."


def _shorten(url: str) -> str:
    return url if len(url) <= 32 else f"{url[:32]}…"


def _invalid(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(message, reason="INVALID_MEDIA_URL", param=param)
