"""Read one answer from its generator call."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from chiasm.common.errors import UnavailableError

from .chat_events import ChatDelta, Finish, Usage
from .generator_client import EmbeddingNeeded, SequenceFinished, TokensAdded

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from .answer_text import AnswerText
    from .generator_client import GenerateCall
    from .media_batch import MediaBatch
    from .media_spans import ExpandedPrompt
    from .request_metrics import RequestMetrics


class Answer:
    """The answer to one prompt as it grows: its text and the tokens counted so far."""

    def __init__(
        self,
        text: AnswerText,
        prompt: ExpandedPrompt,
        requested_stop_ids: tuple[int, ...],
        metrics: RequestMetrics,
    ) -> None:
        """Start an answer.

        Args:
            text: Turns its tokens into text.
            prompt: The prompt, for the usage.
            requested_stop_ids: Stop tokens that the client named and wants to be told of.
            metrics: Counts its tokens.
        """
        self._text = text
        self._requested_stop_ids = frozenset(requested_stop_ids)
        self._metrics = metrics
        self._usage = Usage(
            num_prompt_tokens=len(prompt.token_ids), num_media_tokens=prompt.num_media_tokens
        )

    async def read(self, call: GenerateCall, batch: MediaBatch) -> AsyncGenerator[ChatDelta, None]:
        """Yield the answer's deltas as the generator's events come.

        Args:
            call: The running call.
            batch: The request's media, for embeddings that the generator misses.

        Yields:
            Deltas; the last one has ``finish`` set.

        Raises:
            ChiasmError: The generator failed or broke off.
        """
        async for event in call:
            if isinstance(event, TokensAdded):
                if self._usage.num_output_tokens == 0:
                    batch.release_sources()
                    call.finish_sending()
                delta = self._add(event)
                yield delta
                if delta.finish:
                    return
            elif isinstance(event, EmbeddingNeeded):
                batch.resend(event.embedding_id)
            else:
                yield self._end(event)
                return
        raise UnavailableError("The generator broke off.")

    def _add(self, event: TokensAdded) -> ChatDelta:
        num_tokens = len(event.token_ids)
        self._metrics.record_tokens(num_tokens)
        self._usage = replace(
            self._usage, num_output_tokens=self._usage.num_output_tokens + num_tokens
        )
        text = self._text.feed(event.token_ids)
        finish = Finish("stop", self._text.stop_string) if self._text.stop_string else None
        return replace(self._delta(text, event.token_ids, finish), logprobs=event.logprobs)

    def _end(self, event: SequenceFinished) -> ChatDelta:
        if event.finish_reason == "cancelled":
            raise UnavailableError("The generator cancelled the answer.")
        self._usage = replace(self._usage, num_cached_tokens=event.num_cached_tokens)
        text = self._text.flush()
        if self._text.stop_string:
            return self._delta(text, (), Finish("stop", self._text.stop_string))
        is_requested = event.stop_token_id in self._requested_stop_ids
        stop_token_id = event.stop_token_id if is_requested else None
        return self._delta(text, (), Finish(event.finish_reason, stop_token_id=stop_token_id))

    def _delta(self, text: str, token_ids: tuple[int, ...], finish: Finish | None) -> ChatDelta:
        if finish:
            self._metrics.finish(finish.reason, self._usage)
        return ChatDelta(text, token_ids, self._usage, finish)
