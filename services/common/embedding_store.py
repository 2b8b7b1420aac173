"""Keep embeddings in Redis under their ids.

An embedding is one manifest and its chunks, all of them plain strings::

    chiasm:<tenant tag>:<embedding id>:m                  manifest, written last
    chiasm:<tenant tag>:<embedding id>:<write id>:<n>     chunk n, at most 1 MiB

Invariants:

- Every write has its own write id, so chunks of two writers never mix.
- Chunks are written before their manifest and outlive it, so a manifest promises its chunks; Redis
  may evict any key at any time, and then the whole is a miss.
- An embedding is kept for the store's time after each use, or for the time in its manifest.
- With a share, a tenant has no more in Redis than ``TenantShare`` lets it have.
- What is read back is believed only if the envelope's MAC, the lengths and the digests of the
  chunks hold. An entry that fails is a miss, a metric and a delete.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chiasm.common.alias_store import AliasStore
from chiasm.common.chunks import CHUNK_BYTES, chunk_spans, digest_of
from chiasm.common.envelope import MAX_ENVELOPE_BYTES, EnvelopeError
from chiasm.common.errors import StoreUnavailableError
from chiasm.common.guarded_redis import CallBudget, GuardedRedis, StoreRefusedError
from chiasm.common.host_memory import allocate
from chiasm.common.lease import Lease
from chiasm.common.manifest import (
    MAX_EMBEDDING_BYTES,
    WRITE_ID_BYTES,
    Manifest,
    seal_manifest,
    unseal_manifest,
)
from chiasm.common.media import Embedding
from chiasm.common.metrics import STORE_BAD_ENTRIES, STORE_BYTES, STORE_LOOKUPS, STORE_SECONDS
from chiasm.common.resp_connection import KeyedChunk
from chiasm.common.secrets import tenant_tag
from chiasm.common.store_keys import Written, manifest_key
from chiasm.common.tenant_scan import TenantScan
from chiasm.common.tenant_share import TenantShare

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chiasm.common.lease import LeaseSettings
    from chiasm.common.media import EmbeddingRef, MediaLayout
    from chiasm.common.secrets import StoreSecrets

DEFAULT_TTL_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class StoredEmbedding:
    """What the store tells of an embedding without its tensors.

    Attributes:
        ref: Identity and shapes.
        layout: How the item stands in the prompt.
        ttl_s: Seconds it is kept after each use; 0: as the store keeps everything.
    """

    ref: EmbeddingRef
    layout: MediaLayout
    ttl_s: int = 0


class EmbeddingStore:
    """The Redis-backed mapping from embedding id to embedding.

    Every method ends within the call budget; ``StoreUnavailableError`` means that the store is
    down, slow, full or read-only, and that nothing is known about the entry.
    """

    def __init__(
        self,
        redis: GuardedRedis,
        secrets: StoreSecrets,
        ttl_s: float = DEFAULT_TTL_S,
        tenant_bytes: int | None = None,
    ) -> None:
        self._redis = redis
        self._secrets = secrets
        self._ttl_s = ttl_s
        self._share = TenantShare(redis, tenant_bytes, ttl_s) if tenant_bytes else None
        self.aliases = AliasStore(redis, secrets, ttl_s)
        self.tenants = TenantScan(redis)

    @classmethod
    def connect(
        cls,
        redis_url: str,
        secrets: StoreSecrets,
        ttl_s: float = DEFAULT_TTL_S,
        budget: CallBudget | None = None,
        tenant_bytes: int | None = None,
    ) -> EmbeddingStore:
        """Return a store on the Redis at ``redis_url``; connections are made when needed.

        Args:
            redis_url: ``redis://``, ``rediss://`` or ``unix://``.
            secrets: Secrets of the stack; all services of a stack have the same.
            ttl_s: Seconds an embedding lives after its last use.
            budget: How long calls may take; ``None`` for the defaults.
            tenant_bytes: Share of each tenant, for who writes; ``None``: whatever fits.
        """
        redis = GuardedRedis.connect(redis_url, budget or CallBudget())
        return cls(redis, secrets, ttl_s, tenant_bytes)

    async def lookup(self, tenant: str, embedding_id: bytes) -> StoredEmbedding | None:
        """Return ref and layout of an embedding that is wholly there, and renew its time.

        Raises:
            StoreUnavailableError: The store cannot be used now.
        """
        with STORE_SECONDS.labels("lookup").time():
            entry = await self._read_entry(tenant, embedding_id)
            if entry is not None and not await self._renew_chunks(tenant, entry.manifest):
                await self._discard(tenant, entry, "chunk_missing")
                entry = None
        STORE_LOOKUPS.labels("miss" if entry is None else "hit").inc()
        if entry is None:
            return None
        manifest = entry.manifest
        return StoredEmbedding(manifest.ref, manifest.layout, manifest.ttl_s)

    async def get(self, tenant: str, ref: EmbeddingRef) -> Embedding | None:
        """Return the embedding that ``ref`` names, and renew its time.

        Args:
            tenant: Tenant it belongs to.
            ref: Must equal the stored ref: an entry of another shape is a miss.

        Returns:
            The embedding in memory of its own, or ``None`` if any of it is missing or wrong.

        Raises:
            StoreUnavailableError: The store cannot be used now.
        """
        with STORE_SECONDS.labels("get").time():
            entry = await self._read_entry(tenant, ref.embedding_id)
            if entry is None or entry.manifest.ref != ref:
                return None
            async with self._redis.transfer(ref.num_bytes):
                buffers = [allocate(spec.num_bytes) for spec in ref.tensors]
                is_whole = await self._read_chunks(tenant, entry.manifest, buffers)
            if not is_whole:
                await self._discard(tenant, entry, "chunk")
                return None
        STORE_BYTES.labels("get").inc(ref.num_bytes)
        return Embedding(ref, [buffer.toreadonly() for buffer in buffers])

    async def put(
        self, tenant: str, embedding: Embedding, layout: MediaLayout, ttl_s: int = 0
    ) -> None:
        """Store ``embedding``; when this returns, ``lookup`` and ``get`` find it.

        Args:
            tenant: Tenant it belongs to.
            embedding: Its buffers must not change until this returns.
            layout: How the item stands in the prompt.
            ttl_s: Seconds it is kept after each use; 0: as the store keeps everything.

        Raises:
            StoreUnavailableError: It was not stored; the caller sends it inline.
            ValueError: Buffers, ref and layout contradict each other.
        """
        buffers = _byte_views(embedding, layout)
        ref = embedding.ref
        if ref.num_bytes > MAX_EMBEDDING_BYTES:
            raise StoreUnavailableError("The embedding is too large for the store.")
        write_id = os.urandom(WRITE_ID_BYTES)
        spans = chunk_spans(ref)
        written = Written(ref.embedding_id, write_id, len(spans))
        keys = written.chunk_keys(tenant)
        chunks = [KeyedChunk(key, span.of(buffers)) for key, span in zip(keys, spans, strict=True)]
        with STORE_SECONDS.labels("put").time():
            async with self._redis.transfer(ref.num_bytes):
                if self._share is not None:
                    await self._share.make_room(tenant, written, ref.num_bytes)
                try:
                    digests = await self._write_chunks(chunks, 2 * self._ttl_ms(ttl_s))
                    manifest = Manifest(ref, layout, write_id, CHUNK_BYTES, digests, ttl_s)
                    await self._write_manifest(tenant, manifest)
                except StoreRefusedError:
                    # A full Redis must not stay full of chunks that no manifest names.
                    await self._redis.execute([("UNLINK", key) for key in keys])
                    raise
        STORE_BYTES.labels("put").inc(ref.num_bytes)

    async def delete(self, tenant: str, embedding_id: bytes) -> bool:
        """Forget an embedding; tell whether it was there.

        Raises:
            StoreUnavailableError: The store cannot be used now.
        """
        entry = await self._read_entry(tenant, embedding_id)
        if entry is None:
            return False
        keys = [manifest_key(tenant, embedding_id), *_manifest_chunk_keys(tenant, entry.manifest)]
        replies = await self._redis.execute([("UNLINK", key) for key in keys])
        return bool(replies[0])

    async def set_ttl(
        self, tenant: str, embedding_id: bytes, ttl_s: int, *, may_shorten: bool
    ) -> bool:
        """Keep an embedding for ``ttl_s`` after each use from now on; tell whether it is there.

        Args:
            tenant: Tenant it belongs to.
            embedding_id: The embedding.
            ttl_s: Seconds; 0: as the store keeps everything.
            may_shorten: Whether it may be kept shorter than before; others may count on it.

        Raises:
            StoreUnavailableError: The store cannot be used now.
        """
        entry = await self._read_entry(tenant, embedding_id)
        if entry is None:
            return False
        manifest = replace(entry.manifest, ttl_s=ttl_s)
        old_ms, new_ms = self._ttl_ms(entry.manifest.ttl_s), self._ttl_ms(ttl_s)
        if new_ms == old_ms or (new_ms < old_ms and not may_shorten):
            return True
        key = manifest_key(tenant, embedding_id)
        envelope = seal_manifest(self._secrets.keys(tenant), manifest)
        # If another writer has replaced the manifest meanwhile, its entry stays as it is.
        await self._redis.execute_if(key, entry.envelope, ("SET", key, envelope, "PX", new_ms))
        return await self._renew_chunks(tenant, manifest)

    async def keep_at_least(self, tenant: str, stored: StoredEmbedding, ttl_s: int) -> None:
        """Keep ``stored`` for ``ttl_s`` after each use, or longer if it is; 0: as everything.

        Nothing is sent if it is kept long enough.

        Raises:
            StoreUnavailableError: The store cannot be used now.
        """
        if self._ttl_ms(stored.ttl_s) < self._ttl_ms(ttl_s):
            await self.set_ttl(tenant, stored.ref.embedding_id, ttl_s, may_shorten=False)

    async def seconds_left(self, tenant: str, embedding_ids: Sequence[bytes]) -> list[float]:
        """Return in how many seconds each embedding is forgotten if not used; 0: it is not there.

        Raises:
            StoreUnavailableError: The store cannot be used now.
        """
        if not embedding_ids:
            return []
        keys = [manifest_key(tenant, embedding_id) for embedding_id in embedding_ids]
        replies = await self._redis.execute([("PTTL", key) for key in keys])
        return [max(0, reply) / 1000 if isinstance(reply, int) else 0.0 for reply in replies]

    def lease(self, tenant: str, embedding_id: bytes, settings: LeaseSettings) -> Lease:
        """Return a new claim on the work of encoding an embedding; it is not acquired yet."""
        key = f"chiasm:{tenant_tag(tenant)}:{embedding_id.hex()}:l"
        return Lease(self._redis, key, settings)

    async def ping(self) -> bool:
        """Tell whether the store can be used now."""
        try:
            await self._redis.execute([("PING",)])
        except StoreUnavailableError:
            return False
        return True

    async def close(self) -> None:
        """Close all connections."""
        await self._redis.close()

    async def _read_entry(self, tenant: str, embedding_id: bytes) -> _Entry | None:
        key = manifest_key(tenant, embedding_id)
        # GETRANGE bounds what a foreign value under our key can make us read.
        envelope, _ = await self._redis.execute(
            [
                ("GETRANGE", key, 0, MAX_ENVELOPE_BYTES),
                ("PEXPIRE", key, int(self._ttl_s * 1000)),
            ]
        )
        if not isinstance(envelope, bytes) or not envelope:
            return None
        try:
            manifest = unseal_manifest(self._secrets, tenant, embedding_id, envelope)
        except EnvelopeError as error:
            STORE_BAD_ENTRIES.labels(f"manifest_{error}").inc()
            await self._redis.execute_if(key, envelope, ("UNLINK", key))
            return None
        if manifest.ttl_s:
            await self._redis.execute([("PEXPIRE", key, self._ttl_ms(manifest.ttl_s))])
        return _Entry(manifest, envelope)

    def _ttl_ms(self, ttl_s: int) -> int:
        """Return how long a manifest is kept after each use; its chunks live twice as long."""
        return int((ttl_s or self._ttl_s) * 1000)

    async def _renew_chunks(self, tenant: str, manifest: Manifest) -> bool:
        keys, ttl_ms = _manifest_chunk_keys(tenant, manifest), 2 * self._ttl_ms(manifest.ttl_s)
        return all(await self._redis.execute([("PEXPIRE", key, ttl_ms) for key in keys]))

    async def _read_chunks(
        self, tenant: str, manifest: Manifest, buffers: Sequence[memoryview]
    ) -> bool:
        keys, digests = _manifest_chunk_keys(tenant, manifest), manifest.chunk_digests
        chunks = [
            KeyedChunk(key, span.of(buffers))
            for key, span in zip(keys, manifest.spans(), strict=True)
        ]

        def accept(index: int) -> bool:
            return digest_of(chunks[index].memory) == digests[index]

        return await self._redis.read_chunks(chunks, 2 * self._ttl_ms(manifest.ttl_s), accept)

    async def _write_chunks(self, chunks: Sequence[KeyedChunk], ttl_ms: int) -> tuple[bytes, ...]:
        """Store ``chunks``; return the digest of each, made while Redis reads it."""
        digests: list[bytes] = []

        def note(index: int) -> None:
            digests.append(digest_of(chunks[index].memory))

        await self._redis.write_chunks(chunks, ttl_ms, note)
        return tuple(digests)

    async def _write_manifest(self, tenant: str, manifest: Manifest) -> None:
        envelope = seal_manifest(self._secrets.keys(tenant), manifest)
        key = manifest_key(tenant, manifest.ref.embedding_id)
        await self._redis.execute([("SET", key, envelope, "PX", self._ttl_ms(manifest.ttl_s))])

    async def _discard(self, tenant: str, entry: _Entry, reason: str) -> None:
        STORE_BAD_ENTRIES.labels(reason).inc()
        key = manifest_key(tenant, entry.manifest.ref.embedding_id)
        # Another writer may have replaced the manifest meanwhile; its entry stays.
        await self._redis.execute_if(key, entry.envelope, ("UNLINK", key))
        keys = _manifest_chunk_keys(tenant, entry.manifest)
        await self._redis.execute([("UNLINK", key) for key in keys])


@dataclass(frozen=True, slots=True)
class _Entry:
    """A manifest and the bytes it was read from."""

    manifest: Manifest
    envelope: bytes


def _manifest_chunk_keys(tenant: str, manifest: Manifest) -> list[str]:
    num_chunks = len(manifest.chunk_digests)
    return Written(manifest.ref.embedding_id, manifest.write_id, num_chunks).chunk_keys(tenant)


def _byte_views(embedding: Embedding, layout: MediaLayout) -> list[memoryview]:
    ref = embedding.ref
    views = [memoryview(buffer).cast("B") for buffer in embedding.buffers]
    found, expected = [view.nbytes for view in views], [spec.num_bytes for spec in ref.tensors]
    if found != expected:
        raise ValueError(f"The buffers have {found} bytes, the ref says {expected}.")
    if layout.num_embedding_tokens != ref.num_splice_rows:
        raise ValueError(
            f"The layout has {layout.num_embedding_tokens} embedding tokens, the embedding"
            f" {ref.num_splice_rows} rows."
        )
    return views
