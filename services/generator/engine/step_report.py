"""Tell observers the figures of each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from chiasm.generator.engine.outputs import (
    EngineState,
    SequenceTimes,
    StepStatistics,
)

if TYPE_CHECKING:
    from collections.abc import Sequence as Items

    from chiasm.generator.engine.engine import StepHandle
    from chiasm.generator.engine.outputs import ExecutionTimes, SequenceOutput
    from chiasm.generator.engine.scheduled_step import ScheduledStep
    from chiasm.generator.engine.scheduler import Scheduler
    from chiasm.generator.engine.sequence import Sequence


class StepObserver(Protocol):
    """Is told the figures of each step, and what the engine holds when it goes idle."""

    def observe(self, statistics: StepStatistics) -> None:
        """Take note of one step."""
        ...

    def observe_state(self, state: EngineState) -> None:
        """Take note of what the engine holds outside of a step."""
        ...


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step on its way, begun at ``started``; its sequences were chosen in ``schedule_s``."""

    step: ScheduledStep
    handle: StepHandle
    started: float
    schedule_s: float


class StepReporter:
    """Puts the figures of a step together and hands them to the observers."""

    def __init__(self, scheduler: Scheduler, observers: Items[StepObserver]) -> None:
        self._scheduler = scheduler
        self._observers = tuple(observers)
        self._num_steps = 0
        self._ended_at = float("-inf")

    def report_state(self) -> None:
        """Tell what the engine holds now."""
        for observer in self._observers:
            observer.observe_state(self._state())

    def report(
        self,
        launched: LaunchedStep,
        results: Items[SequenceOutput],
        times: ExecutionTimes,
        update: tuple[float, float],
        finished: Items[SequenceTimes],
    ) -> None:
        """Tell the figures of a step that has run; ``update`` is when that was and is done."""
        self._num_steps += 1
        step, state = launched.step, self._state()
        begun = max(launched.started, self._ended_at)
        self._ended_at, updated_at = update
        statistics = StepStatistics(
            step=self._num_steps,
            num_sequences=len(step.sequences),
            num_prefill_tokens=step.num_prefill_tokens,
            num_decode_tokens=step.num_decode_tokens,
            num_output_tokens=sum(len(result.token_ids) for result in results),
            num_queried_tokens=step.num_queried_tokens,
            num_cached_tokens=step.num_cached_tokens,
            num_running=state.num_running,
            num_waiting=state.num_waiting,
            num_used_blocks=state.num_used_blocks,
            num_blocks=state.num_blocks,
            num_preemptions=step.num_preemptions,
            schedule_s=launched.schedule_s,
            build_s=times.build_s,
            forward_s=times.forward_s,
            sample_s=times.sample_s,
            update_s=updated_at - self._ended_at,
            step_s=self._ended_at - begun,
            finished=tuple(finished),
        )
        for observer in self._observers:
            observer.observe(statistics)

    def _state(self) -> EngineState:
        blocks = self._scheduler.blocks
        return EngineState(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_used_blocks=blocks.num_used_blocks,
            num_blocks=blocks.num_blocks,
        )


def times_of(sequence: Sequence, now: float) -> SequenceTimes:
    """Return where the time of a sequence went that finished by a token ``now``."""
    assert sequence.first_step_at is not None, "it was in a step"
    assert sequence.first_token_at is not None, "it finished by a token"
    return SequenceTimes(
        queue_s=sequence.first_step_at - sequence.added_at,
        prefill_s=sequence.first_token_at - sequence.first_step_at,
        decode_s=now - sequence.first_token_at,
    )
