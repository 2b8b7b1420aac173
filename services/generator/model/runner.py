"""Execute steps in a thread of their own: build the batch here, queue its work there."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from chiasm.generator.engine.logprobs import compute_logprobs
from chiasm.generator.engine.outputs import ExecutionTimes, PromptLogprobs, StepResult
from chiasm.generator.engine.sampler import SampledRow
from chiasm.generator.model.attention_plan import CacheShape
from chiasm.generator.model.forward_batch import build_forward_batch
from chiasm.generator.model.step_buffers import StepBuffers
from chiasm.generator.model.step_marks import StepMarks

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Items
    from concurrent.futures import Future

    from chiasm.generator.engine.block_manager import BlockCopy
    from chiasm.generator.engine.logprobs import TokenLogprobs
    from chiasm.generator.engine.sampler import Sampler
    from chiasm.generator.engine.scheduled_step import ScheduledSequence, ScheduledStep
    from chiasm.generator.model.decoder import Decoder
    from chiasm.generator.model.forward_batch import ForwardBatch, ScoredRows

# Rows whose logits are computed at one time to score prompts: a row is a whole vocabulary.
_SCORED_ROWS = 64


@dataclass(frozen=True, slots=True)
class _StepInput:
    """What the forward thread needs of a step; nothing in it changes any more."""

    batches: tuple[ForwardBatch, ...]
    seq_ids: tuple[int, ...]
    rows: tuple[SampledRow, ...]
    block_copies: tuple[BlockCopy, ...]
    build_s: float


class PendingStep:
    """A launched step; see ``StepHandle``."""

    def __init__(self, future: Future[Callable[[], StepResult]]) -> None:
        self._future = future

    def wait(self) -> StepResult:
        """Wait until the step has run; see ``StepHandle.wait``."""
        take_result = self._future.result()
        return take_result()


class ModelRunner:
    """Turns scheduled sequences into sampled tokens.

    The thread that launches builds the tensors while the forward thread runs the step before. A
    token that is not known yet is filled in on the device, from what the step before sampled. A
    GPU works behind the forward thread, which queues the work of a step while the one before runs,
    unless the tokens of that one must be known for it; who waits for a step reads its tokens.
    """

    def __init__(
        self,
        decoder: Decoder,
        sampler: Sampler,
        begin_step: Callable[[], None] = lambda: None,
        is_deterministic: bool = False,
        max_step_tokens: int = 0,
    ) -> None:
        """Start the forward thread.

        Args:
            decoder: The language model; used by the forward thread only.
            sampler: Chooses tokens; used by the forward thread only.
            begin_step: Called in the forward thread before each step.
            is_deterministic: Whether each sequence gets a forward of its own, so that no other
                changes its numbers.
            max_step_tokens: Tokens of a step for which memory is reserved; more get new memory.
        """
        self._decoder = decoder
        self._sampler = sampler
        self._begin_step = begin_step
        self._is_deterministic = is_deterministic
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forward")
        self._shape = CacheShape.of(decoder)
        self._buffers = StepBuffers(max_step_tokens, decoder.device)
        # Rows of the last launched step by sequence; the tokens are the forward thread's.
        self._row_of: dict[int, int] = {}
        self._last_tokens = torch.zeros(0, dtype=torch.int64, device=decoder.device)

    def launch(self, step: ScheduledStep) -> PendingStep:
        """Build the tensors of ``step`` and queue it behind the steps launched before.

        Args:
            step: Sequences with their blocks allocated; at least one.
        """
        started = time.perf_counter()
        self._buffers.begin()
        parts = self._split(step.sequences)
        # Each name of a buffer is used once: further parts of a step get new memory.
        batches = (
            self._build(parts[0], self._buffers),
            *(self._build(items, None) for items in parts[1:]),
        )
        sampled = [(item.sequence, item.end) for batch in batches for item in batch.sampled]
        seq_ids = tuple(sequence.seq_id for sequence, _ in sampled)
        rows = tuple(
            SampledRow(sequence.sampling, end, sequence.sampling_state) for sequence, end in sampled
        )
        self._row_of = {seq_id: index for index, seq_id in enumerate(seq_ids)}
        build_s = time.perf_counter() - started
        data = _StepInput(batches, seq_ids, rows, step.block_copies, build_s)
        return PendingStep(self._thread.submit(self._execute, data))

    def check_alive(self) -> None:
        """Wait for the device; raise its error if it can compute nothing more.

        A fault inside a CUDA kernel is sticky: it makes every later call of the process fail.
        """
        if self._decoder.device.type == "cuda":
            torch.cuda.synchronize(self._decoder.device)

    def close(self) -> None:
        """End the forward thread after the steps that were launched."""
        self._thread.shutdown()

    def _split(self, items: Items[ScheduledSequence]) -> list[Items[ScheduledSequence]]:
        """Return what shares a forward: everything, or in deterministic mode one sequence."""
        if not self._is_deterministic:
            return [items]
        parts: dict[int, list[ScheduledSequence]] = {}
        for item in items:
            computing = item.forked_from or item.sequence
            parts.setdefault(computing.seq_id, []).append(item)
        return list(parts.values())

    def _build(self, items: Items[ScheduledSequence], buffers: StepBuffers | None) -> ForwardBatch:
        return build_forward_batch(items, self._shape, self._row_of, buffers)

    @torch.inference_mode()
    def _execute(self, data: _StepInput) -> Callable[[], StepResult]:
        """Queue the work of a step and return what waits for its result."""
        last_tokens = self._last_tokens
        # If this step fails, the next one finds a token for every row, of sequences that ended.
        self._last_tokens = last_tokens.new_zeros(len(data.rows))
        self._begin_step()
        marks = StepMarks(self._decoder.device)
        if data.block_copies:
            self._decoder.copy_blocks(data.block_copies)
        prompt_logprobs: dict[int, PromptLogprobs] = {}
        parts = [
            self._compute_logits(batch, last_tokens, prompt_logprobs) for batch in data.batches
        ]
        logits = torch.cat(parts) if len(parts) > 1 else parts[0]
        marks.set()
        chosen = self._sampler.choose(logits, data.rows)
        self._last_tokens = chosen[0]
        # Copied behind the work of this step: a copy that is asked for later waits for the next.
        told = chosen.to("cpu", non_blocking=True)
        marks.set()

        def take_result() -> StepResult:
            forward_s, sample_s = marks.wait()
            tokens = self._sampler.tell(told, logits, data.rows)
            sampled = dict(zip(data.seq_ids, tokens, strict=True))
            times = ExecutionTimes(data.build_s, forward_s, sample_s)
            return StepResult(sampled, times, prompt_logprobs)

        if self._decoder.device.type == "cuda" and not self._sampler.needs_host(data.rows):
            return take_result
        result = take_result()
        return lambda: result

    def _compute_logits(
        self,
        batch: ForwardBatch,
        last_tokens: torch.Tensor,
        prompt_logprobs: dict[int, PromptLogprobs],
    ) -> torch.Tensor:
        """Run the forward; what is learned of prompts is added to ``prompt_logprobs``."""
        batch.fill_in(last_tokens)
        hidden = self._decoder.forward(batch)
        for rows in batch.scored:
            prompt_logprobs[rows.seq_id] = PromptLogprobs(rows.start, self._score(hidden, rows))
        logits = self._decoder.compute_logits(hidden[batch.logit_rows])
        # The product of a row may depend on how many there are: it is not repeated for forks.
        return logits if batch.logits_of_sampled is None else logits[batch.logits_of_sampled]

    def _score(self, hidden: torch.Tensor, rows: ScoredRows) -> tuple[TokenLogprobs, ...]:
        told: list[TokenLogprobs] = []
        for first in range(0, len(rows.token_ids), _SCORED_ROWS):
            token_ids = rows.token_ids[first : first + _SCORED_ROWS]
            start = rows.row + first
            logits = self._decoder.compute_logits(hidden[start : start + len(token_ids)])
            told += compute_logprobs(logits, token_ids, [rows.num_alternatives] * len(token_ids))
        return tuple(told)
