"""Advance all sequences by one step: schedule and launch a step, then update by the one before."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

import structlog

from chiasm.generator.engine.grammar import GrammarError
from chiasm.generator.engine.outputs import (
    ExecutionTimes,
    Failed,
    Finished,
    FinishReason,
    PromptLogprobs,
    SequenceOutput,
)
from chiasm.generator.engine.sequence import SequenceStatus
from chiasm.generator.engine.step_report import LaunchedStep, StepReporter, times_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Items

    import torch

    from chiasm.generator.engine.outputs import StepResult
    from chiasm.generator.engine.sampler import SampledToken
    from chiasm.generator.engine.scheduled_step import ScheduledSequence, ScheduledStep
    from chiasm.generator.engine.scheduler import Scheduler
    from chiasm.generator.engine.sequence import Sequence
    from chiasm.generator.engine.step_report import StepObserver

log = structlog.get_logger(__name__)


class ForwardError(Exception):
    """A forward failed, or gave logits that are not finite; a bug or a broken checkpoint."""


class StepHandle(Protocol):
    """A step that was launched."""

    def wait(self) -> StepResult:
        """Wait until the step has run and return what it computed.

        Raises:
            Exception: What the forward raised.
        """
        ...


class Runner(Protocol):
    """Executes the model; ``ModelRunner`` is the real one."""

    def launch(self, step: ScheduledStep) -> StepHandle:
        """Begin a step behind those launched before; it reads the tokens that they sample."""
        ...

    def check_alive(self) -> None:
        """Raise if the device can compute nothing more, after a step has raised."""
        ...

    def close(self) -> None:
        """Let go of the device after the launched steps."""
        ...


class Engine:
    """Owns the live sequences; synchronous, used by one thread.

    One step is always on its way while the next one is put together::

        step k     schedule, build | ........ forward, sample ........ |
        step k+1                   | schedule, build | (queued) ...... | forward, sample ...
        here           launch k    |    launch k+1   | wait for k, update | launch k+2 ...

    Step k+1 is scheduled before the tokens of step k are known: it counts them, and reads them on
    the device. If one of them ends its sequence, what step k+1 samples for it is thrown away.

    Lifecycle of a sequence: 1. ``add``. 2. ``provide`` for each span whose embedding was not there.
    3. ``step`` computes its prompt in chunks, then one token at a time. 4. It ends by itself, by
    ``cancel`` or by ``fail``; its blocks are free when the call that ended it returns. A launched
    step may still write to them; every later step writes behind it, so this does no harm.
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
        self._reporter = StepReporter(scheduler, observers)
        self._clock = clock
        self._sequences: dict[int, Sequence] = {}
        self._launched: LaunchedStep | None = None

    @property
    def has_work(self) -> bool:
        """Whether ``step`` would advance any sequence."""
        return self._launched is not None or self._scheduler.has_work

    @property
    def num_sequences(self) -> int:
        """Sequences that have not ended."""
        return len(self._sequences)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence, and its forks behind it."""
        now = self._clock()
        for one in (sequence, *sequence.forks):
            one.added_at = now
            one.status = SequenceStatus.FORK
            self._sequences[one.seq_id] = one
        self._scheduler.add(sequence)

    def provide(self, seq_id: int, span_index: int, embedding: torch.Tensor) -> None:
        """Hand over the embedding of one span; nothing happens if the sequence has ended.

        Args:
            seq_id: Sequence that waits for it. Its forks hold it with it, and need to be told
                only if they run on their own, since it has ended.
            span_index: Index in the prompt's spans.
            embedding: SPLICE rows, checked. [num_embedding_tokens, hidden_size], dtype of the
                model.
        """
        sequence = self._sequences.get(seq_id)
        if sequence is None:
            return
        if sequence.embeddings[span_index] is None:
            sequence.embeddings[span_index] = embedding
        self._scheduler.release(sequence)

    def cancel(self, seq_id: int) -> None:
        """End a sequence without a word and free its blocks; nothing happens if it has ended."""
        sequence = self._sequences.pop(seq_id, None)
        if sequence is None:
            return
        if sequence.status is SequenceStatus.FORK:
            self._forget_fork(sequence)
            return
        forks, sequence.forks = sequence.forks, ()
        self._scheduler.remove(sequence)
        for fork in forks:
            self._scheduler.add(fork)

    def step(self) -> list[SequenceOutput]:
        """Launch a step for all sequences that have room, and finish the one launched before.

        An error of a forward ends the sequences that were in it; the others go on.

        Returns:
            What the finished step did to its sequences; nothing if none had been launched.

        Raises:
            Exception: The device is lost; the engine is of no use any more.
        """
        before, self._launched = self._launched, self._launch()
        return [] if before is None else self._finish(before)

    def report_state(self) -> None:
        """Tell the observers what the engine holds now, outside of a step."""
        self._reporter.report_state()

    def close(self) -> None:
        """Wait for the launched steps and let go of the device."""
        self._runner.close()

    def _launch(self) -> LaunchedStep | None:
        started = self._clock()
        step = self._scheduler.schedule()
        if not step.sequences:
            return None
        for item in step.sequences:
            if item.sequence.first_step_at is None:
                item.sequence.first_step_at = started
        scheduled = self._clock()
        handle = self._runner.launch(step)
        return LaunchedStep(step, handle, started, scheduled - started)

    def _finish(self, launched: LaunchedStep) -> list[SequenceOutput]:
        computed: StepResult | Exception
        times = ExecutionTimes()
        # Models are third-party code on arbitrary checkpoints and may raise anything; the other
        # sequences must not suffer for it.
        try:
            computed = launched.handle.wait()
            times = computed.times
        except Exception as error:
            log.exception("forward_failed", num_sequences=len(launched.step.sequences))
            # A fault on a device stays: every later forward would fail while the service looks
            # healthy, so what this raises must end the process.
            self._runner.check_alive()
            computed = error
        now = self._clock()
        self._scheduler.note_computed(launched.step, times.forward_s + times.sample_s)
        results = []
        ended_times = []
        for item in launched.step.sequences:
            # One that has ended meanwhile takes no more tokens.
            if item.sequence.status is SequenceStatus.FINISHED:
                continue
            result = self._update(item, computed, now)
            if result is not None:
                results.append(result)
                if isinstance(result.end, Finished):
                    ended_times.append(times_of(item.sequence, now))
        self._reporter.report(launched, results, times, (now, self._clock()), ended_times)
        return results

    def _update(
        self, item: ScheduledSequence, computed: StepResult | Exception, now: float
    ) -> SequenceOutput | None:
        """Apply what a step did to one sequence; ``None`` if there is nothing to tell of it."""
        sequence = item.sequence
        if isinstance(computed, Exception):
            failure = ForwardError("The forward of a step failed.")
            failure.__cause__ = computed
            return self._fail(sequence, failure)
        token = None
        if item.samples:
            token = computed.tokens[sequence.seq_id]
            state = sequence.sampling_state
            if state is not None and state.failure:
                return self._fail(sequence, GrammarError(state.failure))
            if token is None:
                self._scheduler.blocks.forget(sequence)
                error = ForwardError(f"The logits of sequence {sequence.seq_id} are not finite.")
                return self._fail(sequence, error)
        # Preempted since: its blocks are no longer those that the step wrote.
        if item.epoch == sequence.num_preemptions:
            self._scheduler.commit(sequence, item.end)
        scored = _take_scored(sequence, computed.prompt_logprobs.get(sequence.seq_id))
        if token is not None:
            return self._append(sequence, token, now, scored)
        return None if scored is None else SequenceOutput(sequence.seq_id, prompt_logprobs=scored)

    def _append(
        self, sequence: Sequence, token: SampledToken, now: float, scored: PromptLogprobs | None
    ) -> SequenceOutput:
        sequence.num_pending_tokens -= 1
        sequence.token_ids.append(token.token_id)
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        end = _find_end(sequence, token.token_id)
        if end is not None:
            self.cancel(sequence.seq_id)
        logprobs = () if token.logprobs is None else (token.logprobs,)
        cached = sequence.num_cached_tokens
        return SequenceOutput(sequence.seq_id, (token.token_id,), end, logprobs, scored, cached)

    def _fail(self, sequence: Sequence, error: Exception) -> SequenceOutput:
        self.cancel(sequence.seq_id)
        return SequenceOutput(sequence.seq_id, end=Failed(error))

    def _forget_fork(self, fork: Sequence) -> None:
        fork.status = SequenceStatus.FINISHED
        for sequence in self._sequences.values():
            if fork in sequence.forks:
                sequence.forks = tuple(one for one in sequence.forks if one is not fork)
                return


def _take_scored(sequence: Sequence, scored: PromptLogprobs | None) -> PromptLogprobs | None:
    """Return what has not been told yet; a preempted prompt is computed, and scored, again."""
    if scored is None:
        return None
    num_told = sequence.num_scored_tokens - scored.start
    fresh = scored.logprobs[num_told:]
    sequence.num_scored_tokens += len(fresh)
    return PromptLogprobs(scored.start + num_told, fresh) if fresh else None


def _find_end(sequence: Sequence, token: int) -> Finished | None:
    """Return how ``token``, just appended, ends ``sequence``; ``None`` if it goes on."""
    if token in sequence.sampling.stop_token_ids:
        reason, stop_token_id = FinishReason.STOP, token
    elif sequence.num_output_tokens >= sequence.sampling.max_tokens:
        reason, stop_token_id = FinishReason.LENGTH, None
    else:
        return None
    return Finished(
        reason,
        stop_token_id,
        sequence.num_prompt_tokens,
        sequence.num_output_tokens,
        sequence.num_cached_tokens,
    )
