"""Wishes of sampling survive the message, and each bound holds from both sides."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from chiasm.common.errors import InvalidRequestError, TooLargeError
from chiasm.common.limits import Limits
from chiasm.common.sampling import (
    Guide,
    GuideKind,
    SamplingWishes,
    check_vocabulary,
    check_wishes,
    wishes_from_proto,
    wishes_to_proto,
)
from chiasm.v1 import generator_pb2

LIMITS = Limits()
EVERYTHING = SamplingWishes(
    max_tokens=7,
    temperature=0.5,
    top_p=0.25,
    top_k=3,
    seed=1 << 63,
    stop_token_ids=(4, 5),
    ignore_eos=True,
    min_p=0.125,
    repetition_penalty=1.5,
    presence_penalty=-2.0,
    frequency_penalty=2.0,
    logit_bias=((3, -100.0), (9, 0.5)),
    bad_words=((1,), (2, 3)),
    allowed_token_ids=(8, 9),
    min_tokens=2,
    num_logprobs=20,
    num_prompt_logprobs=3,
    num_sequences=16,
    guide=Guide(GuideKind.CHOICES, '["red", "blau\\u00e9"]'),
)


@pytest.mark.parametrize(
    "wishes",
    [
        EVERYTHING,
        SamplingWishes(),
        SamplingWishes(
            temperature=0.0, top_k=0, seed=0, min_p=0.0, num_logprobs=0, num_prompt_logprobs=0
        ),
    ],
    ids=["all", "none", "zeros"],
)
def test_wishes_survive_the_message(wishes: SamplingWishes) -> None:
    message = wishes_to_proto(wishes)

    assert wishes_from_proto(type(message).FromString(message.SerializeToString())) == wishes


def test_every_wish_is_in_the_message() -> None:
    given = {field.name for field, _ in wishes_to_proto(EVERYTHING).ListFields()}

    assert given == {field.name for field in dataclasses.fields(SamplingWishes)}


def test_extreme_values_are_taken() -> None:
    check_wishes(dataclasses.replace(EVERYTHING, guide=None), LIMITS)
    check_vocabulary(EVERYTHING, 10)


def test_a_choice_of_tokens_and_a_guide_are_refused_together_but_not_apart() -> None:
    check_wishes(dataclasses.replace(EVERYTHING, allowed_token_ids=()), LIMITS)

    with pytest.raises(InvalidRequestError, match="cannot be used with a guide") as caught:
        check_wishes(EVERYTHING, LIMITS)
    assert caught.value.param == "allowed_token_ids"


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0."),
        ({"temperature": -1.0}, "temperature must be non-negative, got -1."),
        ({"temperature": math.nan}, "temperature must be non-negative, got nan."),
        ({"temperature": math.inf}, "temperature must be at most 100, got inf."),
        ({"temperature": 101.0}, "temperature must be at most 100, got 101."),
        ({"top_p": 0.0}, "top_p must be in (0, 1], got 0."),
        ({"top_p": 1.5}, "top_p must be in (0, 1], got 1.5."),
        ({"top_p": math.nan}, "top_p must be in (0, 1], got nan."),
        ({"min_p": -0.1}, "min_p must be in [0, 1], got -0.1."),
        ({"min_p": 1.1}, "min_p must be in [0, 1], got 1.1."),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be greater than zero, got 0."),
        (
            {"repetition_penalty": math.inf},
            "repetition_penalty must be finite, got inf.",
        ),
        ({"presence_penalty": 2.5}, "presence_penalty must be in [-2, 2], got 2.5."),
        ({"frequency_penalty": -2.5}, "frequency_penalty must be in [-2, 2], got -2.5."),
        ({"logit_bias": ((1, 101.0),)}, "logit_bias must be in [-100, 100], got 101."),
        ({"logit_bias": ((1, math.nan),)}, "logit_bias must be in [-100, 100], got nan."),
        ({"bad_words": ((1, 2), ())}, "bad_words must have 1 to 64 tokens each, got 0."),
        ({"bad_words": ((),)}, "bad_words must have 1 to 64 tokens each, got 0."),
        ({"bad_words": ((1,) * 65,)}, "bad_words must have 1 to 64 tokens each, got 65."),
        (
            {"min_tokens": 5, "max_tokens": 4},
            "min_tokens must be less than or equal to max_tokens=4, got 5.",
        ),
    ],
)
def test_bad_values_are_refused_by_name(wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_wishes(SamplingWishes(**wishes), LIMITS)

    assert caught.value.message == message
    assert caught.value.param in wishes


@pytest.mark.parametrize("number", [0, -1, 17])
def test_number_of_answers_is_bounded(number: int) -> None:
    check_wishes(SamplingWishes(num_sequences=LIMITS.max_choices), LIMITS)

    with pytest.raises(InvalidRequestError, match="n must be between 1 and 16") as caught:
        check_wishes(SamplingWishes(num_sequences=number), LIMITS)
    assert caught.value.param == "n"


def test_too_many_alternatives_are_refused_in_the_words_of_vllm() -> None:
    with pytest.raises(InvalidRequestError, match="Requested sample logprobs of 21, which is"):
        check_wishes(SamplingWishes(num_logprobs=21), LIMITS)


@pytest.mark.parametrize(
    ("field", "entry", "most"),
    [
        ("stop_token_ids", 1, LIMITS.max_stop_token_ids),
        ("logit_bias", (1, 1.0), LIMITS.max_logit_bias),
        ("bad_words", (1,), LIMITS.max_bad_word_sequences),
        ("allowed_token_ids", 1, LIMITS.max_allowed_token_ids),
    ],
)
def test_lists_have_a_bound(field: str, entry: object, most: int) -> None:
    check_wishes(SamplingWishes(**{field: (entry,) * most}), LIMITS)  # type: ignore[arg-type]  # by name

    with pytest.raises(TooLargeError) as caught:
        check_wishes(SamplingWishes(**{field: (entry,) * (most + 1)}), LIMITS)  # type: ignore[arg-type]  # by name
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop_token_ids", (1, 256)),
        ("logit_bias", ((256, 1.0),)),
        ("bad_words", ((1, 256),)),
        ("allowed_token_ids", (256,)),
    ],
)
def test_tokens_beyond_the_vocabulary_are_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_vocabulary(SamplingWishes(**{field: value}), 256)

    assert caught.value.message == f"{field} must be below the vocabulary size 256, got 256."
    assert caught.value.param == field


@pytest.mark.parametrize("kind", [GuideKind.JSON_SCHEMA, GuideKind.REGEX, GuideKind.GRAMMAR])
def test_guides_survive_the_message_and_have_a_bound(kind: GuideKind) -> None:
    longest = SamplingWishes(guide=Guide(kind, "x" * LIMITS.max_json_bytes))
    assert wishes_from_proto(wishes_to_proto(longest)) == longest
    check_wishes(longest, LIMITS)

    with pytest.raises(TooLargeError):
        check_wishes(SamplingWishes(guide=Guide(kind, "x" * (LIMITS.max_json_bytes + 1))), LIMITS)
    with pytest.raises(InvalidRequestError, match="must not be empty"):
        check_wishes(SamplingWishes(guide=Guide(kind, "")), LIMITS)


@pytest.mark.parametrize(
    ("texts", "error"),
    [([], InvalidRequestError), (["a", ""], InvalidRequestError), (["a"] * 1025, TooLargeError)],
)
def test_choices_have_bounds(texts: list[str], error: type[Exception]) -> None:
    check_wishes(SamplingWishes(guide=Guide(GuideKind.CHOICES, json.dumps(["a"] * 1024))), LIMITS)

    with pytest.raises(error):
        check_wishes(SamplingWishes(guide=Guide(GuideKind.CHOICES, json.dumps(texts))), LIMITS)


def test_guide_that_says_nothing_is_refused() -> None:
    message = generator_pb2.SamplingParams(guide=generator_pb2.Guide())

    with pytest.raises(InvalidRequestError, match="must say what the output is like"):
        wishes_from_proto(message)
