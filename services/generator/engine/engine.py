"""Advance all sequences by one step: schedule, execute, update."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

import structlog

from chiasm.generator.engine.outputs import (
    EngineState,
    Failed,
    Finished,
    FinishReason,
    SequenceOutput,
    SequenceTimes,
    StepStatistics,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from collections.abc import Sequence as Items

    import torch

    from chiasm.generator.engine.scheduler import ScheduledStep, Scheduler
    from chiasm.generator.engine.sequence import Sequence

log = structlog.get_logger(__name__)


class ForwardError(Exception):
    """A forward failed, or gave logits that are not finite; a bug or a broken checkpoint."""


class Runner(Protocol):
    """Executes the model; ``ModelRunner`` is the real one."""

    def execute(self, step: ScheduledStep) -> Mapping[int, int | None]:
        """Return the sampled token by ``seq_id``; ``None`` where the logits were not finite."""
        ...

    def check_alive(self) -> None:
        """Raise if the device can compute nothing more, after ``execute`` has raised."""
        ...


class StepObserver(Protocol):
    """Is told the figures of each step, and what the engine holds when it goes idle."""

    def observe(self, statistics: StepStatistics) -> None:
        """Take note of one step."""
        ...

    def observe_state(self, state: EngineState) -> None:
        """Take note of what the engine holds outside of a step."""
        ...


class Engine:
    """Owns the live sequences; synchronous, used by one thread.

    Lifecycle of a sequence: 1. ``add``. 2. ``provide`` for each span whose embedding was not there.
    3. ``step`` computes its prompt, then one token at a time. 4. It ends by itself, by ``cancel``
    or by ``fail``; its blocks are free when the call that ended it returns.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        observers: Items[StepObserver] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._observers = tuple(observers)
        self._clock = clock
        self._sequences: dict[int, Sequence] = {}
        self._num_steps = 0

    @property
    def has_work(self) -> bool:
        """Whether ``step`` would advance any sequence."""
        return self._scheduler.has_work

    @property
    def num_sequences(self) -> int:
        """Sequences that have not ended."""
        return len(self._sequences)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        sequence.added_at = self._clock()
        self._scheduler.add(sequence)
        self._sequences[sequence.seq_id] = sequence

    def provide(self, seq_id: int, span_index: int, embedding: torch.Tensor) -> None:
        """Hand over the embedding of one span; nothing happens if the sequence has ended.

        Args:
            seq_id: Sequence that waits for it.
            span_index: Index in the prompt's spans.
            embedding: SPLICE rows, checked. [num_embedding_tokens, hidden_size], dtype of the
                model.
        """
        sequence = self._sequences.get(seq_id)
        if sequence is None or sequence.embeddings[span_index] is not None:
            return
        sequence.embeddings[span_index] = embedding
        if sequence.has_all_embeddings:
            self._scheduler.release(sequence)

    def cancel(self, seq_id: int) -> None:
        """End a sequence without a word and free its blocks; nothing happens if it has ended."""
        sequence = self._sequences.pop(seq_id, None)
        if sequence is not None:
            self._scheduler.remove(sequence)

    def step(self) -> list[SequenceOutput]:
        """Advance all sequences that have room.

        An error of the forward ends the sequences that were in it; the others go on.

        Returns:
            What happened to each sequence of the step.

        Raises:
            Exception: The device is lost; the engine is of no use any more.
        """
        started = self._clock()
        step = self._scheduler.schedule()
        if not step.sequences:
            return []
        scheduled = self._clock()
        for item in step.sequences:
            if item.sequence.first_step_at is None:
                item.sequence.first_step_at = started
        outputs = self._execute(step)
        if isinstance(outputs, Exception):
            failure = outputs
            executed = self._clock()
            results = [self._fail(item.sequence, failure) for item in step.sequences]
        else:
            executed = self._clock()
            results = self._update(step, outputs, executed)
        durations = (scheduled - started, executed - scheduled, self._clock() - executed)
        times = [
            _times_of(item.sequence, executed)
            for item, result in zip(step.sequences, results, strict=True)
            if isinstance(result.end, Finished)
        ]
        self._report(step, results, durations, times)
        return results

    def report_state(self) -> None:
        """Tell the observers what the engine holds now, outside of a step."""
        blocks = self._scheduler.blocks
        state = EngineState(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_used_blocks=blocks.num_used_blocks,
            num_blocks=blocks.num_blocks,
        )
        for observer in self._observers:
            observer.observe_state(state)

    def _execute(self, step: ScheduledStep) -> Mapping[int, int | None] | Exception:
        # Models are third-party code on arbitrary checkpoints and may raise anything; the other
        # sequences must not suffer for it.
        try:
            return self._runner.execute(step)
        except Exception as error:
            log.exception("forward_failed", num_sequences=len(step.sequences))
            # A fault on a device stays: every later forward would fail while the service looks
            # healthy, so what this raises must end the process.
            self._runner.check_alive()
            failure = ForwardError("The forward of a step failed.")
            failure.__cause__ = error
            return failure

    def _update(
        self, step: ScheduledStep, tokens: Mapping[int, int | None], now: float
    ) -> list[SequenceOutput]:
        results = []
        for item in step.sequences:
            sequence = item.sequence
            sequence.num_computed_tokens = item.start + item.num_tokens
            token = tokens[sequence.seq_id]
            if token is None:
                error = ForwardError(f"The logits of sequence {sequence.seq_id} are not finite.")
                results.append(self._fail(sequence, error))
                continue
            sequence.token_ids.append(token)
            if sequence.first_token_at is None:
                sequence.first_token_at = now
            end = _find_end(sequence, token)
            if end is not None:
                self.cancel(sequence.seq_id)
            results.append(SequenceOutput(sequence.seq_id, (token,), end))
        return results

    def _fail(self, sequence: Sequence, error: Exception) -> SequenceOutput:
        self.cancel(sequence.seq_id)
        return SequenceOutput(sequence.seq_id, end=Failed(error))

    def _report(
        self,
        step: ScheduledStep,
        results: Items[SequenceOutput],
        durations: tuple[float, float, float],
        times: Items[SequenceTimes],
    ) -> None:
        self._num_steps += 1
        blocks = self._scheduler.blocks
        statistics = StepStatistics(
            step=self._num_steps,
            num_sequences=len(step.sequences),
            num_prefill_tokens=step.num_prefill_tokens,
            num_decode_tokens=step.num_decode_tokens,
            num_output_tokens=sum(len(result.token_ids) for result in results),
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_used_blocks=blocks.num_used_blocks,
            num_blocks=blocks.num_blocks,
            num_preemptions=step.num_preemptions,
            schedule_s=durations[0],
            execute_s=durations[1],
            update_s=durations[2],
            finished=tuple(times),
        )
        for observer in self._observers:
            observer.observe(statistics)


def _times_of(sequence: Sequence, now: float) -> SequenceTimes:
    assert sequence.first_step_at is not None, "it was in a step"
    assert sequence.first_token_at is not None, "it finished by a token"
    return SequenceTimes(
        queue_s=sequence.first_step_at - sequence.added_at,
        prefill_s=sequence.first_token_at - sequence.first_step_at,
        decode_s=now - sequence.first_token_at,
    )


def _find_end(sequence: Sequence, token: int) -> Finished | None:
    """Return how ``token``, just appended, ends ``sequence``; ``None`` if it goes on."""
    if token in sequence.sampling.stop_token_ids:
        reason, stop_token_id = FinishReason.STOP, token
    elif sequence.num_output_tokens >= sequence.sampling.max_tokens:
        reason, stop_token_id = FinishReason.LENGTH, None
    else:
        return None
    return Finished(reason, stop_token_id, sequence.num_prompt_tokens, sequence.num_output_tokens)
