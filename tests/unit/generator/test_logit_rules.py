"""Rules of sampling against those of transformers, and by their own promises."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from chiasm.generator.engine.logit_rules import apply_rules
from chiasm.generator.engine.sampling_params import SamplingParams
from chiasm.generator.engine.sampling_state import SamplingState

VOCAB_SIZE = 20
PROMPT = [3, 4, 5, 4]
OUTPUT = [7, 8, 7]
INFINITY = float("inf")


def _logits(num_rows: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_rows, VOCAB_SIZE, generator=generator)


def _state(params: SamplingParams, output: list[int] = OUTPUT) -> SamplingState:
    state = SamplingState(params, PROMPT)
    for token in output:
        state.advance(token)
    return state


def _apply(params: SamplingParams, output: list[int] = OUTPUT) -> torch.Tensor:
    return apply_rules(_logits(), [_state(params, output)])[0]


@pytest.mark.parametrize("output", [[], OUTPUT, [4, 7, 4]], ids=["none", "new", "of the prompt"])
def test_repetition_penalty_equals_that_of_transformers(output: list[int]) -> None:
    ids = torch.tensor([PROMPT + output])
    expected = RepetitionPenaltyLogitsProcessor(1.5)(ids, _logits())[0]

    assert torch.equal(_apply(SamplingParams(9, repetition_penalty=1.5), output), expected)


@pytest.mark.parametrize("output", [[], [1], [7, 8, 7], [1, 9]])
def test_bad_words_equal_those_of_transformers(output: list[int]) -> None:
    words = [[2], [7, 9], [8, 7, 1]]
    ids = torch.tensor([output or [0]])
    processor = NoBadWordsLogitsProcessor(words, eos_token_id=0)
    expected = processor(ids, _logits())[0]

    bad_words = tuple(map(tuple, words))

    assert torch.equal(_apply(SamplingParams(9, bad_words=bad_words), output), expected)


@pytest.mark.parametrize("num_tokens", [0, 2, 3, 4])
def test_minimum_length_equals_that_of_transformers(num_tokens: int) -> None:
    ids = torch.tensor([PROMPT + [1] * num_tokens])
    processor = MinNewTokensLengthLogitsProcessor(len(PROMPT), 3, [0, 6])
    expected = processor(ids, _logits())[0]

    params = SamplingParams(9, min_tokens=3, stop_token_ids=frozenset({0, 6}))

    assert torch.equal(_apply(params, [1] * num_tokens), expected)


def test_presence_counts_once_and_frequency_each_time() -> None:
    params = SamplingParams(9, presence_penalty=0.5, frequency_penalty=0.25)
    expected = _logits()[0]
    expected[7] -= 0.5 + 2 * 0.25
    expected[8] -= 0.5 + 0.25

    assert torch.allclose(_apply(params), expected)


def test_negative_penalties_favour_what_was_there() -> None:
    changed = _apply(SamplingParams(9, presence_penalty=-1.0))

    assert float(changed[7]) == pytest.approx(float(_logits()[0, 7]) + 1.0)


def test_bias_is_added() -> None:
    expected = _logits()[0]
    expected[2] += 3.0
    expected[11] -= 100.0

    assert torch.equal(_apply(SamplingParams(9, logit_bias={2: 3.0, 11: -100.0})), expected)


def test_only_allowed_tokens_are_left() -> None:
    changed = _apply(SamplingParams(9, allowed_token_ids=(4, 9)))

    assert torch.isfinite(changed).nonzero().flatten().tolist() == [4, 9]


def test_row_without_any_token_left_keeps_all() -> None:
    params = SamplingParams(9, allowed_token_ids=(0,), min_tokens=5, stop_token_ids=frozenset({0}))

    assert torch.equal(_apply(params), _logits()[0])


def test_each_row_has_its_own_rules() -> None:
    params = [
        SamplingParams(9, repetition_penalty=2.0),
        SamplingParams(9, bad_words=((2,),)),
        SamplingParams(9, frequency_penalty=1.0, logit_bias={1: 1.0}),
    ]
    together = apply_rules(_logits(3), [_state(one) for one in params])

    for index, one in enumerate(params):
        alone = apply_rules(_logits(3)[index : index + 1], [_state(one)])
        assert torch.equal(together[index], alone[0])


def test_params_without_rules_have_none() -> None:
    assert not SamplingParams(9, top_k=5, top_p=0.5, min_p=0.1, num_logprobs=3).has_rules
    assert SamplingParams(9, presence_penalty=-0.1).has_rules
    assert SamplingParams(9, min_tokens=1).has_rules
