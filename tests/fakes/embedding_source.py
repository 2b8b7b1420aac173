"""An embedding store in memory that can be down, slow or forgetful."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from chiasm.common.errors import StoreUnavailableError

if TYPE_CHECKING:
    from chiasm.common.media import Embedding, EmbeddingRef


class FakeEmbeddingSource:
    """Satisfies ``EmbeddingSource``; counts what it is asked."""

    def __init__(self) -> None:
        self._embeddings: dict[tuple[str, bytes], Embedding] = {}
        self.num_gets = 0
        self.is_down = False
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    def put(self, tenant: str, embedding: Embedding) -> None:
        """Keep ``embedding``."""
        self._embeddings[tenant, embedding.ref.embedding_id] = embedding

    async def get(self, tenant: str, ref: EmbeddingRef) -> Embedding | None:
        """Return the embedding of ``ref`` once ``may_answer`` is set."""
        self.num_gets += 1
        await self.may_answer.wait()
        if self.is_down:
            raise StoreUnavailableError("The fake store is down.")
        embedding = self._embeddings.get((tenant, ref.embedding_id))
        return embedding if embedding is not None and embedding.ref == ref else None
