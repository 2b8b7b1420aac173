"""Bounds of the waiting queue and of live embeddings."""

from __future__ import annotations

import pytest

from chiasm.common.errors import OverloadedError
from chiasm.generator.engine.queue_budget import QueueBudget, QueueLimits


def _budget(sequences: int = 10, tokens: int = 100, embedding_bytes: int = 1000) -> QueueBudget:
    return QueueBudget(QueueLimits(sequences, tokens, embedding_bytes))


def test_queue_full_by_number_refuses_with_a_time_to_retry() -> None:
    budget = _budget(sequences=2)
    budget.admit(1, 0)
    budget.admit(1, 0)

    with pytest.raises(OverloadedError, match="currently busy") as refused:
        budget.admit(1, 0)

    assert refused.value.reason == "OVERLOADED"
    assert refused.value.retry_after_s
    assert budget.num_waiting == 2


def test_queue_full_by_tokens_refuses() -> None:
    budget = _budget(tokens=10)
    budget.admit(6, 0)

    with pytest.raises(OverloadedError, match="prefill token backlog"):
        budget.admit(5, 0)
    budget.admit(4, 0)


def test_empty_queue_takes_any_prompt() -> None:
    assert _budget(tokens=10).admit(50, 0) is not None


def test_sequence_that_left_the_queue_makes_room() -> None:
    budget = _budget(sequences=1)
    charge = budget.admit(1, 0)

    charge.leave_queue()
    charge.leave_queue()

    budget.admit(1, 0)
    assert budget.num_waiting == 1


def test_embeddings_of_live_sequences_are_bounded_until_release() -> None:
    budget = _budget(embedding_bytes=100)
    charge = budget.admit(1, 80)
    charge.leave_queue()

    with pytest.raises(OverloadedError):
        budget.admit(1, 30)
    charge.release()
    charge.release()

    assert (budget.num_waiting, budget.embedding_bytes) == (0, 0)
    budget.admit(1, 130)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_embeddings_of_a_group_count_once_until_the_last_of_it_ends(
    order: tuple[int, ...],
) -> None:
    budget = _budget(embedding_bytes=100)

    charges = budget.admit_group(5, 80, 3)

    assert (budget.num_waiting, budget.embedding_bytes) == (3, 80)
    for index in order[:2]:
        charges[index].release()
        charges[index].release()
        assert budget.embedding_bytes == 80
    charges[order[2]].release()
    assert (budget.num_waiting, budget.embedding_bytes) == (0, 0)


def test_group_that_does_not_fit_counts_for_nothing() -> None:
    budget = _budget(sequences=3)
    budget.admit(1, 10)

    with pytest.raises(OverloadedError):
        budget.admit_group(5, 20, 3)

    assert (budget.num_waiting, budget.embedding_bytes) == (1, 10)
    budget.admit_group(5, 20, 2)


def test_group_alone_may_have_embeddings_of_any_size() -> None:
    budget = _budget(embedding_bytes=100)

    budget.admit_group(5, 200, 2)

    budget.admit(5, 0)
    with pytest.raises(OverloadedError):
        budget.admit(5, 1)
