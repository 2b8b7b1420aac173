"""A session on the fake model, in this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from chiasm.common.errors import (
    ChiasmError,
)
from chiasm.common.limits import Limits
from chiasm.common.media import (
    MediaSpan,
    RequestContext,
)
from chiasm.common.sampling import SamplingWishes
from chiasm.generator.admission import Admission, GenerationRequest
from chiasm.generator.embedding_loader import EmbeddingLoader
from chiasm.generator.engine.async_engine import AsyncEngine
from chiasm.generator.engine.outputs import Finished, TokenDelta
from chiasm.generator.engine.queue_budget import QueueBudget, QueueLimits
from chiasm.generator.generation import GenerationService
from chiasm.generator.guides import Guides
from chiasm.generator.session import Session
from chiasm.generator.session_messages import (
    StartRequest,
)
from tests.fakes.embedding_source import FakeEmbeddingSource
from tests.fakes.generator_engine import BYTE_SPEC, EngineParts, expected_tokens

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from chiasm.generator.generation import GenerationEvent
    from chiasm.generator.session_messages import SessionCommand, SessionEvent

WAIT_S = 5.0


class _NoThreads:
    def rest(self) -> None:
        """Do nothing."""


class SessionSetup:
    """A session on the fake model; events are kept by request as a caller reads them."""

    def __init__(self) -> None:
        self.parts = EngineParts(num_blocks=128)
        self.budget = QueueBudget(QueueLimits(100, 10_000, 1 << 20))
        self.engine = AsyncEngine(self.parts.engine, self.budget, _NoThreads())
        self.service = GenerationService(
            Admission(BYTE_SPEC, "tiny", 128, Limits()),
            self.engine,
            EmbeddingLoader(FakeEmbeddingSource(), torch.float32, 1 << 20),
            Guides(None),
            span_wait_s=WAIT_S,
        )
        self.session = Session(self.service)
        self.events: dict[int, list[GenerationEvent | ChiasmError]] = defaultdict(list)
        self.batches: list[list[SessionEvent]] = []
        self._commands: asyncio.Queue[SessionCommand | None] = asyncio.Queue()
        self._has_come = asyncio.Event()
        self.reader = asyncio.create_task(self._read())

    def say(self, *commands: SessionCommand | None) -> None:
        """Send commands; ``None`` says that no more come."""
        for command in commands:
            self._commands.put_nowait(command)

    def start(
        self,
        key: int,
        *,
        max_tokens: int = 5,
        credit: int = 1000,
        deadline_s: float = 60.0,
        spans: tuple[MediaSpan, ...] = (),
        is_half_closed: bool = False,
        num_prompt_logprobs: int | None = None,
        num_sequences: int = 1,
    ) -> None:
        """Start a request whose prompt follows from its key."""
        request = GenerationRequest(
            context=RequestContext(f"request {key}", "attempt", "tenant"),
            token_ids=self.prompt(key, spans),
            spans=spans,
            wishes=SamplingWishes(
                max_tokens=max_tokens,
                temperature=0.0,
                num_prompt_logprobs=num_prompt_logprobs,
                num_sequences=num_sequences,
            ),
        )
        self.say(StartRequest(key, request, deadline_s, credit, is_half_closed))

    def prompt(self, key: int, spans: tuple[MediaSpan, ...] = ()) -> tuple[int, ...]:
        """Return the prompt of a request."""
        return (key % 200 + 1, 50, 50, 2) if spans else (key % 200 + 1, 2, 3)

    async def until_over(self, *keys: int) -> None:
        """Return when each request has had its last event."""
        async with asyncio.timeout(WAIT_S):
            while not all(is_over(self.events[key]) for key in keys):
                await self.next_batch()

    async def until_tokens(self, key: int, num_tokens: int) -> None:
        """Return when a request has had so many tokens."""
        async with asyncio.timeout(WAIT_S):
            while len(self.tokens(key)) < num_tokens:
                await self.next_batch()

    async def until_finished(self, key: int, num_sequences: int) -> None:
        """Return when so many sequences of a request have ended."""
        async with asyncio.timeout(WAIT_S):
            while sum(isinstance(event, Finished) for event in self.events[key]) < num_sequences:
                await self.next_batch()

    def tokens(self, key: int, index: int | None = None) -> list[int]:
        """Return the tokens that a request, or one of its answers, has had."""
        deltas = [event for event in self.events[key] if isinstance(event, TokenDelta)]
        if index is not None:
            deltas = [delta for delta in deltas if delta.index == index]
        return [token_id for delta in deltas for token_id in delta.token_ids]

    def expected(self, key: int, num_tokens: int) -> list[int]:
        """Return the first tokens that the fake model gives a request."""
        return expected_tokens(list(self.prompt(key)), num_tokens)

    async def until_free(self) -> None:
        """Pass requests through the engine until nothing of the others is left."""
        async with asyncio.timeout(WAIT_S):
            while self.parts.engine.num_sequences or self.engine.num_sequences:
                await asyncio.to_thread(lambda: None)  # a turn for the loop and the engine
        assert self.parts.blocks.num_used_blocks == 0
        assert (self.budget.num_waiting, self.budget.embedding_bytes) == (0, 0)

    async def close(self) -> None:
        """Go away and stop the engine."""
        self.reader.cancel()
        await asyncio.gather(self.reader, return_exceptions=True)
        await self.engine.stop()

    async def until_only(self, tasks: set[asyncio.Task[object]]) -> None:
        """Return when no task is left but these."""
        async with asyncio.timeout(WAIT_S):
            while asyncio.all_tasks() - tasks:
                await asyncio.to_thread(lambda: None)

    async def _read(self) -> None:
        async with contextlib.aclosing(self.session.run(self._iterate())) as batches:
            async for batch in batches:
                self.batches.append(batch)
                for event in batch:
                    self.events[event.key].append(event.event)
                self._has_come.set()

    async def _iterate(self) -> AsyncIterator[SessionCommand]:
        while (command := await self._commands.get()) is not None:
            yield command

    async def next_batch(self) -> None:
        """Return when another batch has come."""
        self._has_come.clear()
        await self._has_come.wait()


def is_over(events: list[GenerationEvent | ChiasmError]) -> bool:
    return bool(events) and isinstance(events[-1], Finished | ChiasmError)
