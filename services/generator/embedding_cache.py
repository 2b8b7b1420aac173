"""Keep the embeddings that were used last in host memory, between live sequences and the store."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from chiasm.common.metrics import (
    GENERATOR_EMBEDDING_CACHE_BYTES,
    GENERATOR_EMBEDDING_CACHE_LOOKUPS,
)

if TYPE_CHECKING:
    import torch

    from chiasm.common.media import EmbeddingRef


class EmbeddingCache:
    """Rows of embeddings by tenant and ref, the least recently used first; of the event loop.

    Rows are verified before they come here and only read afterwards, so any number of sequences
    share them. A sequence that holds rows keeps them alive when they leave the cache; that memory
    is charged at admission, not here.

    Invariants: ``num_bytes`` is the sum over all entries and never above ``max_bytes``.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._entries: OrderedDict[tuple[str, EmbeddingRef], torch.Tensor] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """Bytes of all entries."""
        return self._num_bytes

    def find(self, tenant: str, ref: EmbeddingRef) -> torch.Tensor | None:
        """Return the rows of ``ref`` and count them as used; ``None`` if they are not here."""
        rows = self._entries.get((tenant, ref))
        GENERATOR_EMBEDDING_CACHE_LOOKUPS.labels("miss" if rows is None else "hit").inc()
        if rows is not None:
            self._entries.move_to_end((tenant, ref))
        return rows

    def keep(self, tenant: str, ref: EmbeddingRef, rows: torch.Tensor) -> None:
        """Keep ``rows`` and let go of what was not used for longest, if there is no room.

        Rows larger than the whole cache are not kept.
        """
        if rows.nbytes > self._max_bytes:
            return
        replaced = self._entries.pop((tenant, ref), None)
        self._num_bytes += rows.nbytes - (0 if replaced is None else replaced.nbytes)
        self._entries[tenant, ref] = rows
        while self._num_bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self._num_bytes -= oldest.nbytes
        GENERATOR_EMBEDDING_CACHE_BYTES.set(self._num_bytes)

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if an invariant does not hold."""
        assert self._num_bytes == sum(rows.nbytes for rows in self._entries.values())
        assert self._num_bytes <= self._max_bytes
