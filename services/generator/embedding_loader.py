"""Bring embeddings into host memory: from the cache, from the store, or from inline chunks."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from chiasm.common.errors import InvalidRequestError, StoreUnavailableError
from chiasm.common.media import DataType
from chiasm.common.metrics import GENERATOR_EMBEDDING_LOADS

if TYPE_CHECKING:
    from chiasm.common.media import Embedding, EmbeddingRef

    Key = tuple[str, bytes]

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
        self._max_cache_bytes = max_cache_bytes
        self._cache: OrderedDict[Key, torch.Tensor] = OrderedDict()
        self._cache_bytes = 0
        self._loads: dict[Key, asyncio.Task[torch.Tensor | None]] = {}

    @property
    def cache_bytes(self) -> int:
        """Bytes in the cache now; never above its bound."""
        return self._cache_bytes

    async def load(self, tenant: str, ref: EmbeddingRef) -> torch.Tensor | None:
        """Return the rows of an embedding, from the cache or the store.

        Args:
            tenant: Tenant that asks; embeddings of others are not seen.
            ref: The embedding; tensors of one shape.

        Returns:
            [num_embedding_tokens, num_tensors * hidden_size], dtype of the model, on the host;
            ``None`` if the store has it not or does not answer.

        Raises:
            InvalidRequestError: The rows are not finite (reason ``INVALID_EMBEDDING``).
        """
        key = (tenant, ref.embedding_id)
        rows = self._cache.get(key)
        if rows is not None and rows.shape == _row_shape(ref):
            self._cache.move_to_end(key)
            GENERATOR_EMBEDDING_LOADS.labels("host").inc()
            return rows
        if key not in self._loads:
            task = asyncio.create_task(self._load_from_source(tenant, ref))
            self._loads[key] = task
            task.add_done_callback(lambda _: self._loads.pop(key))
        # A caller that goes away must not take the load from those that share it.
        return await asyncio.shield(self._loads[key])

    async def accept(self, tenant: str, embedding: Embedding) -> torch.Tensor:
        """Return the rows of an embedding that came inline, and cache them; see ``load``."""
        rows = await asyncio.to_thread(_to_rows, embedding, self._dtype)
        self._keep((tenant, embedding.ref.embedding_id), rows)
        GENERATOR_EMBEDDING_LOADS.labels("inline").inc()
        return rows

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
        self._keep((tenant, ref.embedding_id), rows)
        GENERATOR_EMBEDDING_LOADS.labels("store").inc()
        return rows

    def _keep(self, key: Key, rows: torch.Tensor) -> None:
        if rows.nbytes > self._max_cache_bytes:
            return
        replaced = self._cache.pop(key, None)
        self._cache_bytes += rows.nbytes - (0 if replaced is None else replaced.nbytes)
        self._cache[key] = rows
        while self._cache_bytes > self._max_cache_bytes:
            _, oldest = self._cache.popitem(last=False)
            self._cache_bytes -= oldest.nbytes


def _row_shape(ref: EmbeddingRef) -> tuple[int, int]:
    num_rows, width = ref.tensors[0].shape
    return num_rows, len(ref.tensors) * width


def _to_rows(embedding: Embedding, dtype: torch.dtype) -> torch.Tensor:
    tensors = []
    for spec, buffer in zip(embedding.ref.tensors, embedding.buffers, strict=True):
        # A copy of our own: torch takes no read-only buffers.
        storage = torch.from_numpy(np.frombuffer(buffer, dtype=np.uint8).copy())
        tensors.append(storage.view(_TORCH_DTYPE[spec.dtype]).view(spec.shape).to(dtype))
    rows = tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)
    if not bool(rows.isfinite().all()):
        raise InvalidRequestError(
            "An embedding has values that are not finite.", reason="INVALID_EMBEDDING"
        )
    return rows
