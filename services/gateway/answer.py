"""Read the answers to one prompt from its generator call."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from chiasm.common.errors import UnavailableError

from .chat_events import ChatDelta, Finish, Usage
from .generator_client import EmbeddingNeeded, PromptScored, SequenceFinished, TokensAdded

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from .answer_text import AnswerText
    from .generator_client import GenerateCall
    from .media_batch import MediaBatch
    from .media_spans import ExpandedPrompt
    from .request_metrics import RequestMetrics


class Answers:
    """The answers to one prompt as they grow: their texts and the tokens counted so far."""

    def __init__(
        self,
        texts: Sequence[AnswerText],
        prompt: ExpandedPrompt,
        requested_stop_ids: tuple[int, ...],
        metrics: RequestMetrics,
    ) -> None:
        """Start the answers.

        Args:
            texts: Turn the tokens of each answer into text.
            prompt: The prompt, for the usage.
            requested_stop_ids: Stop tokens that the client named and wants to be told of.
            metrics: Counts their tokens.
        """
        self._live = dict(enumerate(texts))
        self._num_choices = len(texts)
        self._requested_stop_ids = frozenset(requested_stop_ids)
        self._metrics = metrics
        self._media_offsets = prompt.offsets
        self._usage = Usage(
            num_prompt_tokens=len(prompt.token_ids), num_media_tokens=prompt.num_media_tokens
        )

    async def read(self, call: GenerateCall, batch: MediaBatch) -> AsyncGenerator[ChatDelta, None]:
        """Yield the answers' deltas as the generator's events come.

        Args:
            call: The running call.
            batch: The request's media, for embeddings that the generator misses.

        Yields:
            Deltas; the last one of each answer has ``finish`` set.

        Raises:
            ChiasmError: The generator failed or broke off.
        """
        async for event in call:
            if isinstance(event, EmbeddingNeeded):
                batch.resend(event.embedding_id)
                continue
            if isinstance(event, PromptScored):
                yield ChatDelta("", (), self._usage, prompt_logprobs=event.logprobs)
                continue
            if self._usage.num_output_tokens == 0:
                batch.release_sources()
                call.finish_sending()
            text = self._live.get(event.index)
            if text is None:  # what comes behind a stop string is of no use
                continue
            if isinstance(event, SequenceFinished):
                delta = self._end(text, event)
            else:
                delta = self._add(text, event)
            if self._live and delta.finish and isinstance(event, TokensAdded):
                call.stop_answer(event.index)
            if not self._live:
                media = batch.receipts(self._media_offsets)
                yield replace(delta, usage=replace(delta.usage, media=media))
                return
            yield delta
        raise UnavailableError("The generator broke off.")

    def _add(self, text: AnswerText, event: TokensAdded) -> ChatDelta:
        added = text.feed(event.token_ids)
        num_tokens = added.num_tokens
        self._metrics.record_tokens(event.index, num_tokens)
        usage = self._usage
        if event.index == 0:  # the others share its prompt
            usage = replace(usage, num_cached_tokens=event.num_cached_tokens)
        self._usage = replace(usage, num_output_tokens=usage.num_output_tokens + num_tokens)
        finish = Finish("stop", text.stop_string) if text.stop_string else None
        return self._note(
            ChatDelta(
                added.text,
                event.token_ids[:num_tokens],
                self._usage,
                finish,
                event.logprobs[:num_tokens],
                event.index,
            )
        )

    def _end(self, text: AnswerText, event: SequenceFinished) -> ChatDelta:
        if event.finish_reason == "cancelled":
            raise UnavailableError("The generator cancelled the answer.")
        added = text.flush()
        is_requested = event.stop_token_id in self._requested_stop_ids
        stop_token_id = event.stop_token_id if is_requested else None
        finish = Finish(event.finish_reason, stop_token_id=stop_token_id)
        if text.stop_string:
            finish = Finish("stop", text.stop_string)
        return self._note(ChatDelta(added, (), self._usage, finish, index=event.index))

    def _note(self, delta: ChatDelta) -> ChatDelta:
        """Take note of the end of an answer."""
        if delta.finish:
            del self._live[delta.index]
            if not self._live:
                self._metrics.finish(delta.finish.reason, self._usage, self._num_choices)
        return delta
