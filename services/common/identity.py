"""Compute what things are called: digests of sources, embedding ids, alias hashes.

Everything that is hashed is first written in one typed, length-prefixed form, so that two different
lists of values never give the same bytes::

    value   := type byte, length of the content (8 bytes), content
    types   := N none | I integer | F float | S text | B bytes | T tuple of values

An embedding id is keyed per tenant (``secrets.py``): whoever lacks the key can neither guess an id
nor make two sources meet.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from blake3 import blake3

from chiasm.common.errors import InvalidRequestError
from chiasm.common.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chiasm.common.media import DataType, Modality, PatchGrid, ProcessingOptions
    from chiasm.common.secrets import TenantKeys

_LIMITS = Limits()
_URI_CHARS = frozenset(
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~:/?#[]@!$&'()*+,;=%"
)

Value: TypeAlias = "int | float | str | bytes | tuple[Value, ...] | None"


@dataclass(frozen=True, slots=True)
class EmbeddingSource:
    """Everything that decides what an embedding is, except the tenant.

    Attributes:
        fingerprint: Digest of all that makes the embedding besides the source and the options.
        modality: Kind of the item.
        options: The client's wishes as they came; the server's clamps belong to the fingerprint.
        cache_salt: The client's salt; empty for none.
        source_digest: ``source_digest`` or ``tensor_digest`` of what was sent.
    """

    fingerprint: bytes
    modality: Modality
    options: ProcessingOptions
    cache_salt: str
    source_digest: bytes


@dataclass(frozen=True, slots=True)
class AliasName:
    """A client's name for a media item, in the scope where it holds."""

    modality: Modality
    cache_salt: str
    uuid: str


def source_digest(data: bytes | bytearray | memoryview) -> bytes:
    """Return the digest of a source's original bytes; takes 0.15 ms per MiB, so use a thread."""
    return blake3(data, derive_key_context="chiasm v1 source bytes").digest()


def tensor_digest(
    dtype: DataType,
    shape: tuple[int, ...],
    data: bytes | bytearray | memoryview,
    grid: PatchGrid | None = None,
) -> bytes:
    """Return the digest of a ready tensor; the same bytes in another shape, type or grid differ."""
    hasher = blake3(derive_key_context="chiasm v1 source tensor")
    named = (dtype.value, shape)
    hasher.update(encode_value((*named, (grid.t, grid.h, grid.w)) if grid else named))
    hasher.update(data)
    return hasher.digest()


def frames_digest(digests: Sequence[bytes]) -> bytes:
    """Return the digest of a list of frames, given ``source_digest`` of each."""
    return blake3(
        encode_value(tuple(digests)), derive_key_context="chiasm v1 source frames"
    ).digest()


def url_digest(url: str) -> bytes:
    """Return the digest of a URL, exactly as the client wrote it."""
    return blake3(encode_value(url), derive_key_context="chiasm v1 url").digest()


def embedding_id(keys: TenantKeys, source: EmbeddingSource) -> bytes:
    """Return the id under which the embedding of ``source`` is stored; 32 bytes."""
    options = source.options
    value = (
        source.fingerprint,
        source.modality.value,
        (
            options.min_pixels,
            options.max_pixels,
            None if options.fps is None else float(options.fps),
            options.num_frames,
            options.background_rgb,
        ),
        source.cache_salt,
        source.source_digest,
    )
    return blake3(encode_value(value), key=keys.id_key).digest()


def alias_hash(keys: TenantKeys, name: AliasName) -> bytes:
    """Return the hash under which the alias ``name`` is stored; 32 bytes."""
    value = (name.modality.value, name.cache_salt, name.uuid)
    return blake3(encode_value(value), key=keys.alias_key).digest()


def validate_uuid(uuid: str, param: str) -> None:
    """Refuse a uuid that is not 1 to 512 characters of RFC 3986.

    Raises:
        InvalidRequestError: It is empty, too long or has other characters; names ``param``.
    """
    # The length comes first: nothing looks at the characters of a name of megabytes.
    if not 1 <= len(uuid) <= _LIMITS.max_uuid_chars or not _URI_CHARS.issuperset(uuid):
        raise InvalidRequestError(
            f"A uuid must have 1 to {_LIMITS.max_uuid_chars} characters of those that RFC 3986"
            " allows in a URI.",
            reason="INVALID_UUID",
            param=param,
        )


def validate_cache_salt(cache_salt: str) -> None:
    """Refuse a cache salt that the client gave but that cannot be used.

    Raises:
        InvalidRequestError: It is empty, longer than 128 characters, or has a character that is
            not printable, an at sign or a slash of either kind.
    """
    if not cache_salt:
        raise InvalidRequestError(
            "Parameter 'cache_salt' must be a non-empty string if provided.", param="cache_salt"
        )
    if (
        len(cache_salt) > _LIMITS.max_cache_salt_chars
        or not cache_salt.isprintable()
        or not set("@/\\").isdisjoint(cache_salt)
    ):
        raise InvalidRequestError(
            f"Parameter 'cache_salt' must be at most {_LIMITS.max_cache_salt_chars} characters and"
            " must not contain '@', '/', '\\\\', or NUL.",
            param="cache_salt",
        )


def encode_value(value: Value) -> bytes:
    """Return the typed, length-prefixed form of ``value``; different values differ in it."""
    match value:
        case None:
            kind, content = b"N", b""
        case bool():
            raise TypeError("A truth value has no typed form.")
        case int():
            kind, content = b"I", str(value).encode()
        case float():
            kind, content = b"F", struct.pack(">d", value)
        case str():
            kind, content = b"S", value.encode("utf-8", "surrogatepass")
        case bytes():
            kind, content = b"B", value
        case tuple():
            kind, content = b"T", b"".join(map(encode_value, value))
    return kind + struct.pack(">Q", len(content)) + content
