"""Bound what one tenant has in the store: what it writes beyond its share, its oldest pays for.

The bytes that a tenant writes are numbered one after the other and cut into segments. For each
segment Redis has records of the embeddings that begin in it; the last segments are the share::

    chiasm:<tenant tag>:n         bytes written so far
    chiasm:<tenant tag>:n:<k>     records of what begins in segment k

    | forgotten ... | k - 15 | ... | k - 1 | k: written now |
                    |-------------- the share --------------|

Invariants:

- An embedding is recorded before it is written. Who begins a segment has forgotten those of the
  segment that leaves the share by then.
- Whenever a tenant writes, all its records are renewed, for twice the longest time that embeddings
  are kept after a use: until then none is out of sight, however long use has kept it there.
- Records tell only what to forget, and only of the tenant under whose key they stand. If Redis
  loses them, or a process dies on the way, embeddings stay beyond the share until their time ends.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from chiasm.common.errors import StoreUnavailableError
from chiasm.common.limits import MAX_MEDIA_TTL_S
from chiasm.common.manifest import WRITE_ID_BYTES, WRITE_ID_OFFSET
from chiasm.common.media import DIGEST_BYTES
from chiasm.common.metrics import STORE_SHARE_FORGOTTEN
from chiasm.common.secrets import tenant_tag
from chiasm.common.store_keys import Written, manifest_key

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chiasm.common.guarded_redis import Command, GuardedRedis

NUM_SEGMENTS = 16
KEY_BYTES = 1024
"""What a key is charged beside its value: its name, the digests and Redis's own structures."""

_RECORD = struct.Struct(f">{DIGEST_BYTES}s{WRITE_ID_BYTES}sI")
_RECORDS_PER_STEP = 256
_MAX_CHUNKS = 4096


class TenantShare:
    """What each tenant may have in the store at one time; the same in all processes that write.

    A tenant that writes no more than its share loses nothing to this. One that writes more loses
    what it wrote first, used or not: the order of use would cost a write with each.
    """

    def __init__(self, redis: GuardedRedis, share_bytes: int, ttl_s: float) -> None:
        """Prepare; nothing is sent.

        Args:
            redis: The Redis of the store.
            share_bytes: Bytes of embeddings that a tenant may have, with ``KEY_BYTES`` per key.
            ttl_s: Seconds that the store keeps an embedding after its last use if it has no time of
                its own.
        """
        self._redis = redis
        self._segment_bytes = max(1, share_bytes // NUM_SEGMENTS)
        # Chunks are kept twice as long as their manifest.
        self._ttl_ms = int(2000 * max(ttl_s, MAX_MEDIA_TTL_S))

    async def make_room(self, tenant: str, written: Written, num_bytes: int) -> None:
        """Count what is about to be written and forget what leaves the share for it.

        Args:
            tenant: Who writes.
            written: What is about to be written.
            num_bytes: Bytes of the embedding.

        Raises:
            StoreUnavailableError: The store cannot be used now, or the embedding is larger than
                15/16 of a share; nothing may be written.
        """
        charge = num_bytes + KEY_BYTES * (1 + written.num_chunks)
        if charge > self._segment_bytes * (NUM_SEGMENTS - 1):
            raise StoreUnavailableError("The embedding is larger than the share of its tenant.")
        counter = f"chiasm:{tenant_tag(tenant)}:n"
        end, _ = await self._redis.execute(
            [("INCRBY", counter, charge), ("PEXPIRE", counter, self._ttl_ms)]
        )
        assert isinstance(end, int), "INCRBY returns a number"
        start = end - charge
        before, last = (start - 1) // self._segment_bytes, (end - 1) // self._segment_bytes
        key = f"{counter}:{start // self._segment_bytes}"
        record = _RECORD.pack(written.embedding_id, written.write_id, written.num_chunks)
        renewals: list[Command] = [
            ("PEXPIRE", f"{counter}:{kept}", self._ttl_ms)
            for kept in range(max(0, last - NUM_SEGMENTS + 1), last + 1)
        ]
        await self._redis.execute([("APPEND", key, record), *renewals])
        for begun in range(before + 1, last + 1):
            await self._forget_segment(tenant, f"{counter}:{begun - NUM_SEGMENTS}")

    async def _forget_segment(self, tenant: str, key: str) -> None:
        """Forget what is recorded under ``key``, a bounded number of records at a time."""
        step_bytes = _RECORDS_PER_STEP * _RECORD.size
        # Nothing is charged less than two keys; more records are not ours.
        max_records = self._segment_bytes // (2 * KEY_BYTES) + 1
        for offset in range(0, max_records * _RECORD.size, step_bytes):
            (records,) = await self._redis.execute(
                [("GETRANGE", key, offset, offset + step_bytes - 1)]
            )
            if not isinstance(records, bytes) or not records:
                break
            await self._forget(tenant, list(_parse(records)))
            if len(records) < step_bytes:
                break
        await self._redis.execute([("UNLINK", key)])

    async def _forget(self, tenant: str, gone: list[Written]) -> None:
        """Delete the chunks of ``gone``, and the manifests that still name them."""
        if not gone:
            return
        manifests = [manifest_key(tenant, one.embedding_id) for one in gone]
        end = WRITE_ID_OFFSET + WRITE_ID_BYTES - 1
        names = await self._redis.execute(
            [("GETRANGE", k, WRITE_ID_OFFSET, end) for k in manifests]
        )
        doomed: list[Command] = []
        for one, manifest, name in zip(gone, manifests, names, strict=True):
            if name == one.write_id:
                doomed.append(("UNLINK", manifest))
                STORE_SHARE_FORGOTTEN.inc()
            doomed += [("UNLINK", key) for key in one.chunk_keys(tenant)]
        await self._redis.execute(doomed)


def _parse(records: bytes) -> Iterable[Written]:
    """Yield what whole records name, but for those that no writer of ours has left."""
    whole = len(records) // _RECORD.size * _RECORD.size
    for fields in _RECORD.iter_unpack(records[:whole]):
        written = Written(*fields)
        if 0 < written.num_chunks <= _MAX_CHUNKS:
            yield written
