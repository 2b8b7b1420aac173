"""Which sequences a step takes, and who gives way when blocks run out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from chiasm.common.media import MediaSpan
from chiasm.generator.engine.sampling_params import SamplingParams
from chiasm.generator.engine.scheduler import SchedulerLimits
from chiasm.generator.engine.sequence import Origin, Sequence, SequenceStatus
from tests.fakes.embeddings import make_layout, make_ref
from tests.fakes.generator_engine import make_prompt, make_sequence
from tests.harness.scheduling import chunks_of, compute, make_scheduler

if TYPE_CHECKING:
    from chiasm.generator.engine.scheduled_step import ScheduledStep


def _with_span(seq_id: int, offset: int, num_tokens: int = 12) -> Sequence:
    """Return a sequence with a span of four tokens whose embedding is not there."""
    ref = make_ref(num_rows=2, seed=seq_id)
    span = MediaSpan(offset, ref, make_layout(ref), is_ready=False)
    return Sequence(seq_id, make_prompt(range(1, 1 + num_tokens), (span,)), SamplingParams(4))


def _ids(step: ScheduledStep) -> list[int]:
    return [item.sequence.seq_id for item in step.sequences]


def test_prompts_are_taken_whole_in_order_of_arrival() -> None:
    scheduler = make_scheduler()
    for seq_id in (1, 2, 3):
        scheduler.add(make_sequence(seq_id, range(1, 6)))

    step = scheduler.schedule()

    assert _ids(step) == [1, 2, 3]
    assert step.num_prefill_tokens == 15


def test_decode_comes_first_and_prefill_takes_the_rest_of_the_budget() -> None:
    scheduler = make_scheduler(max_step_tokens=8)
    scheduler.add(make_sequence(1, range(1, 5)))
    compute(scheduler, scheduler.schedule())
    for seq_id, first in ((2, 20), (3, 40)):
        scheduler.add(make_sequence(seq_id, range(first, first + 5)))

    step = scheduler.schedule()

    assert chunks_of(step) == [(1, 4, 1), (2, 0, 5), (3, 0, 2)]
    assert (step.num_decode_tokens, step.num_prefill_tokens) == (1, 7)


def test_long_prompt_is_computed_in_chunks_and_samples_behind_the_last() -> None:
    scheduler = make_scheduler(max_step_tokens=8)
    scheduler.add(make_sequence(1, range(1, 21)))

    steps = []
    for _ in range(3):
        steps.append(scheduler.schedule())
        compute(scheduler, steps[-1])

    assert [chunks_of(step) for step in steps] == [[(1, 0, 8)], [(1, 8, 8)], [(1, 16, 4)]]
    assert [step.sequences[0].samples for step in steps] == [False, False, True]


def test_chunks_of_a_prompt_do_not_hold_decodes_up() -> None:
    scheduler = make_scheduler(max_step_tokens=6)
    scheduler.add(make_sequence(1, [1, 2], 8))
    compute(scheduler, scheduler.schedule())
    scheduler.add(make_sequence(2, range(1, 21)))

    steps = []
    for _ in range(3):
        steps.append(scheduler.schedule())
        compute(scheduler, steps[-1])

    assert [step.num_decode_tokens for step in steps] == [1, 1, 1]
    assert [step.num_prefill_tokens for step in steps] == [5, 5, 5]


def test_next_step_is_scheduled_before_the_tokens_of_the_last_are_known() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1, range(1, 6), max_tokens=3))

    steps = [scheduler.schedule() for _ in range(4)]

    assert [chunks_of(step) for step in steps] == [[(1, 0, 5)], [(1, 5, 1)], [(1, 6, 1)], []]
    assert not scheduler.has_work


def test_no_more_sequences_run_than_allowed() -> None:
    scheduler = make_scheduler(max_running=2)
    for seq_id in (1, 2, 3):
        scheduler.add(make_sequence(seq_id, [1, 2]))

    scheduler.schedule()

    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)


def test_youngest_is_preempted_and_comes_back_before_newcomers() -> None:
    scheduler = make_scheduler(num_blocks=5)
    old, young = make_sequence(1, range(1, 9), 8), make_sequence(2, range(21, 29), 8)
    scheduler.add(old)
    scheduler.add(young)
    compute(scheduler, scheduler.schedule())

    step = scheduler.schedule()
    compute(scheduler, step)

    assert _ids(step) == [1]
    assert step.num_preemptions == 1
    assert young.status is SequenceStatus.PREEMPTED
    assert (young.tables[0].blocks, young.num_scheduled_tokens) == ([], 0)
    scheduler.check_invariants()
    scheduler.add(make_sequence(3, [1, 2]))
    scheduler.remove(old)
    assert _ids(scheduler.schedule()) == [2, 3]


def test_least_urgent_is_preempted_even_if_it_is_older() -> None:
    scheduler = make_scheduler(num_blocks=5)
    patient = Sequence(1, make_prompt(range(1, 9)), SamplingParams(8), Origin(priority=5))
    urgent = make_sequence(2, range(21, 29), 8)
    scheduler.add(patient)
    scheduler.add(urgent)
    compute(scheduler, scheduler.schedule())

    assert _ids(scheduler.schedule()) == [2]
    assert patient.status is SequenceStatus.PREEMPTED


def test_preempted_sequence_finds_what_is_left_of_its_blocks() -> None:
    scheduler = make_scheduler(num_blocks=5)
    old, young = make_sequence(1, range(1, 9), 8), make_sequence(2, range(21, 29), 8)
    scheduler.add(old)
    scheduler.add(young)
    compute(scheduler, scheduler.schedule())
    compute(scheduler, scheduler.schedule())
    scheduler.remove(old)

    step = scheduler.schedule()

    assert chunks_of(step) == [(2, 8, 1)]
    assert young.num_cached_tokens == 0


def test_token_that_arrives_after_the_preemption_is_awaited() -> None:
    scheduler = make_scheduler(num_blocks=5)
    old, young = make_sequence(1, range(1, 9), 8), make_sequence(2, range(21, 29), 8)
    scheduler.add(old)
    scheduler.add(young)
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert (second.num_preemptions, young.num_pending_tokens) == (1, 1)
    scheduler.remove(old)

    assert _ids(scheduler.schedule()) == []
    compute(scheduler, first)

    assert chunks_of(scheduler.schedule())[0][::2] == (2, 9)


def test_sequence_without_its_embeddings_blocks_nobody() -> None:
    scheduler = make_scheduler()
    blocked = _with_span(1, offset=0)
    scheduler.add(blocked)
    scheduler.add(make_sequence(2, [1, 2]))

    assert _ids(scheduler.schedule()) == [2]
    assert blocked.status is SequenceStatus.BLOCKED
    blocked.embeddings[0] = torch.zeros(2, 1)
    scheduler.release(blocked)
    assert _ids(scheduler.schedule()) == [2, 1]


def test_text_before_a_missing_embedding_is_computed_and_then_waits() -> None:
    scheduler = make_scheduler()
    sequence = _with_span(1, offset=5)
    scheduler.add(sequence)

    assert chunks_of(scheduler.schedule()) == [(1, 0, 5)]
    assert chunks_of(scheduler.schedule()) == []
    assert not scheduler.has_work
    sequence.embeddings[0] = torch.zeros(2, 1)
    scheduler.release(sequence)

    assert scheduler.has_work
    assert chunks_of(scheduler.schedule()) == [(1, 5, 7)]


def test_cached_picture_is_used_as_soon_as_its_embedding_is_there() -> None:
    scheduler = make_scheduler()
    first, second = _with_span(1, offset=2), _with_span(1, offset=2)
    second.seq_id = 2
    for sequence in (first, second):
        scheduler.add(sequence)
    first.embeddings[0] = torch.zeros(2, 1)
    compute(scheduler, scheduler.schedule())
    scheduler.remove(first)
    assert chunks_of(scheduler.schedule()) == []

    second.embeddings[0] = torch.zeros(2, 1)
    scheduler.release(second)

    assert chunks_of(scheduler.schedule()) == [(2, 8, 4)]
    assert second.num_cached_tokens == 6
    scheduler.check_invariants()


def test_prompt_catches_up_with_an_equal_one_that_is_ahead() -> None:
    scheduler = make_scheduler(max_step_tokens=8)
    for seq_id in (1, 2):
        scheduler.add(make_sequence(seq_id, range(1, 20)))

    first = scheduler.schedule()
    compute(scheduler, first)
    second = scheduler.schedule()
    compute(scheduler, second)
    third = scheduler.schedule()

    assert chunks_of(first) == [(1, 0, 8)]
    assert chunks_of(second) == [(1, 8, 8)]
    assert chunks_of(third) == [(1, 16, 3), (2, 16, 3)]


def test_sequence_that_waits_for_an_embedding_gives_way_to_one_that_can_run() -> None:
    scheduler = make_scheduler(num_blocks=5)
    stalled = _with_span(1, offset=8)
    scheduler.add(stalled)
    compute(scheduler, scheduler.schedule())
    scheduler.add(make_sequence(2, range(41, 57), 1))

    step = scheduler.schedule()
    scheduler.check_invariants()

    assert (_ids(step), step.num_preemptions) == ([2], 1)
    assert stalled.status is SequenceStatus.BLOCKED


def test_stalled_sequences_do_not_fill_the_places_of_those_that_can_run() -> None:
    scheduler = make_scheduler(max_running=2)
    for seq_id in (1, 2):
        scheduler.add(_with_span(seq_id, offset=2))
    scheduler.schedule()
    scheduler.add(make_sequence(3, range(50, 53)))

    assert _ids(scheduler.schedule()) == [3]


def test_forks_share_the_blocks_of_the_prompt() -> None:
    scheduler = make_scheduler()
    parent = make_sequence(1, range(1, 7), 4)
    parent.forks = (make_sequence(2, range(1, 7), 4), make_sequence(3, range(1, 7), 4))
    scheduler.add(parent)

    step = scheduler.schedule()
    scheduler.check_invariants()
    assert chunks_of(step) == [(1, 0, 6), (2, 6, 0), (3, 6, 0)]
    assert all(item.samples for item in step.sequences)
    assert scheduler.blocks.num_used_blocks == 2
    compute(scheduler, step)

    step = scheduler.schedule()
    scheduler.check_invariants()

    assert chunks_of(step) == [(1, 6, 1), (2, 6, 1), (3, 6, 1)]
    assert len(step.block_copies) == 2
    assert scheduler.blocks.num_used_blocks == 4


def test_forks_without_a_free_place_wait_like_any_other() -> None:
    scheduler = make_scheduler(max_running=2)
    parent = make_sequence(1, range(1, 7), 4)
    parent.forks = (make_sequence(2, range(1, 7), 4), make_sequence(3, range(1, 7), 4))
    scheduler.add(parent)

    assert _ids(scheduler.schedule()) == [1, 2]
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    scheduler.check_invariants()


def test_removal_frees_blocks_in_every_state() -> None:
    scheduler = make_scheduler(num_blocks=5)
    sequences = [make_sequence(1, range(1, 9)), make_sequence(2, range(21, 29))]
    blocked = _with_span(9, offset=0)
    for sequence in (*sequences, blocked):
        scheduler.add(sequence)
    compute(scheduler, scheduler.schedule())
    scheduler.schedule()

    for sequence in (*sequences, blocked):
        scheduler.remove(sequence)
        scheduler.check_invariants()

    assert scheduler.blocks.num_used_blocks == 0
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    with pytest.raises(ValueError, match="finished already"):
        scheduler.remove(blocked)


def test_sequence_larger_than_the_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="outgrow"):
        make_scheduler(num_blocks=2).add(make_sequence(1, range(1, 6), max_tokens=4))


def test_budget_below_the_running_sequences_is_refused() -> None:
    with pytest.raises(ValueError, match="max_running_sequences=8"):
        SchedulerLimits(max_step_tokens=4, max_running_sequences=8)
