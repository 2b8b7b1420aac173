"""Who is next: the most urgent, then the tenant that was served least, then the oldest."""

from __future__ import annotations

from chiasm.generator.engine.sampling_params import SamplingParams
from chiasm.generator.engine.scheduled_step import ScheduledSequence
from chiasm.generator.engine.sequence import Origin, Sequence
from chiasm.generator.engine.waiting_queue import DECODE_COST, WaitingQueue
from tests.fakes.generator_engine import make_prompt


def _sequence(seq_id: int, tenant: str = "a", priority: int = 0) -> Sequence:
    origin = Origin(tenant=tenant, priority=priority)
    return Sequence(seq_id, make_prompt([1, 2, 3]), SamplingParams(4), origin)


def _queue(*sequences: Sequence) -> WaitingQueue:
    queue = WaitingQueue()
    for sequence in sequences:
        queue.enter(sequence.origin.tenant)
        queue.push(sequence)
    return queue


def _drain(queue: WaitingQueue, cost: int = 0) -> list[int]:
    order = []
    while (sequence := queue.peek()) is not None:
        queue.remove(sequence)
        queue.charge(ScheduledSequence(sequence, 0, cost))
        order.append(sequence.seq_id)
    return order


def test_one_tenant_is_served_in_order_of_arrival() -> None:
    assert _drain(_queue(_sequence(2), _sequence(1), _sequence(3)), cost=5) == [1, 2, 3]


def test_lower_priority_number_comes_first_whoever_it_is() -> None:
    queue = _queue(_sequence(1), _sequence(2, "b", -1), _sequence(3, priority=-2))

    assert _drain(queue) == [3, 2, 1]


def test_tenants_take_turns_by_what_was_computed_for_them() -> None:
    flood = [_sequence(seq_id, "flood") for seq_id in range(1, 5)]
    queue = _queue(*flood, _sequence(5, "b"), _sequence(6, "b"))

    assert _drain(queue, cost=10) == [1, 5, 2, 6, 3, 4]


def test_decoded_tokens_count_more_than_prefilled_ones() -> None:
    one, other = _sequence(1, "a"), _sequence(2, "b")
    queue = _queue(one, other)
    queue.charge(ScheduledSequence(one, one.num_prompt_tokens, 1))
    queue.charge(ScheduledSequence(other, 0, DECODE_COST - 1))

    assert _drain(queue) == [2, 1]


def test_returning_tenant_has_saved_nothing_up() -> None:
    first = _sequence(1, "a")
    queue = _queue(first, _sequence(2, "a"))
    queue.charge(ScheduledSequence(first, 0, 1000))
    late = [_sequence(3, "b"), _sequence(4, "b")]
    for sequence in late:
        queue.enter("b")
        queue.push(sequence)

    assert _drain(queue, cost=10) == [1, 3, 2, 4]


def test_tenant_without_live_sequences_leaves_no_record() -> None:
    sequence = _sequence(1)
    queue = _queue(sequence)
    queue.charge(ScheduledSequence(sequence, 0, 1000))
    queue.remove(sequence)
    queue.leave("a")
    queue.enter("b")
    queue.enter("a")
    queue.push(_sequence(2, "b"))
    queue.push(_sequence(3, "a"))

    assert _drain(queue) == [2, 3]
    assert len(queue) == 0
