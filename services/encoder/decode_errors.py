"""Errors that decoders tell apart from a file that is merely broken."""

from __future__ import annotations


class MediaTooLargeError(Exception):
    """The file announces or holds more than allowed; the text, which is our own, says of what."""
