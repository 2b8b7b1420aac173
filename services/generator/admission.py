"""Check a request against the model and the limits before any work is done for it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chiasm.common.errors import InvalidRequestError, NotFoundError
from chiasm.common.media import TensorRole
from chiasm.common.sampling import check_prompt_logprobs, check_vocabulary, check_wishes
from chiasm.generator.engine.sampling_params import SamplingParams
from chiasm.generator.engine.sequence import Prompt
from chiasm.generator.model.positions import compute_positions

if TYPE_CHECKING:
    from chiasm.common.limits import Limits
    from chiasm.common.media import MediaSpan, RequestContext
    from chiasm.common.sampling import SamplingWishes
    from chiasm.generator.model.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt with its media spans and sampling, as the client sent it."""

    context: RequestContext
    token_ids: tuple[int, ...]
    spans: tuple[MediaSpan, ...]
    wishes: SamplingWishes


class Admission:
    """Knows what this generator can do; refuses what it cannot."""

    def __init__(
        self, spec: ModelSpec, model_name: str, max_model_len: int, limits: Limits
    ) -> None:
        """Keep the bounds.

        Args:
            spec: The language model.
            model_name: Served model name.
            max_model_len: Most tokens of prompt plus output; the KV cache holds that many.
            limits: Bounds on what comes from outside.
        """
        self._spec = spec
        self._model_name = model_name
        self._max_model_len = max_model_len
        self._limits = limits

    def check(self, request: GenerationRequest) -> tuple[Prompt, SamplingParams]:
        """Return what the engine needs of a valid request.

        Raises:
            NotFoundError: Another model is asked for.
            InvalidRequestError: The request is wrong, or larger than context or cache.
        """
        self._check_model(request.context)
        token_ids = self._check_tokens(request.token_ids)
        self._check_spans(request.spans, token_ids)
        sampling = self._resolve_sampling(request.wishes, len(token_ids))
        positions = compute_positions(
            self._spec.positions, len(token_ids), request.spans, self._spec.positions_per_s
        )
        return Prompt(request.token_ids, request.spans, positions), sampling

    def _check_model(self, context: RequestContext) -> None:
        if context.model not in ("", self._model_name):
            raise NotFoundError(
                f"The model `{context.model}` does not exist. Valid aliases: {self._model_name}.",
                reason="MODEL_NOT_FOUND",
                param="model",
            )
        if context.adapter:
            raise NotFoundError(
                f"The adapter `{context.adapter}` does not exist.",
                reason="MODEL_NOT_FOUND",
                param="adapter",
            )

    def _check_tokens(self, token_ids: tuple[int, ...]) -> np.ndarray:
        num_tokens, most = len(token_ids), self._max_model_len
        if not num_tokens:
            raise InvalidRequestError("The decoder prompt cannot be empty.", param="token_ids")
        if num_tokens > most:
            raise InvalidRequestError(
                f"This model's maximum context length is {most} tokens. However, your prompt"
                f" contains {num_tokens} input tokens, which exceeds this limit even without any"
                " output tokens. Please reduce the length of the input prompt.",
                reason="PROMPT_TOO_LONG",
                param="input_tokens",
            )
        if num_tokens == most:
            raise InvalidRequestError(
                f"The decoder prompt (length {num_tokens}) plus the number of requested output"
                " tokens (at least 1) is longer than the maximum model length of"
                f" {most}. Please reduce the length of the input prompt.",
                reason="PROMPT_TOO_LONG",
                param="input_tokens",
            )
        array = np.array(token_ids)
        if array.max() >= self._spec.vocab_size:
            raise InvalidRequestError(
                f"Token id {array.max()} is out of vocabulary.", param="token_ids"
            )
        return array

    def _check_spans(self, spans: tuple[MediaSpan, ...], token_ids: np.ndarray) -> None:
        if len(spans) > self._limits.max_media_items:
            raise InvalidRequestError(
                f"At most {self._limits.max_media_items} media items may be provided in one"
                " prompt.",
                param="spans",
            )
        end = 0
        refs = {span.ref.embedding_id: span.ref for span in spans}
        for index, span in enumerate(spans):
            param = f"spans[{index}]"
            if refs[span.ref.embedding_id] != span.ref:
                raise _mismatch("Media items of one embedding must have equal tensors.", param)
            self._check_tensors(span, param)
            self._check_group(span, param)
            if span.offset < end or span.end > len(token_ids):
                raise _mismatch("Media spans must be ordered, apart and within the prompt.", param)
            expansion = np.repeat(
                [run.token_id for run in span.layout.runs], [run.count for run in span.layout.runs]
            )
            if not np.array_equal(token_ids[span.offset : span.end], expansion):
                raise _mismatch(
                    f"The prompt does not have the media item's expansion at {span.offset}.", param
                )
            end = span.end

    def _check_tensors(self, span: MediaSpan, param: str) -> None:
        tensors = span.ref.tensors
        levels = range(self._spec.num_deepstack_levels)
        expected = [(TensorRole.SPLICE, 0), *((TensorRole.DEEPSTACK, level) for level in levels)]
        if [(tensor.role, tensor.level) for tensor in tensors] != expected:
            raise _mismatch(
                f"The model takes one spliced tensor and {len(levels)} deepstack tensors, by level,"
                " per media item.",
                param,
            )
        if len({(tensor.shape, tensor.dtype) for tensor in tensors}) != 1:
            raise _mismatch("The tensors of a media item must have one shape and type.", param)
        if len(tensors[0].shape) != 2 or tensors[0].shape[1] != self._spec.hidden_size:
            raise _mismatch(
                f"Image embedding hidden dimension mismatch: got {tensors[0].shape[-1]}, but model"
                f" expects {self._spec.hidden_size}.",
                param,
            )

    def _check_group(self, span: MediaSpan, param: str) -> None:
        """Refuse groups that the model was not trained with: one takes memory by its square."""
        size, group = self._spec.group_tokens, span.both_ways
        if (group is None) == bool(size):
            kind = "attend to one another both ways" if size else "see only what is before them"
            raise _mismatch(f"The rows of this model's media {kind}; the layout differs.", param)
        if group and group[1] - group[0] != size:
            raise _mismatch(f"A media item of this model has {size} rows.", param)

    def _resolve_sampling(self, wishes: SamplingWishes, num_prompt_tokens: int) -> SamplingParams:
        check_wishes(wishes, self._limits)
        check_vocabulary(wishes, self._spec.vocab_size)
        check_prompt_logprobs(wishes, num_prompt_tokens, self._limits)
        most = self._max_model_len
        if wishes.max_tokens is not None and wishes.max_tokens > most:
            raise InvalidRequestError(
                f"max_tokens={wishes.max_tokens} cannot be greater than max_model_len={most}."
                " Please request fewer output tokens.",
                param="max_tokens",
            )
        room = most - num_prompt_tokens
        own = frozenset() if wishes.ignore_eos else self._spec.eos_token_ids
        return SamplingParams(
            max_tokens=room if wishes.max_tokens is None else min(wishes.max_tokens, room),
            seed=secrets.randbits(64) if wishes.seed is None else wishes.seed,
            temperature=1.0 if wishes.temperature is None else wishes.temperature,
            top_k=wishes.top_k or 0,
            top_p=1.0 if wishes.top_p is None else wishes.top_p,
            min_p=wishes.min_p or 0.0,
            stop_token_ids=own | frozenset(wishes.stop_token_ids),
            repetition_penalty=wishes.repetition_penalty or 1.0,
            presence_penalty=wishes.presence_penalty or 0.0,
            frequency_penalty=wishes.frequency_penalty or 0.0,
            logit_bias=dict(wishes.logit_bias),
            bad_words=wishes.bad_words,
            allowed_token_ids=wishes.allowed_token_ids,
            min_tokens=wishes.min_tokens,
            num_logprobs=wishes.num_logprobs,
            num_prompt_logprobs=wishes.num_prompt_logprobs,
        )


def _mismatch(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(message, reason="LAYOUT_MISMATCH", param=param)
