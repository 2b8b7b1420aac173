"""Run one request: admit it, wait for its embeddings, report its tokens."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import structlog

from chiasm.generator.engine.group_stream import GroupStream
from chiasm.generator.engine.outputs import Finished, NeedEmbedding, PromptLogprobs, TokenDelta
from chiasm.generator.engine.sequence import Origin
from chiasm.generator.span_tracker import SpanTracker

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from chiasm.generator.admission import Admission, GenerationRequest
    from chiasm.generator.embedding_loader import EmbeddingLoader
    from chiasm.generator.engine.async_engine import AsyncEngine
    from chiasm.generator.guides import Guides
    from chiasm.generator.span_tracker import SpanUpdate

log = structlog.get_logger(__name__)

# Longer prompts are checked in a thread; up to here it takes well below a millisecond.
_MAX_INLINE_TOKENS = 4096
_NUM_SEEDS = 1 << 64


@dataclass(frozen=True, slots=True)
class Admitted:
    """The request is valid and queued."""

    seq_id: int


GenerationEvent = Admitted | NeedEmbedding | PromptLogprobs | TokenDelta | Finished


class GenerationService:
    """What the generator does for a request, apart from transport."""

    def __init__(
        self,
        admission: Admission,
        engine: AsyncEngine,
        loader: EmbeddingLoader,
        guides: Guides,
        span_wait_s: float,
    ) -> None:
        self._admission = admission
        self._guides = guides
        self._engine = engine
        self._loader = loader
        self._span_wait_s = span_wait_s
        self._is_draining = asyncio.Event()

    async def wait_draining(self) -> None:
        """Return when ``drain`` was called."""
        await self._is_draining.wait()

    def drain(self) -> None:
        """Refuse new requests from now on; live ones go on."""
        self._engine.drain()
        self._is_draining.set()

    async def generate(
        self, request: GenerationRequest, updates: AsyncIterator[SpanUpdate]
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Yield what happens to ``request``; it ends when all its sequences have.

        Closing the generator at any point, or cancelling its task, frees the sequence's blocks
        before the next step.

        Args:
            request: The prompt; nothing of it is checked yet.
            updates: What the caller says about embeddings later.

        Raises:
            ChiasmError: The request is refused or cannot be finished.
        """
        generation = await self.start(request, updates)
        try:
            yield Admitted(generation.stream.seq_id)
            while True:
                event = await generation.stream.read()
                yield event
                if isinstance(event, Finished):
                    generation.log_finished(event)
                    if generation.stream.is_over:
                        return
        finally:
            await generation.close()

    async def start(
        self, request: GenerationRequest, updates: AsyncIterator[SpanUpdate]
    ) -> Generation:
        """Check ``request`` and queue it; see ``generate``.

        Returns:
            The running generation, which the caller must close, whatever happens.

        Raises:
            ChiasmError: The request is refused. Nothing was queued.
        """
        if len(request.token_ids) > _MAX_INLINE_TOKENS:
            prompt, sampling = await asyncio.to_thread(self._admission.check, request)
        else:
            prompt, sampling = self._admission.check(request)
        if request.wishes.guide is not None:
            grammar = await self._guides.compile(request.wishes.guide, request.context.tenant)
            sampling = replace(sampling, grammar=grammar)
        samplings = [
            sampling,
            *(
                # The prompt is the same: it is told of once.
                replace(
                    sampling, seed=(sampling.seed + index) % _NUM_SEEDS, num_prompt_logprobs=None
                )
                for index in range(1, request.wishes.num_sequences)
            ),
        ]
        origin = Origin.of(request.context)
        stream = GroupStream(self._engine.submit_group(prompt, samplings, origin))
        tracker = SpanTracker(self._engine, self._loader, stream, request.context.tenant)
        tracker.start(prompt.spans, updates, self._span_wait_s)
        return Generation(self._engine, stream, tracker, request.context.request_id)


class Generation:
    """One admitted request.

    Attributes:
        stream: What happens to its sequences.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        stream: GroupStream,
        tracker: SpanTracker,
        request_id: str,
    ) -> None:
        self._engine = engine
        self._tracker = tracker
        self._request_id = request_id
        self.stream = stream

    async def close(self) -> None:
        """Forget the request; if it has not ended, its blocks are free before the next step.

        The engine is told before anything is awaited.
        """
        for seq_id in self.stream.seq_ids:
            self._engine.close(seq_id)
        await self._tracker.close()

    def stop(self, index: int) -> None:
        """End one of the sequences, whose blocks are free before the next step.

        Nothing happens if it has ended or there is none of that index.
        """
        if index < len(self.stream.seq_ids):
            self.stream.stop(index)
            self._engine.close(self.stream.seq_ids[index])

    def log_finished(self, finished: Finished) -> None:
        """Write the one line that a finished request leaves in the log."""
        log.info(
            "sequence_finished",
            request_id=self._request_id,
            seq_id=self.stream.seq_ids[finished.index],
            finish_reason=finished.reason.value,
            num_prompt_tokens=finished.num_prompt_tokens,
            num_output_tokens=finished.num_output_tokens,
        )
