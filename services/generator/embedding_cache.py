"""Keep the embeddings that were used last in host memory, between live sequences and the store."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

from chiasm.common.metrics import (
    GENERATOR_EMBEDDING_CACHE_BYTES,
    GENERATOR_EMBEDDING_CACHE_LOOKUPS,
)
from chiasm.generator.fair_queue import FairQueue

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from chiasm.common.media import EmbeddingRef

    Key = tuple[str, EmbeddingRef]


class EmbeddingCache:
    """Rows of embeddings by tenant and ref; belongs to the event loop.

    Rows are verified before they come here and only read afterwards, so any number of sequences
    share them. A sequence that holds rows keeps them alive when they leave the cache; that memory
    is charged at admission, not here. Tenants share the bytes as ``FairQueue`` tells.

    Invariants:
        1. ``num_bytes`` is the sum over all entries and never above ``max_bytes``.
        2. Each entry is in the queue, and its bytes are charged to its tenant.
    """

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Build an empty cache.

        Args:
            max_bytes: Bytes that it may keep.
            clock: Tells seconds and never goes back.
        """
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._entries: dict[Key, torch.Tensor] = {}
        self._queue: FairQueue[Key] = FairQueue(clock)

    @property
    def num_bytes(self) -> int:
        """Bytes of all entries."""
        return self._num_bytes

    def find(self, tenant: str, ref: EmbeddingRef) -> torch.Tensor | None:
        """Return the rows of ``ref`` and count them as used; ``None`` if they are not here."""
        key = (tenant, ref)
        rows = self._entries.get(key)
        GENERATOR_EMBEDDING_CACHE_LOOKUPS.labels("miss" if rows is None else "hit").inc()
        if rows is not None:
            self._queue.touch(key)
        return rows

    def keep(self, tenant: str, ref: EmbeddingRef, rows: torch.Tensor) -> None:
        """Keep ``rows`` and let go of others, or of these, if there is no room.

        Rows larger than the whole cache are not kept.
        """
        if rows.nbytes > self._max_bytes:
            return
        key = (tenant, ref)
        if key in self._entries:
            self._queue.remove(key)
            self._forget(key)
        self._entries[key] = rows
        self._num_bytes += rows.nbytes
        self._queue.charge(tenant, rows.nbytes)
        self._queue.push(key, tenant)
        while self._num_bytes > self._max_bytes:
            self._forget(self._queue.pop(tenant))
        GENERATOR_EMBEDDING_CACHE_BYTES.set(self._num_bytes)

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if an invariant does not hold."""
        assert self._num_bytes == sum(rows.nbytes for rows in self._entries.values())
        assert self._num_bytes <= self._max_bytes
        assert len(self._queue) == len(self._entries)
        assert all(key in self._queue for key in self._entries)
        charges: Counter[str] = Counter()
        for (tenant, _), rows in self._entries.items():
            charges[tenant] += rows.nbytes
        assert self._queue.charges == +charges
        self._queue.check_invariants()

    def _forget(self, key: Key) -> None:
        """Drop an entry that is not in the queue any more."""
        num_bytes = self._entries.pop(key).nbytes
        self._num_bytes -= num_bytes
        self._queue.charge(key[0], -num_bytes)
