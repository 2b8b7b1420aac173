"""Translate the JSON fields that say how tokens are chosen to ``chat.proto``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from chiasm.common.sampling import MAX_LOGIT_BIAS

if TYPE_CHECKING:
    from chiasm.v1 import chat_pb2

    from .fields import Fields

_UINT32 = 1 << 32
_UINT64 = 1 << 64
_TOKEN_ID = re.compile(r"[0-9]{1,10}")
_NUMBERS = (
    *("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
    "frequency_penalty",
)


def take_sampling(fields: Fields, message: chat_pb2.ChatCompletionRequest) -> None:
    """Translate the fields that say how tokens are chosen.

    Raises:
        InvalidRequestError: A field has the wrong type; what only its value makes wrong is checked
            with the message.
    """
    sampling = message.sampling
    max_tokens = _take_max_tokens(fields)
    if max_tokens is not None:
        sampling.max_tokens = max_tokens
    for name in _NUMBERS:
        value = fields.take_number(name)
        if value is not None:
            setattr(sampling, name, value)
    top_k = fields.take_int("top_k")
    if top_k is not None:
        if not -1 <= top_k < _UINT32:
            raise fields.error("top_k", f"top_k must be 0 (disable), or at least 1, got {top_k}.")
        sampling.top_k = max(top_k, 0)
    seed = fields.take_int("seed")
    if seed is not None:
        sampling.seed = seed % _UINT64  # negative seeds are seeds too
    sampling.ignore_eos = fields.take_bool("ignore_eos") or False
    sampling.stop_token_ids.extend(_take_token_ids(fields, "stop_token_ids"))
    message.stop.extend(_take_stop(fields))
    count = fields.take_int("n")
    if count is not None:
        if not 1 <= count < _UINT32:
            raise fields.error("n", f"n must be at least 1, got {count}.")
        sampling.num_sequences = count
    _take_rules(fields, message)
    _take_logprobs(fields, message)


def _take_rules(fields: Fields, message: chat_pb2.ChatCompletionRequest) -> None:
    sampling = message.sampling
    min_tokens = fields.take_int("min_tokens") or 0
    if not 0 <= min_tokens < _UINT32:
        raise fields.error(
            "min_tokens", f"min_tokens must be greater than or equal to 0, got {min_tokens}."
        )
    sampling.min_tokens = min_tokens
    if fields.take_list("allowed_token_ids") == []:
        raise fields.error("allowed_token_ids", "allowed_token_ids is not None and empty!")
    sampling.allowed_token_ids.extend(_take_token_ids(fields, "allowed_token_ids"))
    for value in fields.take_list("bad_words") or []:
        if not isinstance(value, str):
            raise fields.error("bad_words", "bad_words must hold strings only.")
        message.bad_words.append(value)
    for token, bias in (fields.take_object("logit_bias") or {}).items():
        if not _TOKEN_ID.fullmatch(token) or int(token) >= _UINT32:
            raise fields.error("logit_bias", "logit_bias must have token ids as its keys.")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise fields.error("logit_bias", "logit_bias must have numbers as its values.")
        clamped = min(MAX_LOGIT_BIAS, max(-MAX_LOGIT_BIAS, float(bias)))
        sampling.logit_bias.add(token_id=int(token), bias=clamped)


def _take_logprobs(fields: Fields, message: chat_pb2.ChatCompletionRequest) -> None:
    of_output, of_prompt = _take_output_logprobs(fields), _take_prompt_logprobs(fields)
    if of_output is not None:
        message.sampling.num_logprobs = of_output
    if of_prompt is not None:
        message.sampling.num_prompt_logprobs = of_prompt


def _take_output_logprobs(fields: Fields) -> int | None:
    """Return how many alternatives are to be told with each token; ``None``: tell nothing."""
    wants = fields.take_bool("logprobs") or False
    number = fields.take_int("top_logprobs")
    if number is not None and number < 0:
        raise fields.error("top_logprobs", "`top_logprobs` must be a positive value or 0.")
    if number and not wants:
        raise fields.error(
            "top_logprobs", "when using `top_logprobs`, `logprobs` must be set to true."
        )
    return min(number or 0, _UINT32 - 1) if wants else None


def _take_prompt_logprobs(fields: Fields) -> int | None:
    number = fields.take_int("prompt_logprobs")
    if number is not None and number < 0:
        raise fields.error("prompt_logprobs", "`prompt_logprobs` must be a positive value or 0.")
    return None if number is None else min(number, _UINT32 - 1)


def _take_max_tokens(fields: Fields) -> int | None:
    found = None
    for name in ("max_tokens", "max_completion_tokens"):
        value = fields.take_int(name)
        if value is None:
            continue
        if value < 1:
            raise fields.error(name, f"{name} must be at least 1, got {value}.")
        found = min(value, _UINT32 - 1)
    return found


def _take_token_ids(fields: Fields, name: str) -> list[int]:
    token_ids = []
    for value in fields.take_list(name) or []:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _UINT32:
            raise fields.error(name, f"{name} must hold token ids.")
        token_ids.append(value)
    return token_ids


def _take_stop(fields: Fields) -> list[str]:
    stop = fields.take("stop")
    if stop is None:
        return []
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list):
        raise fields.wrong_type("stop", "a string or an array of strings")
    texts = [value for value in stops if isinstance(value, str)]
    if len(texts) != len(stops):
        raise fields.error("stop", "stop must hold strings only.")
    return texts
