"""Answer chat requests: the one pipeline behind REST and gRPC."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from chiasm.common.errors import DeadlineExceededError
from chiasm.common.logging import bind_request_id
from chiasm.common.media import MediaSpan, RequestContext

from .answer import Answers
from .answer_text import AnswerText
from .bad_words import encode_bad_words
from .deadline import Deadline
from .generator_client import GenerateStart
from .guide_param import naming_guide
from .media_batch import MediaBatch
from .media_spans import expand
from .media_task import MediaServices
from .prompt_checks import (
    check_characters,
    check_expanded,
    check_media,
    check_sampling,
    check_text,
)
from .request_metrics import RequestMetrics
from .served_model import ModelCard
from .stop_strings import StopStrings
from .truncation import check_truncation, truncate

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from chiasm.common.sampling import SamplingWishes

    from .budgets import ByteBudget
    from .chat_events import ChatDelta
    from .chat_request import Caller, ChatRequest
    from .drain import Drain
    from .encoder_client import EncoderClient
    from .generator_client import GeneratorClient, GeneratorInfo
    from .media_spans import ExpandedPrompt
    from .media_task import PlannedItem
    from .served_model import ServedModel
    from .stack_info import StackInfo


class ChatPipeline:
    """Answers one conversation at a time per call of ``run``; keeps no state between calls."""

    def __init__(
        self,
        model: ServedModel,
        stack: StackInfo,
        encoder: EncoderClient,
        generator: GeneratorClient,
        kept_sources: ByteBudget,
        drain: Drain,
    ) -> None:
        self._model = model
        self._stack = stack
        self._encoder = encoder
        self._generator = generator
        self._kept_sources = kept_sources
        self._drain = drain

    @property
    def model(self) -> ServedModel:
        """The served model."""
        return self._model

    def model_card(self) -> ModelCard:
        """Return what is told of the served model; its length is 0 while it is unknown."""
        generator, encoder = self._stack.generator, self._stack.encoder
        return ModelCard(
            name=self._model.name,
            max_model_len=generator.max_model_len if generator else 0,
            modalities=tuple(encoder.modalities) if encoder else (),
            created_s=self._model.created_s,
        )

    def run(self, request: ChatRequest, caller: Caller) -> AsyncGenerator[ChatDelta, None]:
        """Answer ``request``.

        1. Check the request, render and encode the prompt; a text too long on its own ends here.
        2. Start all media at once and wait until each is planned.
        3. Splice the expansions in and start the generator; news of embeddings follow on its call.
        4. Turn tokens into text until the answer ends.

        Closing the generator cancels all work through to the peers.

        Args:
            request: Checked request.
            caller: Who asks.

        Returns:
            Deltas; the last one of each answer has ``finish`` set.

        Raises:
            ChiasmError: The request is refused or failed, also after some deltas.
        """
        return self._drain.end_on_expiry(self._run(request, caller))

    async def _run(self, request: ChatRequest, caller: Caller) -> AsyncGenerator[ChatDelta, None]:
        deadline = Deadline.after(caller.timeout_s)
        context = self._context(request, caller)
        bind_request_id(context.request_id)
        with (
            RequestMetrics(self._model.name, context.request_id) as metrics,
            naming_guide(request.guide_param),
        ):
            generator = self._check(request)
            encoder = self._stack.require_encoder() if request.media_items else None
            placeholders = encoder.placeholders if encoder else {}
            prompt = await self._model.prompts.build(request, placeholders)
            if request.truncation is None:
                check_text(prompt, generator.max_model_len)
            services = MediaServices(self._encoder, self._stack.resolver, self._kept_sources)
            async with MediaBatch(request.media_items, context, services, deadline) as batch:
                planned = await _plan(batch, deadline)
                layouts = [item.layout for item in planned]
                expanded = expand(prompt, layouts)
                expanded = truncate(expanded, layouts, request, generator.max_model_len)
                check_expanded(len(expanded.token_ids), generator.max_model_len)
                start = self._start(request, context, expanded, planned, generator)
                async with self._generator.generate(start, deadline) as call:
                    batch.connect(call)
                    texts = [
                        self._text(request.stop, start.sampling, generator)
                        for _ in range(start.sampling.num_sequences)
                    ]
                    answers = Answers(texts, expanded, start.sampling.stop_token_ids, metrics)
                    async with aclosing(answers.read(call, batch)) as deltas:
                        async for delta in deltas:
                            yield delta

    def _check(self, request: ChatRequest) -> GeneratorInfo:
        self._model.check_name(request.model)
        generator = self._stack.require_generator()
        check_sampling(request.sampling, generator)
        if request.media_items:
            modalities = self._stack.require_encoder().modalities
            check_media(request.media_items, modalities, self._model.max_items)
        check_truncation(request.truncation, generator.max_model_len)
        if request.truncation is None:
            check_characters(
                request.num_text_chars,
                self._model.tokenizer.max_token_chars,
                generator.max_model_len,
            )
        return generator

    def _context(self, request: ChatRequest, caller: Caller) -> RequestContext:
        return RequestContext(
            request_id=request.request_id,
            attempt_id=uuid.uuid4().hex,
            tenant=caller.tenant,
            model=self._model.name,
            cache_salt=request.cache_salt,
            priority=request.priority,
        )

    def _start(
        self,
        request: ChatRequest,
        context: RequestContext,
        expanded: ExpandedPrompt,
        planned: list[PlannedItem],
        generator: GeneratorInfo,
    ) -> GenerateStart:
        spans = [
            MediaSpan(offset, item.ref, item.layout, item.is_ready)
            for offset, item in zip(expanded.offsets, planned, strict=True)
        ]
        room = generator.max_model_len - len(expanded.token_ids)
        return GenerateStart(
            context=context,
            token_ids=expanded.token_ids,
            spans=tuple(sorted(spans, key=lambda span: span.offset)),
            sampling=self._resolve(request, room),
        )

    def _resolve(self, request: ChatRequest, room: int) -> SamplingWishes:
        """Fill in the checkpoint's defaults; at most ``room`` tokens are generated."""
        sampling = self._model.defaults.fill_in(request.sampling, room)
        bad_words = encode_bad_words(request.bad_words, self._model.tokenizer.encode)
        return replace(sampling, bad_words=(*sampling.bad_words, *bad_words))

    def _text(
        self, stop: tuple[str, ...], sampling: SamplingWishes, generator: GeneratorInfo
    ) -> AnswerText:
        eos_ids = frozenset() if sampling.ignore_eos else generator.eos_token_ids
        return AnswerText(
            self._model.tokenizer.detokenizer(),
            StopStrings(stop),
            eos_ids.union(sampling.stop_token_ids),
            sampling.min_tokens,
        )


async def _plan(batch: MediaBatch, deadline: Deadline) -> list[PlannedItem]:
    """Return the plan of every item, or raise ``DeadlineExceededError`` if it takes too long."""
    try:
        async with asyncio.timeout(deadline.remaining_s()):
            return await batch.planned()
    except TimeoutError:
        raise DeadlineExceededError("The deadline passed before the media were planned.") from None
