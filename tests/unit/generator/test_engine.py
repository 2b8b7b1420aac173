"""Steps of the engine on a model that costs nothing."""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING

import pytest
import torch

from chiasm.common.media import (
    DataType,
    EmbeddingRef,
    MediaLayout,
    MediaSpan,
    Modality,
    TensorRole,
    TensorSpec,
    TokenRun,
)
from chiasm.generator.engine.engine import Engine, ForwardError
from chiasm.generator.engine.outputs import EngineState, Failed, Finished, FinishReason
from chiasm.generator.engine.sampling_params import SamplingParams
from chiasm.generator.engine.sequence import Sequence
from tests.fakes.generator_engine import (
    EngineParts,
    expected_tokens,
    make_prompt,
    make_sequence,
    next_token,
    output_of,
)

if TYPE_CHECKING:
    from chiasm.generator.engine.outputs import StepResult, StepStatistics
    from chiasm.generator.engine.scheduled_step import ScheduledStep

PROMPTS = ([1, 2, 3], [9], list(range(20, 37)), [5] * 8, [7, 8, 9, 10])


class _Record:
    def __init__(self) -> None:
        self.steps: list[StepStatistics] = []
        self.states: list[EngineState] = []

    def observe(self, statistics: StepStatistics) -> None:
        self.steps.append(statistics)

    def observe_state(self, state: EngineState) -> None:
        self.states.append(state)


def test_batched_sequences_generate_what_they_generate_alone() -> None:
    parts = EngineParts()
    sequences = [make_sequence(index, prompt, 12) for index, prompt in enumerate(PROMPTS)]
    for sequence in sequences:
        parts.engine.add(sequence)

    parts.run()

    assert max(parts.decoder.num_sequences_per_forward) == len(PROMPTS)
    for sequence, prompt in zip(sequences, PROMPTS, strict=True):
        assert output_of(sequence) == expected_tokens(prompt, 12)


def test_preemption_changes_no_token() -> None:
    record = _Record()
    parts = EngineParts(num_blocks=8, block_size=4, observers=[record])
    sequences = [make_sequence(index, prompt, 14) for index, prompt in enumerate(PROMPTS)]
    for sequence in sequences:
        parts.engine.add(sequence)

    parts.run()

    assert sum(step.num_preemptions for step in record.steps) > 0
    for sequence, prompt in zip(sequences, PROMPTS, strict=True):
        assert output_of(sequence) == expected_tokens(prompt, 14)
    assert parts.blocks.num_used_blocks == 0


def test_token_limit_ends_with_length() -> None:
    parts = EngineParts()
    parts.engine.add(make_sequence(1, [1, 2, 3], 4))

    end = parts.run()[1].end

    assert end == Finished(FinishReason.LENGTH, None, num_prompt_tokens=3, num_output_tokens=4)
    assert parts.engine.num_sequences == 0


def test_stop_token_ends_the_sequence_and_is_its_last_token() -> None:
    parts = EngineParts()
    tokens = expected_tokens([1, 2, 3], 3)
    parts.engine.add(make_sequence(1, [1, 2, 3], 10, stop=frozenset({tokens[2]})))

    output = parts.run()[1]

    assert output.token_ids == (tokens[2],)
    assert output.end == Finished(FinishReason.STOP, tokens[2], 3, 3)


def test_stop_wins_over_length_on_the_last_token() -> None:
    parts = EngineParts()
    token = next_token([1, 2])
    parts.engine.add(make_sequence(1, [1, 2], 1, stop=frozenset({token})))

    end = parts.run()[1].end

    assert isinstance(end, Finished)
    assert end.reason is FinishReason.STOP


def test_embeddings_overwrite_the_tokens_of_their_span() -> None:
    parts = EngineParts()
    spec = TensorSpec(TensorRole.SPLICE, DataType.FLOAT32, (3, 1))
    ref = EmbeddingRef(b"e" * 32, b"f" * 32, Modality.IMAGE, (spec,))
    layout = MediaLayout((TokenRun(50, 1, False), TokenRun(51, 3, True), TokenRun(52, 1, False)))
    span = MediaSpan(1, ref, layout, is_ready=True)
    sequence = Sequence(
        1, make_prompt([1, 50, 51, 51, 51, 52, 2], (span,)), SamplingParams(5, temperature=0.0)
    )
    parts.engine.add(sequence)
    parts.run()
    assert sequence.num_scheduled_tokens == span.offset

    parts.engine.provide(1, 0, torch.tensor([[100.0], [101.0], [102.0]]))
    parts.run()

    assert output_of(sequence) == expected_tokens([1, 50, 100, 101, 102, 52, 2], 5)


def test_cancelled_sequence_frees_its_blocks_at_once() -> None:
    parts = EngineParts()
    parts.engine.add(make_sequence(1, range(1, 9), 50))
    parts.step_to_output()
    assert parts.blocks.num_used_blocks > 0

    parts.engine.cancel(1)

    assert parts.blocks.num_used_blocks == 0
    assert parts.engine.step() == []
    assert not parts.engine.has_work
    parts.engine.cancel(1)


def test_cancel_storm_returns_all_blocks() -> None:
    rng = random.Random(0)
    parts = EngineParts(num_blocks=16, block_size=2, max_running=6)
    alive: list[int] = []
    for seq_id in range(500):
        parts.engine.add(make_sequence(seq_id, [1 + seq_id % 200] * rng.randint(1, 12), 20))
        alive.append(seq_id)
        parts.engine.step()
        if rng.random() < 0.8:
            parts.engine.cancel(alive.pop(rng.randrange(len(alive))))
        parts.scheduler.check_invariants()

    for seq_id in alive:
        parts.engine.cancel(seq_id)

    assert parts.blocks.num_used_blocks == 0
    assert parts.engine.step() == []


def test_failing_forward_ends_its_sequences_and_the_engine_goes_on() -> None:
    parts = EngineParts()
    parts.decoder.failing_token = 200
    parts.engine.add(make_sequence(1, [200, 1], 4))
    ends = parts.run()
    survivor = make_sequence(2, [1, 2], 4)
    parts.engine.add(survivor)
    parts.run()

    end = ends[1].end
    assert isinstance(end, Failed)
    assert isinstance(end.error, ForwardError)
    assert output_of(survivor) == expected_tokens([1, 2], 4)
    assert parts.blocks.num_used_blocks == 0


def test_nan_logits_fail_only_their_own_sequence() -> None:
    parts = EngineParts()
    parts.decoder.nan_token = 200
    survivor = make_sequence(2, [1, 2], 4)
    parts.engine.add(make_sequence(1, [200, 1], 4))
    parts.engine.add(survivor)

    ends = parts.run()

    assert isinstance(ends[1].end, Failed)
    assert isinstance(ends[2].end, Finished)
    assert output_of(survivor) == expected_tokens([1, 2], 4)


def test_observers_see_the_figures_of_each_step() -> None:
    record = _Record()
    parts = EngineParts(observers=[record])
    parts.engine.add(make_sequence(1, [1, 2, 3], 2))
    parts.engine.add(make_sequence(2, [1, 2, 3, 4, 5], 2))

    parts.run()

    assert [step.step for step in record.steps] == [1, 2]
    first, second = record.steps
    assert (first.num_prefill_tokens, first.num_decode_tokens, first.num_used_blocks) == (8, 0, 3)
    assert (second.num_prefill_tokens, second.num_decode_tokens, second.num_running) == (0, 2, 0)
    assert second.num_output_tokens == 2


def test_the_times_of_a_finished_sequence_add_up_to_its_life() -> None:
    record = _Record()
    clock = itertools.count(100.0)
    parts = EngineParts(observers=[record], clock=lambda: next(clock))
    parts.engine.add(make_sequence(1, [1, 2, 3], 2))
    added_at = 100.0

    parts.run()

    first, second = record.steps
    assert first.finished == ()
    (times,) = second.finished
    assert times.queue_s == 1.0
    assert times.prefill_s > 0.0
    assert times.decode_s > 0.0
    assert added_at + times.queue_s + times.prefill_s + times.decode_s < next(clock)


class _LostDevice:
    """A runner, and a launched step of it, whose device takes nothing any more."""

    def launch(self, step: ScheduledStep) -> _LostDevice:
        assert step.sequences
        return self

    def wait(self) -> StepResult:
        raise RuntimeError("CUDA error")

    def close(self) -> None:
        raise AssertionError("nobody closes it here")

    def check_alive(self) -> None:
        raise RuntimeError("device-side assert triggered")


def test_lost_device_ends_the_engine() -> None:
    engine = Engine(EngineParts().scheduler, _LostDevice())
    engine.add(make_sequence(1, [1, 2], 4))
    engine.step()

    with pytest.raises(RuntimeError, match="device-side assert"):
        engine.step()


def test_observers_are_told_what_is_left_after_a_cancel() -> None:
    record = _Record()
    parts = EngineParts(num_blocks=8, observers=[record])
    parts.engine.add(make_sequence(1, [1, 2], 4))
    parts.step_to_output()
    parts.engine.cancel(1)

    parts.engine.report_state()

    assert record.steps[-1].state == EngineState(1, 0, 1, 8)
    assert record.states == [EngineState(0, 0, 0, 8)]
