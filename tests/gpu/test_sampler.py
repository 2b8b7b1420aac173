"""What is chosen on a GPU is what is chosen on a CPU, whatever the company."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from chiasm.generator.engine.sampler import SampledRow, SampledToken, Sampler
from chiasm.generator.engine.sampling_params import SamplingParams
from chiasm.generator.engine.sampling_state import SamplingState

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.gpu

VOCAB_SIZE = 5003
PROMPT = (3, 4, 5, 4)
WISHES = (
    SamplingParams(9, temperature=0.0, num_logprobs=3),
    SamplingParams(9, seed=1),
    SamplingParams(9, seed=2, temperature=0.4, num_logprobs=0),
    SamplingParams(9, seed=3, top_k=5),
    SamplingParams(9, seed=4, top_p=0.7),
    SamplingParams(9, seed=5, top_p=0.999, temperature=3.0),
    SamplingParams(9, seed=6, min_p=0.2),
    SamplingParams(9, seed=7, top_k=40, top_p=0.9, min_p=0.01, num_logprobs=5),
    SamplingParams(9, seed=8, repetition_penalty=1.5, temperature=2.0),
    SamplingParams(9, seed=9, presence_penalty=1.0, frequency_penalty=0.5),
    SamplingParams(9, seed=10, logit_bias={7: 30.0, 8: -5.0}),
    SamplingParams(9, seed=11, allowed_token_ids=(11, 12, 13)),
    SamplingParams(9, temperature=0.0, bad_words=((2,), (7, 9)), min_tokens=4),
)


def choose(logits: torch.Tensor, wishes: Sequence[SamplingParams]) -> list[SampledToken | None]:
    rows = []
    for position, params in enumerate(wishes):
        state = SamplingState(params, PROMPT) if params.has_rules else None
        if state is not None:
            state.advance(7)
        rows.append(SampledRow(params, position, state))
    return Sampler().sample(logits, rows)


@pytest.fixture
def logits() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(WISHES), VOCAB_SIZE, generator=generator) * 3


def test_tokens_and_log_probabilities_are_those_of_a_cpu(
    logits: torch.Tensor, device: torch.device
) -> None:
    for one, expected in zip(
        choose(logits.to(device), WISHES), choose(logits, WISHES), strict=True
    ):
        assert one is not None
        assert expected is not None
        assert one.token_id == expected.token_id
        if expected.logprobs is None:
            assert one.logprobs is None
            continue
        assert one.logprobs is not None
        assert one.logprobs.rank == expected.logprobs.rank
        assert one.logprobs.logprob == pytest.approx(expected.logprobs.logprob, abs=1e-5)
        assert one.logprobs.top_token_ids == expected.logprobs.top_token_ids
        assert one.logprobs.top_logprobs == pytest.approx(expected.logprobs.top_logprobs, abs=1e-5)


def test_a_draw_does_not_depend_on_the_rows_around_it(
    logits: torch.Tensor, device: torch.device
) -> None:
    rows = logits.to(device)
    params = SamplingParams(9, seed=5, temperature=2.0)

    together = choose(rows, [params] * len(rows))

    for position, one in enumerate(together):
        (alone,) = Sampler().sample(rows[position : position + 1], [SampledRow(params, position)])
        assert alone == one


def test_logits_that_are_not_finite_fail_their_row_alone(
    logits: torch.Tensor, device: torch.device
) -> None:
    logits[1, 5] = float("nan")

    chosen = choose(logits.to(device), WISHES)

    assert chosen[1] is None
    assert all(one is not None for index, one in enumerate(chosen) if index != 1)


def test_rows_in_bfloat16_take_their_best_token(logits: torch.Tensor, device: torch.device) -> None:
    greedy = [SamplingParams(9, temperature=0.0)] * len(logits)
    rounded = logits.to(torch.bfloat16)

    tokens = [one.token_id for one in choose(rounded.to(device), greedy) if one]

    assert rounded[range(len(tokens)), tokens].tolist() == rounded.amax(dim=1).tolist()
