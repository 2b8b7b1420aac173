"""Hold what a caller says about embeddings until their request takes it."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from chiasm.common.errors import InvalidRequestError
from chiasm.generator.embedding_assembly import EmbeddingPiece

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from chiasm.generator.span_tracker import SpanUpdate

_UPDATE_BYTES = 256
_ALLOWANCE_BYTES = 4 << 20


class UpdateInbox:
    """Updates of one request on a session, where a full inbox must not stop the reader.

    Invariant: the bytes of what is unread, with an overhead for each update, are at most those of
    the request's embeddings and a few megabytes; a caller that sends more ends its request.
    """

    def __init__(self, embedding_bytes: int) -> None:
        self._max_bytes = embedding_bytes + _ALLOWANCE_BYTES
        self._num_bytes = 0
        self._updates: deque[SpanUpdate] = deque()
        self._is_closed = False
        self._has_news = asyncio.Event()

    def put(self, update: SpanUpdate) -> None:
        """Add an update; ignored after ``close``.

        Raises:
            InvalidRequestError: More is unread than the request's embeddings have bytes.
        """
        if self._is_closed:
            return
        self._num_bytes += _num_bytes(update)
        if self._num_bytes > self._max_bytes:
            raise InvalidRequestError(
                "The chunks of a request have more bytes than its embeddings.", param="chunk"
            )
        self._updates.append(update)
        self._has_news.set()

    def close(self) -> None:
        """End the iteration after the last update."""
        self._is_closed = True
        self._has_news.set()

    async def __aiter__(self) -> AsyncIterator[SpanUpdate]:
        """Yield the updates as they come."""
        while True:
            while self._updates:
                update = self._updates.popleft()
                self._num_bytes -= _num_bytes(update)
                yield update
            if self._is_closed:
                return
            self._has_news.clear()
            await self._has_news.wait()


def _num_bytes(update: SpanUpdate) -> int:
    return _UPDATE_BYTES + (len(update.data) if isinstance(update, EmbeddingPiece) else 0)
