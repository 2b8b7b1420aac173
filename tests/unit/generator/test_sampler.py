"""Choice of tokens against simple references."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch

from chiasm.generator.engine.sampler import SampledRow, Sampler, uniform_of
from chiasm.generator.engine.sampling_params import GREEDY_TEMPERATURE, SamplingParams
from chiasm.generator.engine.sampling_state import SamplingState

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NUM_DRAWS = 4000


def _sample(
    logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> list[int | None]:
    rows = [
        SampledRow(one, position, SamplingState(one, []) if one.has_rules else None)
        for one, position in zip(params, positions, strict=True)
    ]
    return [token.token_id if token else None for token in Sampler().sample(logits, rows)]


def _draw_many(logits: list[float], **params: float) -> Counter[int | None]:
    """Draw at many positions with one seed and count the tokens."""
    rows = torch.tensor([logits]).expand(NUM_DRAWS, -1)
    sampling = SamplingParams(1, seed=7, **params)  # type: ignore[arg-type]  # floats and ints
    return Counter(_sample(rows, [sampling] * NUM_DRAWS, range(NUM_DRAWS)))


def _frequencies(counts: Counter[int | None]) -> dict[int | None, float]:
    return {token: count / NUM_DRAWS for token, count in counts.items()}


def test_zero_temperature_takes_the_best_token() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])

    tokens = _sample(logits, [SamplingParams(1, temperature=0.0)] * 2, [0, 0])

    assert tokens == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_of_equal_best_tokens_is_taken(dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 1000, dtype=dtype)
    logits[:, [700, 701, 999]] = 2.0

    assert _sample(logits, [SamplingParams(1, temperature=0.0)] * 3, [0] * 3) == [700] * 3


def test_draws_follow_the_distribution() -> None:
    probabilities = [0.5, 0.3, 0.15, 0.05]

    seen = _frequencies(_draw_many([math.log(value) for value in probabilities]))

    for token, probability in enumerate(probabilities):
        assert seen[token] == pytest.approx(probability, abs=0.025)


def test_temperature_flattens_the_distribution() -> None:
    seen = _frequencies(_draw_many([math.log(0.9), math.log(0.1)], temperature=2.0))

    assert seen[0] == pytest.approx(0.75, abs=0.025)


def test_top_k_keeps_the_largest_and_their_ties() -> None:
    assert set(_draw_many([1.0, 4.0, 3.0, 0.0], top_k=2)) == {1, 2}
    assert set(_draw_many([1.0, 1.0, 1.0, 0.0], top_k=2)) == {0, 1, 2}


def test_top_k_over_the_vocabulary_keeps_all() -> None:
    assert set(_draw_many([1.0, 1.0, 1.0], top_k=100)) == {0, 1, 2}


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    logits = [math.log(value) for value in (0.1, 0.5, 0.3, 0.1)]

    assert set(_draw_many(logits, top_p=0.4)) == {1}
    assert set(_draw_many(logits, top_p=0.6)) == {1, 2}


def test_top_p_looks_beyond_the_first_few_when_it_must() -> None:
    num_tokens = 1000

    seen = _draw_many([0.0] * num_tokens, top_p=0.999)

    assert len(seen) > 900


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.99])
def test_top_p_equals_a_full_sort(top_p: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 2000, generator=generator) * 2
    probabilities, order = logits.softmax(-1).sort(descending=True)
    num_kept = int((probabilities.cumsum(-1) < top_p).sum()) + 1

    seen = _draw_many(logits[0].tolist(), top_p=top_p)

    assert set(seen) <= set(order[0, :num_kept].tolist())


def test_top_k_is_applied_before_top_p() -> None:
    logits = [math.log(value) for value in (0.4, 0.3, 0.3)]

    assert set(_draw_many(logits, top_k=1, top_p=0.9)) == {0}


def test_draw_does_not_depend_on_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 500, generator=generator)
    params = [
        SamplingParams(1, seed=11),
        SamplingParams(1, seed=12, top_k=5),
        SamplingParams(1, seed=13, top_p=0.9),
        SamplingParams(1, temperature=0.0),
        SamplingParams(1, seed=14, temperature=1.7, top_k=300, top_p=0.99),
        SamplingParams(1, seed=11),
        SamplingParams(1, seed=15, min_p=0.3),
        SamplingParams(1, seed=16, logit_bias={7: 2.0}, allowed_token_ids=tuple(range(90))),
    ]
    positions = [3, 9, 27, 1, 5, 8, 4, 2]

    together = _sample(logits, params, positions)
    alone = [
        _sample(logits[row : row + 1], [params[row]], [positions[row]])[0]
        for row in range(len(params))
    ]

    assert together == alone


def test_seed_and_position_fix_the_draw() -> None:
    assert uniform_of(5, 10) == uniform_of(5, 10)
    values = {uniform_of(seed, position) for seed in range(20) for position in range(20)}
    assert len(values) == 400
    assert all(0.0 <= value < 1.0 for value in values)


def test_uniform_numbers_are_spread_evenly() -> None:
    values = [uniform_of(2**64 - 1, position) for position in range(10_000)]
    counts = Counter(int(value * 10) for value in values)

    assert all(abs(count - 1000) < 150 for count in counts.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("wishes", [{}, {"top_p": 0.9}, {"top_k": 5}, {"num_logprobs": 2}], ids=str)
def test_a_row_that_is_not_finite_gets_a_token_of_the_vocabulary_and_is_not_told_it(
    bad: float, wishes: dict[str, Any]
) -> None:
    logits = torch.zeros(2, 8)
    logits[0] = bad
    row = SampledRow(SamplingParams(9, temperature=1.0, seed=3, **wishes), 4)

    tokens, is_finite = Sampler().choose(logits, [row, row]).tolist()
    told = Sampler().sample(logits, [row, row])

    assert all(0 <= token < 8 for token in tokens)
    assert is_finite == [0, 1]
    assert told[0] is None
    assert told[1] is not None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_row_that_is_not_finite_is_told_apart(bad: float, temperature: float) -> None:
    logits = torch.tensor([[0.0, bad, 1.0], [0.0, 9e9, 1.0]])

    tokens = _sample(logits, [SamplingParams(1, temperature=temperature)] * 2, [0, 0])

    assert tokens == [None, 1]


@pytest.mark.parametrize("penalty", [1.4e-45, 1e-38, 1e-3, 1e3, 3.4e38])
@pytest.mark.parametrize("temperature", [0.0, GREEDY_TEMPERATURE, 1.0, 2.0])
@pytest.mark.parametrize("further", [{}, {"top_p": 0.9}, {"min_p": 0.5}, {"top_k": 2}])
@pytest.mark.parametrize("logits", [[3.0, 2.0, -1.0, -2.0], [-9.0, -9.0, -9.0, -9.0], [0.0] * 4])
def test_no_wish_leads_to_a_token_outside_of_the_vocabulary(
    logits: list[float], further: Mapping[str, Any], temperature: float, penalty: float
) -> None:
    params = SamplingParams(
        1, seed=3, temperature=temperature, repetition_penalty=penalty, **further
    )
    # All tokens were there before, so that none is left as it was.
    row = SampledRow(params, 0, SamplingState(params, [0, 1, 2, 3]))

    (token,) = Sampler().sample(torch.tensor([logits]), [row])

    assert token is not None
    assert 0 <= token.token_id < len(logits)


@pytest.mark.parametrize("penalty", [1.4e-45, 3.4e38])
@pytest.mark.parametrize("bias", [-100.0, 100.0])
def test_a_penalty_neither_shows_a_hidden_token_nor_hides_the_last_one(
    penalty: float, bias: float
) -> None:
    params = SamplingParams(
        1, seed=3, repetition_penalty=penalty, allowed_token_ids=(2,), logit_bias={2: bias}
    )
    row = SampledRow(params, 0, SamplingState(params, [0, 1, 2, 3]))

    (token,) = Sampler().sample(torch.tensor([[9.0, 9.0, -9.0, 9.0]]), [row])

    assert token is not None
    assert token.token_id == 2


def test_half_precision_logits_are_sampled() -> None:
    logits = torch.tensor([[0.0, 20.0, 0.0]], dtype=torch.bfloat16)

    assert _sample(logits, [SamplingParams(1, seed=1)], [0]) == [1]


def test_min_p_keeps_what_is_near_the_best() -> None:
    logits = [math.log(value) for value in (0.5, 0.3, 0.15, 0.05)]

    assert set(_draw_many(logits, min_p=0.25)) == {0, 1, 2}
    assert set(_draw_many(logits, min_p=1.0)) == {0}


def test_min_p_comes_before_top_p() -> None:
    logits = [math.log(value) for value in (0.4, 0.3, 0.2, 0.1)]

    # Of the two that min_p leaves, the first alone has 0.57 of the mass.
    assert set(_draw_many(logits, min_p=0.7, top_p=0.55)) == {0}


def test_logprobs_are_those_of_the_model_whatever_the_rules() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    params = SamplingParams(1, temperature=0.0, logit_bias={3: 100.0}, num_logprobs=2)
    row = SampledRow(params, 0, SamplingState(params, []))

    (token,) = Sampler().sample(logits, [row])

    assert token is not None
    assert token.token_id == 3
    assert token.logprobs is not None
    expected = logits[0].log_softmax(-1)
    assert token.logprobs.logprob == pytest.approx(float(expected[3]))
    assert token.logprobs.rank == 4
    assert token.logprobs.top_token_ids == (1, 2)
    assert token.logprobs.top_logprobs == pytest.approx([float(expected[1]), float(expected[2])])


def test_logprobs_are_told_to_those_who_ask() -> None:
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    wishes = (None, 0, 5)
    rows = [SampledRow(SamplingParams(1, temperature=0.0, num_logprobs=n), 0) for n in wishes]

    tokens = Sampler().sample(logits, rows)

    told = [token.logprobs if token else None for token in tokens]
    assert [one and len(one.top_token_ids) for one in told] == [None, 0, 5]
    assert all(one.rank == 1 for one in told if one)
