"""Wait for the embeddings of one request and hand them to the engine as they arrive."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.common.errors import (
    DeadlineExceededError,
    EmbeddingExpiredError,
    InvalidRequestError,
)
from chiasm.common.metrics import GENERATOR_SPAN_WAIT_SECONDS
from chiasm.generator.embedding_assembly import EmbeddingAssembly, EmbeddingPiece

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    import torch

    from chiasm.common.media import EmbeddingRef, MediaSpan
    from chiasm.generator.embedding_loader import EmbeddingLoader
    from chiasm.generator.engine.async_engine import AsyncEngine
    from chiasm.generator.engine.group_stream import GroupStream


@dataclass(frozen=True, slots=True)
class EmbeddingReady:
    """The caller says that an embedding is in the store now."""

    embedding_id: bytes


@dataclass(frozen=True, slots=True)
class EmbeddingFailed:
    """The caller says that an embedding cannot be had, and why."""

    embedding_id: bytes
    reason: str
    message: str


SpanUpdate = EmbeddingReady | EmbeddingFailed | EmbeddingPiece


class SpanTracker:
    """Follows the embeddings of one sequence; belongs to the event loop.

    An embedding goes through these states; several spans may name the same one::

        awaited ──ready──► loading ──found──────────────────────► provided
           │                  └──missed──► needed (asked for) ──┐
           └──chunk──────────────────────────────────────chunk──┴─► provided

    The sequence fails when the caller says ``failed``, closes its side while something is awaited
    or needed, or when ``span_wait_s`` pass before everything is provided.
    """

    def __init__(
        self, engine: AsyncEngine, loader: EmbeddingLoader, stream: GroupStream, tenant: str
    ) -> None:
        self._engine = engine
        self._loader = loader
        self._stream = stream
        self._tenant = tenant
        self._span_indices: dict[bytes, list[int]] = {}
        self._refs: dict[bytes, EmbeddingRef] = {}
        self._awaited: set[bytes] = set()
        self._loading: set[bytes] = set()
        self._needed: set[bytes] = set()
        self._assemblies: dict[bytes, EmbeddingAssembly] = {}
        self._is_half_closed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._started = time.perf_counter()

    def start(
        self,
        spans: tuple[MediaSpan, ...],
        updates: AsyncIterator[SpanUpdate],
        span_wait_s: float,
    ) -> None:
        """Load what is ready and follow ``updates`` until everything is provided.

        Args:
            spans: Media spans of the prompt, checked.
            updates: What the caller says later; ends when it closes its side.
            span_wait_s: Seconds after which a missing embedding fails the sequence.
        """
        for index, span in enumerate(spans):
            embedding_id = span.ref.embedding_id
            self._span_indices.setdefault(embedding_id, []).append(index)
            self._refs[embedding_id] = span.ref
        self._awaited = set(self._refs)
        for span in spans:
            if span.is_ready:
                self._begin_load(span.ref.embedding_id)
        if self._refs:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(span_wait_s, self._give_up, span_wait_s)
        # Followed without spans too: messages that do not belong must be refused.
        self._spawn(self._follow(updates))

    async def close(self) -> None:
        """Stop everything; afterwards nothing is provided any more."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow(self, updates: AsyncIterator[SpanUpdate]) -> None:
        async for update in updates:
            await self._apply(update)
        self._is_half_closed = True
        if self._awaited or self._needed:
            raise _expired()

    async def _apply(self, update: SpanUpdate) -> None:
        if update.embedding_id not in self._refs:
            raise InvalidRequestError(
                "An embedding belongs to no span of the request.", param="embedding_id"
            )
        match update:
            case EmbeddingReady():
                self._begin_load(update.embedding_id)
            case EmbeddingFailed():
                raise EmbeddingExpiredError(update.message, reason=update.reason or None)
            case EmbeddingPiece():
                await self._add_piece(update)

    def _begin_load(self, embedding_id: bytes) -> None:
        if embedding_id in self._awaited | self._needed:
            self._loading.add(embedding_id)
            self._awaited.discard(embedding_id)
            self._spawn(self._load(embedding_id))

    async def _load(self, embedding_id: bytes) -> None:
        rows = await self._loader.load(self._tenant, self._refs[embedding_id])
        self._loading.discard(embedding_id)
        if rows is not None:
            self._provide(embedding_id, rows)
        elif embedding_id in self._needed or self._is_half_closed:
            raise _expired()
        elif embedding_id in self._span_indices:
            self._needed.add(embedding_id)
            self._stream.need(embedding_id)

    async def _add_piece(self, piece: EmbeddingPiece) -> None:
        embedding_id = piece.embedding_id
        if embedding_id not in self._span_indices:
            return
        self._awaited.discard(embedding_id)
        self._needed.add(embedding_id)
        if embedding_id not in self._assemblies:
            self._assemblies[embedding_id] = EmbeddingAssembly(self._refs[embedding_id])
        embedding = self._assemblies[embedding_id].add(piece)
        if embedding is not None:
            del self._assemblies[embedding_id]
            self._provide(embedding_id, await self._loader.accept(self._tenant, embedding))

    def _provide(self, embedding_id: bytes, rows: torch.Tensor) -> None:
        for index in self._span_indices.pop(embedding_id, ()):
            self._engine.provide(self._stream.seq_ids, index, rows)
        self._awaited.discard(embedding_id)
        self._needed.discard(embedding_id)
        if not self._span_indices and self._timer is not None:
            self._timer.cancel()
            GENERATOR_SPAN_WAIT_SECONDS.observe(time.perf_counter() - self._started)

    def _give_up(self, span_wait_s: float) -> None:
        self._stream.fail(
            DeadlineExceededError(
                f"An embedding did not arrive within {span_wait_s:g} seconds.",
                reason="SPAN_TIMEOUT",
            )
        )

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(self._guard(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # A task that is cancelled before its first step never awaits its work.
        task.add_done_callback(lambda _: work.close())

    async def _guard(self, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except Exception as error:
            # The reader of the stream raises it; a bug becomes INTERNAL there.
            self._stream.fail(error)


def _expired() -> EmbeddingExpiredError:
    return EmbeddingExpiredError("An embedding of the prompt is not in the store any more.")
