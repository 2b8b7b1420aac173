"""Tell the tenant of a caller by its API key."""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import TYPE_CHECKING

from chiasm.common.errors import UnauthenticatedError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

DEFAULT_TENANT = "default"

_TENANT = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_SCHEME = "bearer "
_HEADER_RULE = (
    "must be printable ASCII without blanks at its ends: clients cannot show another in a header"
)


class ApiKeysError(Exception):
    """A key could never be shown, or the file of keys cannot be read, is malformed or has none."""


class ApiKeys:
    """The keys that callers may show, by tenant. Without any key everyone may call."""

    def __init__(self, tenant_of_key: dict[str, str]) -> None:
        self._tenant_of_digest = {_digest(key): tenant for key, tenant in tenant_of_key.items()}

    @classmethod
    def load(cls, keys: Iterable[str], path: Path | None) -> ApiKeys:
        """Return the keys given one by one and those in a file of ``TENANT KEY`` lines.

        Raises:
            ApiKeysError: A key is empty or none that a header can carry, the file cannot be read or
                has no keys, or a line of it is malformed.
        """
        tenant_of_key = dict.fromkeys(keys, DEFAULT_TENANT)
        if not all(key.strip() for key in tenant_of_key):
            raise ApiKeysError("An API key is empty; give one, or leave the setting out.")
        if not all(map(_fits_header, tenant_of_key)):
            raise ApiKeysError(f"An API key {_HEADER_RULE}.")
        if path is not None:
            tenant_of_key.update(_read(path))
        return cls(tenant_of_key)

    def authenticate(self, authorization: str | None) -> str:
        """Return the tenant of a caller.

        Args:
            authorization: The ``authorization`` header or metadata; ``None`` if absent.

        Raises:
            UnauthenticatedError: Keys are in use, and the caller showed none or a wrong one.
        """
        if not self._tenant_of_digest:
            return DEFAULT_TENANT
        shown = authorization or ""
        if shown[: len(_SCHEME)].lower() != _SCHEME:
            raise UnauthenticatedError(
                "You didn't provide an API key. Send it as 'Authorization: Bearer KEY'."
            )
        shown_digest = _digest(shown[len(_SCHEME) :].strip())
        # All keys are compared, so that the time tells nothing about which one was near.
        tenants = [
            tenant
            for digest, tenant in self._tenant_of_digest.items()
            if hmac.compare_digest(digest, shown_digest)
        ]
        if not tenants:
            raise UnauthenticatedError("Incorrect API key provided.")
        return tenants[0]


def _read(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ApiKeysError(f"The API keys {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ApiKeysError(f"The API keys {path} are not UTF-8.") from error
    tenant_of_key = {}
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or not _TENANT.fullmatch(words[0]):
            raise ApiKeysError(f"Line {number} of {path} must be 'TENANT KEY'.")
        if not _fits_header(words[1]):
            raise ApiKeysError(f"The API key in line {number} of {path} {_HEADER_RULE}.")
        tenant_of_key[words[1]] = words[0]
    if not tenant_of_key:
        raise ApiKeysError(f"The API keys {path} hold no key; without one everyone could call.")
    return tenant_of_key


def _fits_header(key: str) -> bool:
    return key.isascii() and key.isprintable() and key == key.strip()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
