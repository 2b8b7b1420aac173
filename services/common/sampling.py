"""What a client asks of sampling: the same for gateway and generator, checked on both ends."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.common.errors import InvalidRequestError
from chiasm.common.limits import check_size
from chiasm.v1 import generator_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chiasm.common.limits import Limits

MAX_TEMPERATURE = 100.0
MAX_LOGIT_BIAS = 100.0
MAX_PENALTY = 2.0

_OPTIONAL = (
    *("max_tokens", "temperature", "top_p", "top_k", "seed", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "num_logprobs"),
)


@dataclass(frozen=True, slots=True)
class SamplingWishes:
    """Wishes of a request; ``None`` takes the default, see ``SamplingParams`` in the protos."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    num_logprobs: int | None = None


def wishes_from_proto(message: generator_pb2.SamplingParams) -> SamplingWishes:
    """Return the wishes of a message; nothing of them is checked."""
    given = {field.name: value for field, value in message.ListFields() if field.name in _OPTIONAL}
    return SamplingWishes(
        **given,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logit_bias=tuple((entry.token_id, entry.bias) for entry in message.logit_bias),
        bad_words=tuple(tuple(word.token_ids) for word in message.bad_words),
        allowed_token_ids=tuple(message.allowed_token_ids),
        min_tokens=message.min_tokens,
    )


def wishes_to_proto(wishes: SamplingWishes) -> generator_pb2.SamplingParams:
    """Return the message of wishes."""
    return generator_pb2.SamplingParams(
        **{name: getattr(wishes, name) for name in _OPTIONAL},
        stop_token_ids=wishes.stop_token_ids,
        ignore_eos=wishes.ignore_eos,
        logit_bias=[
            generator_pb2.LogitBias(token_id=token, bias=bias) for token, bias in wishes.logit_bias
        ],
        bad_words=[generator_pb2.TokenSequence(token_ids=word) for word in wishes.bad_words],
        allowed_token_ids=wishes.allowed_token_ids,
        min_tokens=wishes.min_tokens,
    )


def check_wishes(wishes: SamplingWishes, limits: Limits) -> None:
    """Refuse values that no model takes; texts follow vLLM's.

    Raises:
        InvalidRequestError: Names the field.
    """
    _check_counts(wishes, limits)
    _check_number("temperature", wishes.temperature, 0.0, math.inf, "must be non-negative")
    most = f"must be at most {MAX_TEMPERATURE:g}"
    _check_number("temperature", wishes.temperature, 0.0, MAX_TEMPERATURE, most)
    _check_number("top_p", wishes.top_p, math.ulp(0.0), 1.0, "must be in (0, 1]")
    _check_number("min_p", wishes.min_p, 0.0, 1.0, "must be in [0, 1]")
    penalty, name = wishes.repetition_penalty, "repetition_penalty"
    _check_number(name, penalty, math.ulp(0.0), math.inf, "must be greater than zero")
    _check_number(name, penalty, 0.0, sys.float_info.max, "must be finite")
    for name in ("presence_penalty", "frequency_penalty"):
        _check_number(name, getattr(wishes, name), -MAX_PENALTY, MAX_PENALTY, "must be in [-2, 2]")
    for _, bias in wishes.logit_bias:
        _check_number("logit_bias", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS, "must be in [-100, 100]")


def check_vocabulary(wishes: SamplingWishes, vocab_size: int) -> None:
    """Refuse tokens that the model does not have.

    Raises:
        InvalidRequestError: Names the field.
    """
    named: dict[str, Iterable[int]] = {
        "stop_token_ids": wishes.stop_token_ids,
        "logit_bias": [token for token, _ in wishes.logit_bias],
        "bad_words": [token for word in wishes.bad_words for token in word],
        "allowed_token_ids": wishes.allowed_token_ids,
    }
    for name, tokens in named.items():
        for token in tokens:
            if token >= vocab_size:
                raise InvalidRequestError(
                    f"{name} must be below the vocabulary size {vocab_size}, got {token}.",
                    param=name,
                )


def _check_counts(wishes: SamplingWishes, limits: Limits) -> None:
    if wishes.max_tokens is not None and wishes.max_tokens < 1:
        raise _refusal("max_tokens", f"must be at least 1, got {wishes.max_tokens}")
    if wishes.max_tokens is not None and wishes.min_tokens > wishes.max_tokens:
        raise _refusal(
            "min_tokens",
            f"must be less than or equal to max_tokens={wishes.max_tokens}, got"
            f" {wishes.min_tokens}",
        )
    if wishes.num_logprobs is not None and wishes.num_logprobs > limits.max_logprobs:
        raise InvalidRequestError(
            f"Requested sample logprobs of {wishes.num_logprobs}, which is greater than max"
            f" allowed: {limits.max_logprobs}",
            param="top_logprobs",
        )
    sizes = (
        (wishes.stop_token_ids, limits.max_stop_token_ids, "stop token ids", "stop_token_ids"),
        (wishes.logit_bias, limits.max_logit_bias, "logit biases", "logit_bias"),
        (wishes.bad_words, limits.max_bad_words, "bad words", "bad_words"),
        (wishes.allowed_token_ids, limits.max_allowed_token_ids, "tokens", "allowed_token_ids"),
    )
    for values, most, what, param in sizes:
        check_size(len(values), most, what, param)
    for word in wishes.bad_words:
        if not 1 <= len(word) <= limits.max_bad_word_tokens:
            raise _refusal(
                "bad_words",
                f"must have 1 to {limits.max_bad_word_tokens} tokens each, got {len(word)}",
            )


def _check_number(name: str, value: float | None, low: float, high: float, rule: str) -> None:
    """Refuse a value outside of ``low`` to ``high``, and NaN."""
    if value is not None and not low <= value <= high:
        raise _refusal(name, f"{rule}, got {value:g}")


def _refusal(name: str, rule: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} {rule}.", param=name)
