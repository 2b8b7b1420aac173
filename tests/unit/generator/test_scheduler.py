"""Which sequences a step takes, and who gives way when blocks run out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chiasm.common.media import MediaSpan
from chiasm.generator.engine.block_manager import BlockManager
from chiasm.generator.engine.sampling_params import SamplingParams
from chiasm.generator.engine.scheduler import ScheduledStep, Scheduler, SchedulerLimits
from chiasm.generator.engine.sequence import Sequence, SequenceStatus
from tests.fakes.embeddings import make_layout, make_ref
from tests.fakes.generator_engine import EngineParts, expected_tokens, make_prompt, make_sequence


def _scheduler(num_blocks: int = 16, max_running: int = 4, max_step_tokens: int = 16) -> Scheduler:
    limits = SchedulerLimits(max_step_tokens, max_running)
    return Scheduler(BlockManager(num_blocks, block_size=4), limits)


def _compute(step: ScheduledStep) -> None:
    """Do what the engine does after a forward, with token 1."""
    for item in step.sequences:
        item.sequence.num_computed_tokens = item.start + item.num_tokens
        item.sequence.token_ids.append(1)


def _ids(step: ScheduledStep) -> list[int]:
    return [item.sequence.seq_id for item in step.sequences]


def test_prompts_are_taken_whole_in_order_of_arrival() -> None:
    scheduler = _scheduler()
    for seq_id in (1, 2, 3):
        scheduler.add(make_sequence(seq_id, range(1, 6)))

    step = scheduler.schedule()

    assert _ids(step) == [1, 2, 3]
    assert step.num_prefill_tokens == 15


def test_decode_comes_first_and_prefill_takes_the_rest_of_the_budget() -> None:
    scheduler = _scheduler(max_step_tokens=8)
    scheduler.add(make_sequence(1, range(1, 5)))
    _compute(scheduler.schedule())
    for seq_id, length in ((2, 5), (3, 3)):
        scheduler.add(make_sequence(seq_id, range(1, 1 + length)))

    step = scheduler.schedule()

    assert _ids(step) == [1, 2]
    assert (step.num_decode_tokens, step.num_prefill_tokens) == (1, 5)


def test_prompt_over_the_budget_runs_as_the_only_prompt_of_its_step() -> None:
    scheduler = _scheduler(max_step_tokens=8)
    scheduler.add(make_sequence(1, range(1, 21)))
    scheduler.add(make_sequence(2, range(1, 3)))

    assert _ids(scheduler.schedule()) == [1]


def test_no_more_sequences_run_than_allowed() -> None:
    scheduler = _scheduler(max_running=2)
    for seq_id in (1, 2, 3):
        scheduler.add(make_sequence(seq_id, [1, 2]))

    scheduler.schedule()

    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)


def test_youngest_is_preempted_and_comes_back_before_newcomers() -> None:
    scheduler = _scheduler(num_blocks=5)
    old, young = make_sequence(1, range(1, 9), 8), make_sequence(2, range(1, 9), 8)
    scheduler.add(old)
    scheduler.add(young)
    _compute(scheduler.schedule())

    step = scheduler.schedule()

    assert _ids(step) == [1]
    assert step.num_preemptions == 1
    assert young.status is SequenceStatus.PREEMPTED
    assert (young.block_table, young.num_computed_tokens) == ([], 0)
    scheduler.check_invariants()
    scheduler.add(make_sequence(3, [1, 2]))
    scheduler.remove(old)
    assert _ids(scheduler.schedule()) == [2, 3]


def test_preempted_sequence_recomputes_prompt_and_output() -> None:
    scheduler = _scheduler(num_blocks=5)
    old, young = make_sequence(1, range(1, 9), 8), make_sequence(2, range(1, 9), 8)
    scheduler.add(old)
    scheduler.add(young)
    _compute(scheduler.schedule())
    scheduler.schedule()
    scheduler.remove(old)

    step = scheduler.schedule()

    assert [(item.start, item.num_tokens) for item in step.sequences] == [(0, 9)]


def test_sequence_without_its_embeddings_blocks_nobody() -> None:
    scheduler = _scheduler()
    ref = make_ref(num_rows=2)
    span = MediaSpan(1, ref, make_layout(ref), is_ready=False)
    blocked = Sequence(1, make_prompt(range(1, 8), (span,)), SamplingParams(4))
    scheduler.add(blocked)
    scheduler.add(make_sequence(2, [1, 2]))

    assert _ids(scheduler.schedule()) == [2]
    blocked.embeddings[0] = torch.zeros(2, 1)
    scheduler.release(blocked)
    assert _ids(scheduler.schedule()) == [2, 1]


def test_removal_frees_blocks_in_every_state() -> None:
    scheduler = _scheduler(num_blocks=5)
    ref = make_ref(num_rows=2)
    span = MediaSpan(1, ref, make_layout(ref), is_ready=False)
    blocked = Sequence(9, make_prompt(range(1, 8), (span,)), SamplingParams(4))
    sequences = [make_sequence(1, range(1, 9)), make_sequence(2, range(1, 9))]
    for sequence in (*sequences, blocked):
        scheduler.add(sequence)
    _compute(scheduler.schedule())
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
        _scheduler(num_blocks=2).add(make_sequence(1, range(1, 6), max_tokens=4))


def test_budget_below_the_running_sequences_is_refused() -> None:
    with pytest.raises(ValueError, match="max_running_sequences=8"):
        SchedulerLimits(max_step_tokens=4, max_running_sequences=8)


class _EngineMachine(RuleBasedStateMachine):
    """Admits, steps and cancels at random on a cache of a few blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = EngineParts(num_blocks=6, block_size=3, max_running=4, max_step_tokens=8)
        self.live: dict[int, Sequence] = {}
        self.next_id = 1

    @rule(length=st.integers(1, 9), max_tokens=st.integers(1, 8))
    def admit(self, length: int, max_tokens: int) -> None:
        prompt = [(self.next_id * 7 + index) % 250 + 1 for index in range(length)]
        sequence = make_sequence(self.next_id, prompt, max_tokens)
        self.next_id += 1
        self.live[sequence.seq_id] = sequence
        self.parts.engine.add(sequence)

    @rule()
    def step(self) -> None:
        for output in self.parts.engine.step():
            if output.end is not None:
                del self.live[output.seq_id]

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 100))
    def cancel(self, pick: int) -> None:
        seq_id = list(self.live)[pick % len(self.live)]
        del self.live[seq_id]
        self.parts.engine.cancel(seq_id)

    @invariant()
    def blocks_and_queues_agree(self) -> None:
        self.parts.scheduler.check_invariants()

    @invariant()
    def tokens_do_not_depend_on_the_company(self) -> None:
        for sequence in self.live.values():
            output = sequence.token_ids[sequence.num_prompt_tokens :]
            assert output == expected_tokens(sequence.prompt.token_ids, len(output))

    def teardown(self) -> None:
        self.parts.run()
        assert self.parts.blocks.num_used_blocks == 0


TestEngineMachine = _EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
