"""How many prompt tokens fit into a step beside streams, by what steps cost so far."""

from __future__ import annotations

import pytest

from chiasm.generator.engine.step_cost import StepCost

# Of a step that takes 40 ms for its decodes and 1 ms for every prompt token.
DECODE_S, TOKEN_S = 0.04, 0.001
NO_BOUND = 1 << 62


def _experienced(max_step_s: float, decode_s: float = DECODE_S) -> StepCost:
    cost = StepCost(max_step_s)
    for _ in range(5):
        cost.observe(1, 0, decode_s)
        cost.observe(1, 100, decode_s + 100 * TOKEN_S)
    return cost


def test_prompts_fill_a_step_up_to_its_time() -> None:
    assert _experienced(0.1).max_prefill_tokens(1) == pytest.approx(60, abs=1)


def test_prompts_get_as_much_time_as_the_streams_where_these_are_slow() -> None:
    assert _experienced(0.1, decode_s=0.3).max_prefill_tokens(1) == pytest.approx(300, abs=1)


def test_a_chunk_never_gets_tiny() -> None:
    cost = StepCost(0.01)
    cost.observe(1, 0, 0.009)
    cost.observe(1, 100, 10.0)

    assert cost.max_prefill_tokens(1) == 16


@pytest.mark.parametrize(("max_step_s", "num_decodes"), [(0.0, 1), (0.1, 0)])
def test_without_a_wish_or_without_streams_there_is_no_bound(
    max_step_s: float, num_decodes: int
) -> None:
    assert _experienced(max_step_s).max_prefill_tokens(num_decodes) == NO_BOUND


def test_without_experience_there_is_no_bound() -> None:
    cost = StepCost(0.1)
    assert cost.max_prefill_tokens(1) == NO_BOUND
    cost.observe(1, 0, DECODE_S)
    assert cost.max_prefill_tokens(1) == NO_BOUND


def test_prompts_that_cost_nothing_have_no_bound() -> None:
    cost = StepCost(0.1)
    cost.observe(1, 0, DECODE_S)
    cost.observe(1, 100, DECODE_S)

    assert cost.max_prefill_tokens(1) == NO_BOUND


def test_one_slow_step_is_no_reason() -> None:
    cost = _experienced(0.1)
    cost.observe(1, 100, 5.0)
    cost.observe(1, 0, 5.0)

    assert cost.max_prefill_tokens(1) == pytest.approx(60, abs=1)


def test_a_lasting_change_is_followed() -> None:
    cost = _experienced(0.1)
    for _ in range(8):
        cost.observe(1, 100, DECODE_S + 200 * TOKEN_S)

    assert cost.max_prefill_tokens(1) == pytest.approx(30, abs=1)


def test_more_streams_leave_less_room() -> None:
    cost = _experienced(0.1)
    for _ in range(5):
        cost.observe(32, 0, 0.045)

    assert cost.max_prefill_tokens(32) == pytest.approx(55, abs=1)
    assert cost.max_prefill_tokens(1) == pytest.approx(60, abs=1)
    # The nearest measured size speaks for those that were never seen.
    assert cost.max_prefill_tokens(100) == cost.max_prefill_tokens(32)
    assert cost.max_prefill_tokens(3) == cost.max_prefill_tokens(1)


def test_a_few_tokens_teach_nothing_of_prompts() -> None:
    cost = _experienced(0.1)
    for _ in range(20):
        cost.observe(0, 3, DECODE_S)

    assert cost.max_prefill_tokens(1) == pytest.approx(60, abs=1)
