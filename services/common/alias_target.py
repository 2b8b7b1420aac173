"""Write down what a client's uuid stands for, and read it back.

The body of an alias's envelope has one of these forms, big-endian::

    source digest (32)                                      bound without a URL or a record
    source digest (32), URL digest (32)                     bound without a record
    source digest (32), URL digest or zeros (32), record    all that are bound now

    record := created (8), bytes (8), tokens (4), ttl (4), embedding id (32), fingerprint (32),
              then, hidden: modality, cache salt and uuid, each as length (2) and UTF-8

Redis never sees a uuid: the hidden part is combined with a key stream. Its nonce is the alias's
hash, which is a digest of exactly what is hidden, so no two texts ever share a stream.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blake3 import blake3

from chiasm.common.envelope import EnvelopeError
from chiasm.common.media import DIGEST_BYTES, Modality

if TYPE_CHECKING:
    from chiasm.common.secrets import TenantKeys

_NO_URL = bytes(DIGEST_BYTES)
_RECORD = struct.Struct(f">QQII{DIGEST_BYTES}s{DIGEST_BYTES}s")
_LENGTH = struct.Struct(">H")


@dataclass(frozen=True, slots=True)
class AliasRecord:
    """What is told of a media item that a client has named.

    Attributes:
        uuid: The client's name for the item; the alias's key holds only a hash of it.
        modality: Kind of the item.
        cache_salt: Salt in whose scope the name holds; empty for none.
        embedding_id: The embedding that the item had when it was named.
        fingerprint: What made that embedding.
        num_bytes: Bytes of the source; 0 if they were not counted.
        num_tokens: Tokens that the item takes in a prompt.
        created_s: When it was named, seconds since the Unix epoch.
        ttl_s: Seconds it is kept after its last use; 0: as long as the store keeps everything.
    """

    uuid: str
    modality: Modality
    cache_salt: str
    embedding_id: bytes
    fingerprint: bytes
    num_bytes: int
    num_tokens: int
    created_s: int
    ttl_s: int = 0


@dataclass(frozen=True, slots=True)
class AliasTarget:
    """What a uuid stands for.

    Attributes:
        source_digest: Digest of the source.
        url_digest: Digest of the URL that it came by; empty if it did not.
        record: What is told of the item; ``None`` if nothing was written down.
    """

    source_digest: bytes
    url_digest: bytes = b""
    record: AliasRecord | None = None

    @property
    def ttl_s(self) -> int:
        """Seconds that the item is kept after its last use; 0: as the store does."""
        return self.record.ttl_s if self.record else 0


def pack_target(keys: TenantKeys, subject: bytes, target: AliasTarget) -> bytes:
    """Return the body of the envelope of the alias with hash ``subject``; sealed with ``keys``."""
    if target.record is None:
        return target.source_digest + target.url_digest
    record = target.record
    fixed = _RECORD.pack(
        record.created_s,
        record.num_bytes,
        record.num_tokens,
        record.ttl_s,
        record.embedding_id,
        record.fingerprint,
    )
    texts = (record.modality.value, record.cache_salt, record.uuid)
    hidden = _combine(keys, subject, b"".join(map(_pack_text, texts)))
    return b"".join((target.source_digest, target.url_digest or _NO_URL, fixed, hidden))


def unpack_target(keys: TenantKeys, subject: bytes, body: bytes) -> AliasTarget:
    """Return what the body of an envelope says that was sealed with ``keys`` for ``subject``.

    Raises:
        EnvelopeError: It has none of the forms above.
    """
    source_digest, rest = body[:DIGEST_BYTES], body[DIGEST_BYTES:]
    url_digest, rest = rest[:DIGEST_BYTES], rest[DIGEST_BYTES:]
    if len(source_digest) != DIGEST_BYTES or len(url_digest) not in (0, DIGEST_BYTES):
        raise EnvelopeError("length")
    if not rest:
        return AliasTarget(source_digest, url_digest)
    try:
        hidden = _combine(keys, subject, rest[_RECORD.size :])
        record = _unpack_record(rest[: _RECORD.size], hidden)
    except (struct.error, ValueError) as error:
        raise EnvelopeError("body") from error
    return AliasTarget(source_digest, b"" if url_digest == _NO_URL else url_digest, record)


def _pack_text(text: str) -> bytes:
    data = text.encode()
    return _LENGTH.pack(len(data)) + data


def _combine(keys: TenantKeys, subject: bytes, data: bytes) -> bytes:
    """Hide ``data``, or show what was hidden."""
    stream = blake3(subject, key=keys.name_key).digest(len(data))
    return bytes(one ^ other for one, other in zip(data, stream, strict=True))


def _unpack_record(fixed: bytes, data: bytes) -> AliasRecord:
    created_s, num_bytes, num_tokens, ttl_s, embedding_id, fingerprint = _RECORD.unpack(fixed)
    offset, texts = 0, []
    for _ in range(3):
        (length,) = _LENGTH.unpack_from(data, offset)
        offset += _LENGTH.size
        texts.append(data[offset : offset + length].decode())
        offset += length
    if offset != len(data):
        raise ValueError("the lengths do not add up")
    modality, cache_salt, uuid = texts
    return AliasRecord(
        uuid=uuid,
        modality=Modality(modality),
        cache_salt=cache_salt,
        embedding_id=embedding_id,
        fingerprint=fingerprint,
        num_bytes=num_bytes,
        num_tokens=num_tokens,
        created_s=created_s,
        ttl_s=ttl_s,
    )
