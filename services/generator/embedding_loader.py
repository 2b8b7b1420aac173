"""Bring embeddings into host memory: from the cache, from the store, or from inline chunks."""

from __future__ import annotations

import asyncio
from mmap import mmap
from typing import TYPE_CHECKING, Protocol

import torch

from chiasm.common.errors import InvalidRequestError, StoreUnavailableError
from chiasm.common.finite import is_finite
from chiasm.common.media import DataType
from chiasm.common.metrics import GENERATOR_EMBEDDING_LOADS
from chiasm.generator.embedding_cache import EmbeddingCache

if TYPE_CHECKING:
    from chiasm.common.media import Embedding, EmbeddingRef

    Load = asyncio.Task[torch.Tensor | None]

_TORCH_DTYPE = {
    DataType.FLOAT32: torch.float32,
    DataType.FLOAT16: torch.float16,
    DataType.BFLOAT16: torch.bfloat16,
}


class EmbeddingSource(Protocol):
    """Where embeddings come from; ``EmbeddingStore`` is the real one."""

    async def get(self, tenant: str, ref: EmbeddingRef) -> Embedding | None:
        """Return the embedding of ``ref``, or ``None`` if it is not there.

        Raises:
            StoreUnavailableError: The source cannot be used now.
        """
        ...


class EmbeddingLoader:
    """Loads rows once per process and keeps the last used ones in host memory.

    A row is that of the SPLICE tensor and, behind it, those of the DEEPSTACK tensors by level.

    Requests that want the same embedding at once share one load. An embedding that a live sequence
    holds stays in memory whether or not it is still cached here.
    """

    def __init__(
        self, source: EmbeddingSource | None, dtype: torch.dtype, max_cache_bytes: int
    ) -> None:
        """Build an empty cache.

        Args:
            source: Embedding store; ``None`` if there is none, then everything comes inline.
            dtype: Element type of the language model, to which rows are converted.
            max_cache_bytes: Bytes that the cache may keep.
        """
        self._source = source
        self._dtype = dtype
        self._cache = EmbeddingCache(max_cache_bytes)
        self._loads: dict[tuple[str, EmbeddingRef], Load] = {}

    @property
    def cache_bytes(self) -> int:
        """Bytes in the cache now; never above its bound."""
        return self._cache.num_bytes

    async def load(self, tenant: str, ref: EmbeddingRef) -> torch.Tensor | None:
        """Return the rows of an embedding, from the cache or the store.

        Args:
            tenant: Tenant that asks; embeddings of others are not seen.
            ref: The embedding; tensors of one shape.

        Returns:
            [num_embedding_tokens, num_tensors * hidden_size], dtype of the model, on the host,
            shared with other sequences and therefore not to be written; ``None`` if the store has
            it not or does not answer.

        Raises:
            InvalidRequestError: The rows are not finite (reason ``INVALID_EMBEDDING``).
        """
        rows = self._cache.find(tenant, ref)
        if rows is not None:
            GENERATOR_EMBEDDING_LOADS.labels("host").inc()
            return rows
        load = self._loads.get((tenant, ref))
        if load is None:
            load = self._start(tenant, ref)
        else:
            GENERATOR_EMBEDDING_LOADS.labels("joined").inc()
        # A caller that goes away must not take the load from those that share it.
        return await asyncio.shield(load)

    async def accept(self, tenant: str, embedding: Embedding) -> torch.Tensor:
        """Return the rows of an embedding that came inline, and cache them; see ``load``."""
        rows = await asyncio.to_thread(_to_rows, embedding, self._dtype)
        self._cache.keep(tenant, embedding.ref, rows)
        GENERATOR_EMBEDDING_LOADS.labels("inline").inc()
        return rows

    def _start(self, tenant: str, ref: EmbeddingRef) -> Load:
        load = asyncio.create_task(self._load_from_source(tenant, ref))
        self._loads[tenant, ref] = load

        def forget(done: Load) -> None:
            del self._loads[tenant, ref]
            # An error counts as seen even if all callers have left.
            _ = done.cancelled() or done.exception()

        load.add_done_callback(forget)
        return load

    async def _load_from_source(self, tenant: str, ref: EmbeddingRef) -> torch.Tensor | None:
        embedding = None
        if self._source is not None:
            try:
                embedding = await self._source.get(tenant, ref)
            except StoreUnavailableError:
                GENERATOR_EMBEDDING_LOADS.labels("unavailable").inc()
                return None
        if embedding is None:
            GENERATOR_EMBEDDING_LOADS.labels("miss").inc()
            return None
        rows = await asyncio.to_thread(_to_rows, embedding, self._dtype)
        self._cache.keep(tenant, ref, rows)
        GENERATOR_EMBEDDING_LOADS.labels("store").inc()
        return rows


def _to_rows(embedding: Embedding, dtype: torch.dtype) -> torch.Tensor:
    tensors = []
    for spec, buffer in zip(embedding.ref.tensors, embedding.buffers, strict=True):
        storage = torch.frombuffer(_writable(buffer), dtype=_TORCH_DTYPE[spec.dtype])
        tensors.append(storage.view(spec.shape).to(dtype))
    rows = tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)
    if not is_finite(rows):
        raise InvalidRequestError(
            "An embedding has values that are not finite.", reason="INVALID_EMBEDDING"
        )
    return rows


def _writable(buffer: memoryview) -> bytearray | mmap:
    """Return the memory behind ``buffer`` as torch takes it, without a copy if that can be had.

    torch refuses read-only views, even of memory that is itself writable.
    """
    owner = buffer.obj
    if isinstance(owner, bytearray | mmap) and len(owner) == buffer.nbytes:
        return owner
    return bytearray(buffer)
