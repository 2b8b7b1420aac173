"""Derive every key of the embedding store, per tenant, from one secret file.

The file holds one secret per line, newest first::

    # any comment
    5f0c…  (64 hexadecimal digits)   makes all new ids and envelopes
    91ab…                            still reads what it made, until the line is removed

A *generation* is what one line derives for one tenant. Envelopes carry the key id of their
generation, so that a new line can be put on top without losing what is stored.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from blake3 import blake3

from chiasm.common.private_file import PrivateFileError, create_private, read_private

if TYPE_CHECKING:
    from pathlib import Path

KEY_ID_BYTES = 8
MAX_GENERATIONS = 8

_SECRET_BYTES = 32
_MAX_FILE_BYTES = 16 * 1024
_TAG_CHARS = 16


class StoreSecretsError(Exception):
    """The secret file is missing, unreadable, open to others or malformed; the text says which."""


@dataclass(frozen=True, slots=True)
class TenantKeys:
    """The keys of one tenant in one generation.

    Attributes:
        key_id: Names the generation in envelopes; not secret.
        tag: Prefix of the tenant's Redis keys, the same in all generations; not secret.
        id_key: Keys embedding ids.
        alias_key: Keys the hashes of client uuids.
        name_key: Hides client uuids in the records of aliases.
        mac_key: Keys the MAC of envelopes.
    """

    key_id: bytes
    tag: str
    id_key: bytes = field(repr=False)
    alias_key: bytes = field(repr=False)
    name_key: bytes = field(repr=False)
    mac_key: bytes = field(repr=False)


class StoreSecrets:
    """The secrets of one stack, newest first."""

    def __init__(self, generations: tuple[bytes, ...]) -> None:
        if not 1 <= len(generations) <= MAX_GENERATIONS:
            raise StoreSecretsError(f"There must be 1 to {MAX_GENERATIONS} store secrets.")
        if any(len(secret) != _SECRET_BYTES for secret in generations):
            raise StoreSecretsError(f"A store secret must have {_SECRET_BYTES} bytes.")
        if len(set(generations)) != len(generations):
            raise StoreSecretsError("The same store secret is listed twice.")
        self._generations = generations

    @classmethod
    def generate(cls) -> StoreSecrets:
        """Return one new random secret, kept nowhere else."""
        return cls((secrets.token_bytes(_SECRET_BYTES),))

    @classmethod
    def load(cls, path: Path) -> StoreSecrets:
        """Return the secrets in ``path``.

        Raises:
            StoreSecretsError: The file cannot be read, is open to others, or is malformed.
        """
        try:
            text = read_private(path, _MAX_FILE_BYTES).decode("ascii")
            lines = [line.strip() for line in text.splitlines()]
            return cls(tuple(bytes.fromhex(line) for line in lines if line and line[0] != "#"))
        except PrivateFileError as error:
            raise StoreSecretsError(f"The store secret is unusable: {error}") from error
        except ValueError as error:
            raise StoreSecretsError(
                f"The store secret {path} must hold lines of {2 * _SECRET_BYTES} hex digits."
            ) from error

    @classmethod
    def load_or_create(cls, path: Path) -> StoreSecrets:
        """Return the secrets in ``path``, making a random one first if there is no file.

        Processes that start at once all return the same secret.

        Raises:
            StoreSecretsError: As ``load``; or the file cannot be written.
        """
        if not path.exists():
            try:
                create_private(path, secrets.token_hex(_SECRET_BYTES).encode() + b"\n")
            except PrivateFileError as error:
                raise StoreSecretsError(f"The store secret is unusable: {error}") from error
        return cls.load(path)

    def keys(self, tenant: str) -> TenantKeys:
        """Return the newest keys of ``tenant``: those that new ids and envelopes are made with."""
        return _derive(self._generations[0], tenant)

    def generations(self, tenant: str) -> tuple[TenantKeys, ...]:
        """Return the keys of ``tenant`` in every generation, newest first."""
        return tuple(_derive(secret, tenant) for secret in self._generations)

    def find(self, tenant: str, key_id: bytes) -> TenantKeys | None:
        """Return the keys of ``tenant`` that ``key_id`` names; ``None`` if they were retired."""
        keys = (keys for keys in self.generations(tenant) if keys.key_id == key_id)
        return next(keys, None)


def tenant_tag(tenant: str) -> str:
    """Return the prefix that all Redis keys of ``tenant`` share, in every generation.

    It is not keyed, so that rotation keeps it; nothing but the grouping of keys depends on it.
    """
    digest = blake3(tenant.encode(), derive_key_context="chiasm v1 tenant tag")
    return digest.hexdigest()[:_TAG_CHARS]


def _derive(secret: bytes, tenant: str) -> TenantKeys:
    def derive(purpose: str) -> bytes:
        material = secret + tenant.encode()  # the secret's width is fixed, so this is unambiguous
        return blake3(material, derive_key_context=f"chiasm v1 {purpose}").digest()

    return TenantKeys(
        key_id=blake3(secret, derive_key_context="chiasm v1 key id").digest(KEY_ID_BYTES),
        tag=tenant_tag(tenant),
        id_key=derive("embedding id"),
        alias_key=derive("alias"),
        name_key=derive("alias name"),
        mac_key=derive("envelope mac"),
    )
