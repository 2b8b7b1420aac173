"""Keep the service token: the secret that callers of internal ports must show.

Internal services believe the tenant they are told, so only the stack's own services may call them.
The token is one line of text in a file of mode 0600.
"""

from __future__ import annotations

import hmac
import secrets
from typing import TYPE_CHECKING

from chiasm.common.private_file import PrivateFileError, create_private, read_private

if TYPE_CHECKING:
    from pathlib import Path

TOKEN_METADATA_KEY = "x-chiasm-service-token"
MIN_TOKEN_CHARS = 32
MAX_TOKEN_CHARS = 512

_TOKEN_BYTES = 32


class ServiceTokenError(Exception):
    """The token file is missing, unreadable, open to others or holds no usable token."""


def load_service_token(path: Path) -> str:
    """Return the token in ``path``; white space around it is ignored.

    Raises:
        ServiceTokenError: The file cannot be read, is open to others, or does not hold 32 to 512
            printable ASCII characters without a space.
    """
    try:
        token = read_private(path, MAX_TOKEN_CHARS + 2).decode("latin-1").strip()
    except PrivateFileError as error:
        raise ServiceTokenError(f"Service token: {error}") from error
    is_printable = token.isascii() and token.isprintable() and " " not in token
    if not MIN_TOKEN_CHARS <= len(token) <= MAX_TOKEN_CHARS or not is_printable:
        raise ServiceTokenError(
            f"Service token: {path} must hold one line of {MIN_TOKEN_CHARS} to {MAX_TOKEN_CHARS}"
            " printable ASCII characters."
        )
    return token


def load_or_create_service_token(path: Path) -> str:
    """Return the token in ``path``, making a random one first if there is no file.

    Of several processes that start at once, one makes the token and all return that one.

    Raises:
        ServiceTokenError: As ``load_service_token``; or the file cannot be written.
    """
    if not path.exists():
        try:
            create_private(path, f"{secrets.token_hex(_TOKEN_BYTES)}\n".encode())
        except PrivateFileError as error:
            raise ServiceTokenError(f"Service token: {error}") from error
    return load_service_token(path)


def is_same_token(expected: str, shown: str) -> bool:
    """Compare two tokens in a time that tells nothing about where they differ."""
    return hmac.compare_digest(expected.encode(), shown.encode("utf-8", "surrogatepass"))
