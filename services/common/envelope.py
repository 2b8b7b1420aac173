"""Wrap what is written to Redis so that nothing but what we wrote, where we wrote it, is read back.

One fixed binary form, big-endian::

    0    4   magic "CHSM"
    4    1   version
    5    1   kind of the body
    6    2   zero
    8    8   key id: which generation of the store secret made the MAC
    16   32  subject: the embedding id or alias hash that the entry belongs to
    48   4   length of the body
    52   n   body
    52+n 32  MAC: blake3 of all that is before, keyed per tenant

The subject is inside, so an entry copied under another key is refused; the MAC key is the tenant's,
so another tenant's entry is refused.
"""

from __future__ import annotations

import enum
import hmac
import struct
from typing import TYPE_CHECKING

from blake3 import blake3

from chiasm.common.secrets import KEY_ID_BYTES

if TYPE_CHECKING:
    from chiasm.common.secrets import StoreSecrets, TenantKeys

MAX_BODY_BYTES = 4 << 20
MAC_BYTES = 32

_MAGIC = b"CHSM"
_VERSION = 1
_HEADER = struct.Struct(f">4sBBH{KEY_ID_BYTES}s32sI")

BODY_OFFSET = _HEADER.size
MAX_ENVELOPE_BYTES = _HEADER.size + MAX_BODY_BYTES + MAC_BYTES


class EnvelopeError(Exception):
    """The bytes are not an entry that this stack wrote for this tenant under this key."""


class EnvelopeKind(enum.IntEnum):
    """What an envelope holds."""

    MANIFEST = 1
    ALIAS = 2


def seal(keys: TenantKeys, kind: EnvelopeKind, subject: bytes, body: bytes) -> bytes:
    """Return the envelope of ``body``.

    Args:
        keys: The tenant's newest keys.
        kind: What the body is.
        subject: Embedding id or alias hash that the entry belongs to; 32 bytes.
        body: At most ``MAX_BODY_BYTES`` bytes.

    Raises:
        ValueError: The body is too large.
    """
    if len(body) > MAX_BODY_BYTES:
        raise ValueError(f"An envelope holds {MAX_BODY_BYTES} bytes, not {len(body)}.")
    header = _HEADER.pack(_MAGIC, _VERSION, kind, 0, keys.key_id, subject, len(body))
    sealed = header + body
    return sealed + _mac(keys, sealed)


def unseal(
    secrets: StoreSecrets, tenant: str, kind: EnvelopeKind, subject: bytes, envelope: bytes
) -> bytes:
    """Return the body of ``envelope`` after checking all that can be checked.

    Args:
        secrets: Secrets of the stack; a retired generation no longer opens anything.
        tenant: Tenant that the entry must belong to.
        kind: What the body must be.
        subject: What the entry must belong to.
        envelope: Bytes as they came from Redis.

    Raises:
        EnvelopeError: Any of it does not hold.
    """
    if not _HEADER.size + MAC_BYTES <= len(envelope) <= MAX_ENVELOPE_BYTES:
        raise EnvelopeError("length")
    sealed, mac = envelope[:-MAC_BYTES], envelope[-MAC_BYTES:]
    magic, version, found_kind, zero, _, found_subject, num_bytes = _HEADER.unpack_from(sealed)
    if (magic, version, zero) != (_MAGIC, _VERSION, 0):
        raise EnvelopeError("format")
    keys = sealer(secrets, tenant, sealed)
    if not hmac.compare_digest(_mac(keys, sealed), mac):
        raise EnvelopeError("mac")
    if found_kind != kind or found_subject != subject:
        raise EnvelopeError("subject")
    if num_bytes != len(sealed) - _HEADER.size:
        raise EnvelopeError("length")
    return sealed[_HEADER.size :]


def sealer(secrets: StoreSecrets, tenant: str, envelope: bytes) -> TenantKeys:
    """Return the keys that ``envelope`` was sealed with.

    Raises:
        EnvelopeError: It is too short, or its keys were retired.
    """
    if len(envelope) < _HEADER.size:
        raise EnvelopeError("length")
    keys = secrets.find(tenant, _HEADER.unpack_from(envelope)[4])
    if keys is None:
        raise EnvelopeError("key_id")
    return keys


def _mac(keys: TenantKeys, sealed: bytes) -> bytes:
    return blake3(sealed, key=keys.mac_key).digest(MAC_BYTES)
