"""Describe a stored embedding: its ref, its layout, and the digest of every chunk of its bytes.

The body of a manifest's envelope, big-endian; the last field is there only if it is not 0::

    write id (16), chunk bytes (4), chunks (4), bytes of the ref (4), bytes of the layout (4),
    chunk digests (32 each), ref, layout, seconds kept after each use (4)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from chiasm.common.chunks import CHUNK_BYTES, ChunkSpan, chunk_spans
from chiasm.common.convert import (
    layout_from_proto,
    layout_to_proto,
    ref_from_proto,
    ref_to_proto,
)
from chiasm.common.envelope import BODY_OFFSET, EnvelopeError, EnvelopeKind, seal, unseal
from chiasm.common.errors import InvalidRequestError
from chiasm.v1 import media_pb2

if TYPE_CHECKING:
    from chiasm.common.media import EmbeddingRef, MediaLayout
    from chiasm.common.secrets import StoreSecrets, TenantKeys

MAX_EMBEDDING_BYTES = 1 << 30
WRITE_ID_BYTES = 16
WRITE_ID_OFFSET = BODY_OFFSET
"""Where the write id begins in the envelope of a manifest."""

_DIGEST_BYTES = 32
_HEAD = struct.Struct(f">{WRITE_ID_BYTES}sIIII")  # write id, chunk bytes, chunks, ref, layout
_TTL = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is known of a stored embedding without its bytes.

    Attributes:
        ref: Identity and shapes.
        layout: How the item stands in the prompt.
        write_id: Names the chunks of one write, so that two writers never mix.
        chunk_bytes: Size of every chunk but the last of each tensor.
        chunk_digests: blake3 of every chunk, in order.
        ttl_s: Seconds the embedding is kept after each use; 0: as the store keeps everything.
    """

    ref: EmbeddingRef
    layout: MediaLayout
    write_id: bytes
    chunk_bytes: int
    chunk_digests: tuple[bytes, ...]
    ttl_s: int = 0

    def spans(self) -> list[ChunkSpan]:
        """Return what each chunk holds, in order."""
        return chunk_spans(self.ref, self.chunk_bytes)


def seal_manifest(keys: TenantKeys, manifest: Manifest) -> bytes:
    """Return the envelope that holds ``manifest``."""
    ref = ref_to_proto(manifest.ref).SerializeToString(deterministic=True)
    layout = layout_to_proto(manifest.layout).SerializeToString(deterministic=True)
    digests = manifest.chunk_digests
    head = _HEAD.pack(manifest.write_id, manifest.chunk_bytes, len(digests), len(ref), len(layout))
    ttl = _TTL.pack(manifest.ttl_s) if manifest.ttl_s else b""
    body = b"".join((head, *digests, ref, layout, ttl))
    return seal(keys, EnvelopeKind.MANIFEST, manifest.ref.embedding_id, body)


def unseal_manifest(
    secrets: StoreSecrets, tenant: str, embedding_id: bytes, envelope: bytes
) -> Manifest:
    """Return the manifest in ``envelope``: verified, consistent with itself, bounded in size.

    Raises:
        EnvelopeError: It is not a manifest of ``embedding_id`` that this stack wrote.
    """
    body = unseal(secrets, tenant, EnvelopeKind.MANIFEST, embedding_id, envelope)
    try:
        manifest = _parse(body)
    except (struct.error, DecodeError, InvalidRequestError) as error:
        raise EnvelopeError("body") from error
    _check(manifest, embedding_id)
    return manifest


def _parse(body: bytes) -> Manifest:
    write_id, chunk_bytes, num_chunks, ref_bytes, layout_bytes = _HEAD.unpack_from(body)
    ref_at = _HEAD.size + num_chunks * _DIGEST_BYTES
    layout_at = ref_at + ref_bytes
    ttl_at = layout_at + layout_bytes
    if len(body) - ttl_at not in (0, _TTL.size):
        raise EnvelopeError("length")
    digests = body[_HEAD.size : ref_at]
    return Manifest(
        ref=ref_from_proto(media_pb2.EmbeddingRef.FromString(body[ref_at:layout_at])),
        layout=layout_from_proto(media_pb2.MediaLayout.FromString(body[layout_at:ttl_at])),
        write_id=write_id,
        chunk_bytes=chunk_bytes,
        chunk_digests=tuple(
            digests[start : start + _DIGEST_BYTES]
            for start in range(0, len(digests), _DIGEST_BYTES)
        ),
        ttl_s=_TTL.unpack_from(body, ttl_at)[0] if len(body) > ttl_at else 0,
    )


def _check(manifest: Manifest, embedding_id: bytes) -> None:
    ref = manifest.ref
    if ref.embedding_id != embedding_id:
        raise EnvelopeError("subject")
    if not 1 <= manifest.chunk_bytes <= CHUNK_BYTES or ref.num_bytes > MAX_EMBEDDING_BYTES:
        raise EnvelopeError("size")
    num_chunks = sum(-(-spec.num_bytes // manifest.chunk_bytes) for spec in ref.tensors)
    if num_chunks != len(manifest.chunk_digests):
        raise EnvelopeError("chunks")
    if manifest.layout.num_embedding_tokens != ref.num_splice_rows:
        raise EnvelopeError("layout")
