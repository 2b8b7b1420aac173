"""What a client asks of sampling: the same for gateway and generator, checked on both ends."""

from __future__ import annotations

import enum
import json
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
GUIDE_PARAM = "structured_outputs"

_OPTIONAL = (
    *("max_tokens", "temperature", "top_p", "top_k", "seed", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "num_logprobs", "num_prompt_logprobs"),
)


class GuideKind(enum.Enum):
    """Notation of a language; the value is the field of ``Guide`` in the protos."""

    JSON_SCHEMA = "json_schema_json"
    REGEX = "regex"
    CHOICES = "choices"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class Guide:
    """A language that the output must belong to; choices are a JSON array of strings."""

    kind: GuideKind
    text: str


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
    guide: Guide | None = None
    num_sequences: int = 1
    num_prompt_logprobs: int | None = None


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
        guide=_guide_from_proto(message.guide) if message.HasField("guide") else None,
        num_sequences=message.num_sequences or 1,
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
        guide=None if wishes.guide is None else _guide_to_proto(wishes.guide),
        num_sequences=wishes.num_sequences,
    )


def check_wishes(wishes: SamplingWishes, limits: Limits) -> None:
    """Refuse values that no model takes; texts follow vLLM's.

    Raises:
        InvalidRequestError: Names the field.
    """
    _check_counts(wishes, limits)
    if wishes.guide is not None:
        _check_guide(wishes.guide, limits)
        if wishes.allowed_token_ids:  # some place of the guide might take none of them
            raise _refusal("allowed_token_ids", "cannot be used with a guide of the output")
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


def check_prompt_logprobs(wishes: SamplingWishes, num_prompt_tokens: int, limits: Limits) -> None:
    """Refuse log probabilities of a prompt that are too many together.

    Raises:
        TooLargeError: Names the field.
    """
    if wishes.num_prompt_logprobs is not None:
        count = num_prompt_tokens * (wishes.num_prompt_logprobs + 1)
        check_size(count, limits.max_prompt_logprobs, "prompt log probabilities", "prompt_logprobs")


def _guide_from_proto(message: generator_pb2.Guide) -> Guide:
    """Return the guide of a message.

    Raises:
        InvalidRequestError: It has none, or one that is not UTF-8.
    """
    name = message.WhichOneof("guide")
    if name is None:
        raise InvalidRequestError("A guide must say what the output is like.", param=GUIDE_PARAM)
    if name == "choices":
        return Guide(GuideKind.CHOICES, json.dumps(list(message.choices.texts)))
    value: str | bytes = getattr(message, name)
    try:
        text = value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        raise InvalidRequestError("A JSON schema must be UTF-8.", param=GUIDE_PARAM) from None
    return Guide(GuideKind(name), text)


def _guide_to_proto(guide: Guide) -> generator_pb2.Guide:
    match guide.kind:
        case GuideKind.JSON_SCHEMA:
            return generator_pb2.Guide(json_schema_json=guide.text.encode())
        case GuideKind.REGEX:
            return generator_pb2.Guide(regex=guide.text)
        case GuideKind.CHOICES:
            choices = generator_pb2.Choices(texts=json.loads(guide.text))
            return generator_pb2.Guide(choices=choices)
        case GuideKind.GRAMMAR:
            return generator_pb2.Guide(grammar=guide.text)


def _check_guide(guide: Guide, limits: Limits) -> None:
    check_size(len(guide.text), limits.max_json_bytes, "characters of a guide", GUIDE_PARAM)
    if guide.kind is GuideKind.CHOICES:
        texts = json.loads(guide.text)
        check_size(len(texts), limits.max_guide_choices, "choices", GUIDE_PARAM)
        if not all(texts) or not texts:
            raise InvalidRequestError("Choices must be texts.", param=GUIDE_PARAM)
    elif not guide.text:
        raise InvalidRequestError("A guide must not be empty.", param=GUIDE_PARAM)


def _check_counts(wishes: SamplingWishes, limits: Limits) -> None:
    if wishes.max_tokens is not None and wishes.max_tokens < 1:
        raise _refusal("max_tokens", f"must be at least 1, got {wishes.max_tokens}")
    if not 1 <= wishes.num_sequences <= limits.max_choices:
        raise InvalidRequestError(
            f"n must be between 1 and {limits.max_choices}, got {wishes.num_sequences}.", param="n"
        )
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
    if (wishes.num_prompt_logprobs or 0) > limits.max_logprobs:
        raise InvalidRequestError(
            f"Requested prompt logprobs of {wishes.num_prompt_logprobs}, which is greater than max"
            f" allowed: {limits.max_logprobs}",
            param="prompt_logprobs",
        )
    sizes = (
        (wishes.stop_token_ids, limits.max_stop_token_ids, "stop token ids", "stop_token_ids"),
        (wishes.logit_bias, limits.max_logit_bias, "logit biases", "logit_bias"),
        (wishes.bad_words, limits.max_bad_word_sequences, "token sequences", "bad_words"),
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
