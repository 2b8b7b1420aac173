"""Carry what happens to one sequence to the coroutine that waits for it."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from chiasm.generator.engine.outputs import (
    Failed,
    Finished,
    FinishReason,
    NeedEmbedding,
    PromptLogprobs,
    TokenDelta,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chiasm.generator.engine.logprobs import TokenLogprobs
    from chiasm.generator.engine.outputs import SequenceOutput

    StreamEvent = NeedEmbedding | PromptLogprobs | TokenDelta | Finished

# Prompt tokens told of in one event.
MAX_SCORED_TOKENS = 64


class SequenceStream:
    """Unread tokens and the end of one sequence; belongs to the event loop.

    Tokens that the reader has not taken are merged, so that a slow reader costs a list of at most
    as many token ids as the context length allows, and stalls nobody.
    """

    def __init__(self, seq_id: int) -> None:
        self.seq_id = seq_id
        self._needed: deque[bytes] = deque()
        self._prompt_logprobs: deque[PromptLogprobs] = deque()
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._num_cached_tokens = 0
        self._end: Finished | Failed | None = None
        self._has_news = asyncio.Event()
        self._listener: Callable[[], None] = self._has_news.set

    @property
    def has_ended(self) -> bool:
        """Whether the end has come, read or not."""
        return self._end is not None

    def push(self, output: SequenceOutput) -> None:
        """Add what one step did; ignored after the end."""
        if self._end is None:
            if output.prompt_logprobs is not None:
                self._prompt_logprobs.extend(_cut(output.prompt_logprobs))
            if output.token_ids:
                self._tokens.extend(output.token_ids)
                self._num_cached_tokens = output.num_cached_tokens
            self._logprobs.extend(output.logprobs)
            self._end = output.end
            self._listener()

    def fail(self, error: Exception) -> None:
        """End the sequence by ``error``; ignored after the end."""
        if self._end is None:
            self._end = Failed(error)
            self._listener()

    def stop(self) -> None:
        """End the sequence as its reader wants; what was not read is lost, but for the end."""
        self._tokens.clear()
        self._logprobs.clear()
        if self._end is None:
            self._end = Finished(FinishReason.CANCELLED, None, 0, 0)
        self._listener()

    def need(self, embedding_id: bytes) -> None:
        """Ask the reader for an embedding that is not in the store; at most once per span."""
        self._needed.append(embedding_id)
        self._listener()

    def listen(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` at all news from now on; then ``take`` is used and ``read`` is not."""
        self._listener = listener

    async def read(self) -> StreamEvent:
        """Wait for news; see ``take``."""
        while (event := self.take()) is None:
            self._has_news.clear()
            await self._has_news.wait()
        return event

    def take(self, max_tokens: int | None = None) -> StreamEvent | None:
        """Return what has not been read yet.

        Args:
            max_tokens: Most tokens that may be returned now; ``None`` for all.

        Returns:
            An embedding that is needed; or how likely some of the prompt's tokens were; or all
            tokens that were not read yet, as far as allowed; or, after the last of them, the end;
            ``None`` if there is nothing, or nothing allowed.

        Raises:
            Exception: The error that ended the sequence; tokens before it are delivered first.
        """
        if self._needed:
            return NeedEmbedding(self._needed.popleft())
        if self._prompt_logprobs:
            return self._prompt_logprobs.popleft()
        if self._tokens:
            taken, logprobs = self._tokens[:max_tokens], self._logprobs[:max_tokens]
            del self._tokens[:max_tokens], self._logprobs[:max_tokens]
            if not taken:
                return None
            return TokenDelta(
                tuple(taken), tuple(logprobs), num_cached_tokens=self._num_cached_tokens
            )
        if isinstance(self._end, Failed):
            raise self._end.error
        return self._end


def _cut(scored: PromptLogprobs) -> Iterator[PromptLogprobs]:
    for first in range(0, len(scored.logprobs), MAX_SCORED_TOKENS):
        logprobs = scored.logprobs[first : first + MAX_SCORED_TOKENS]
        yield PromptLogprobs(scored.start + first, logprobs)
