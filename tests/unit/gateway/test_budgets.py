"""Byte and retry budgets."""

from __future__ import annotations

from chiasm.gateway.budgets import ByteBudget, RetryBudget


def test_a_byte_budget_gives_out_no_more_than_it_has() -> None:
    budget = ByteBudget(10)
    assert budget.reserve(10)
    assert not budget.reserve(1)
    budget.release(4)
    assert budget.reserve(4)
    assert budget.num_used == 10


def test_retries_stay_a_part_of_all_calls() -> None:
    budget = RetryBudget(max_retries=2.0, retries_per_call=0.5)
    assert [budget.take() for _ in range(3)] == [True, True, False]
    budget.record_call()
    assert not budget.take()
    budget.record_call()
    assert budget.take()
