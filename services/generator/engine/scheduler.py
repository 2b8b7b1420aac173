"""Choose the sequences of each step."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chiasm.generator.engine.chunking import Chunking
from chiasm.generator.engine.scheduled_step import ScheduledSequence, ScheduledStep
from chiasm.generator.engine.sequence import Sequence, SequenceStatus
from chiasm.generator.engine.step_cost import StepCost
from chiasm.generator.engine.waiting_queue import WaitingQueue, rank

if TYPE_CHECKING:
    from chiasm.generator.engine.block_manager import BlockCopy, BlockManager, Prefix


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one step.

    Attributes:
        max_step_tokens: Token budget; at least ``max_running_sequences``, so that decode fits.
        max_running_sequences: Sequences that hold blocks at once.
        chunking: Where prefills are cut.
    """

    max_step_tokens: int
    max_running_sequences: int
    chunking: Chunking = field(default_factory=Chunking)

    def __post_init__(self) -> None:
        if not 1 <= self.max_running_sequences <= self.max_step_tokens:
            raise ValueError(
                f"max_running_sequences={self.max_running_sequences} must be between 1 and"
                f" max_step_tokens={self.max_step_tokens}."
            )


@dataclass(slots=True)
class _StepDraft:
    """A step while it is put together."""

    budget: int
    prefill_budget: int = 0
    decodes: list[ScheduledSequence] = field(default_factory=list)
    prefills: list[ScheduledSequence] = field(default_factory=list)
    block_copies: list[BlockCopy] = field(default_factory=list)
    starved: Sequence | None = None
    num_preemptions: int = 0
    num_queried_tokens: int = 0
    num_cached_tokens: int = 0

    @property
    def is_empty(self) -> bool:
        return not self.decodes and not self.prefills

    def has(self, sequence: Sequence) -> bool:
        return any(item.sequence is sequence for item in (*self.decodes, *self.prefills))

    def finish(self) -> ScheduledStep:
        return ScheduledStep(
            sequences=(*self.decodes, *self.prefills),
            num_preemptions=self.num_preemptions,
            num_queried_tokens=self.num_queried_tokens,
            num_cached_tokens=self.num_cached_tokens,
            block_copies=tuple(self.block_copies),
        )


class Scheduler:
    """Owns the queues.

    A sequence moves through these states; the queue that holds it is in brackets::

        add ──► WAITING [_waiting] ──schedule──► RUNNING [_running] ──out of blocks──┐
                  │        ▲   ▲                                                     │
           nothing ready  release └──────────── PREEMPTED [_waiting] ◄───────────────┘
                  ▼        │
                BLOCKED [_blocked]            remove: from any of them ──► FINISHED

    Each step takes first one token of every sequence that decodes, then chunks of the running
    prompts, then prompts from the waiting queue while budget and blocks last, and no more of them
    than keeps the step short for those that decode. A prompt is computed up to its first span whose
    embedding is missing. When a running sequence cannot grow, the youngest of the least urgent ones
    gives its blocks up and is computed anew later, so the first in rank always advances. While the
    chunk of a running prompt lacks room, nobody behind it in rank starts.

    Steps are launched before the tokens of the step before are known: all counts here are of
    scheduled tokens, and the newest token of a sequence may be one that only the device knows.

    Invariants:
        1. A sequence is in exactly one queue, the one of its status.
        2. Only running sequences own blocks.
        3. ``_running`` is sorted by rank.
    """

    def __init__(
        self, blocks: BlockManager, limits: SchedulerLimits, cost: StepCost | None = None
    ) -> None:
        self._blocks = blocks
        self._cost = cost or StepCost()
        self._limits = limits
        self._blocked: dict[int, Sequence] = {}
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []
        self._may_advance = False

    @property
    def blocks(self) -> BlockManager:
        """The blocks that sequences are given."""
        return self._blocks

    @property
    def num_running(self) -> int:
        """Sequences that own blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for embeddings, for room, or to be computed anew."""
        return len(self._blocked) + len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether ``schedule`` may find something; not so if nothing changed since it did not."""
        return self._may_advance and bool(self._waiting or self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence.

        Raises:
            ValueError: It could outgrow the whole cache; admission must refuse such requests.
        """
        chunk_tokens = self._most_tokens_at_once(sequence)
        if not self._blocks.can_hold(sequence.max_num_tokens, chunk_tokens):
            raise ValueError(f"Sequence {sequence.seq_id} may outgrow the KV cache.")
        self._waiting.enter(sequence.origin.tenant)
        self._enqueue(sequence, SequenceStatus.WAITING)

    def release(self, sequence: Sequence) -> None:
        """Take note that an embedding of ``sequence`` has come."""
        self._may_advance = True
        if sequence.status is SequenceStatus.BLOCKED:
            del self._blocked[sequence.seq_id]
            self._enqueue(sequence, SequenceStatus.WAITING)

    def commit(self, sequence: Sequence, num_computed_tokens: int) -> None:
        """Let what was computed of ``sequence`` be found by others with the same beginning."""
        if self._limits.chunking.is_fixed:
            # Outputs were computed one by one; as part of a prompt they would not be.
            num_computed_tokens = min(num_computed_tokens, sequence.num_prompt_tokens)
        self._blocks.commit(sequence, num_computed_tokens)

    def note_computed(self, step: ScheduledStep, seconds: float) -> None:
        """Take note that the tokens of ``step`` are known; ``seconds`` is 0 if it failed."""
        self._may_advance = True
        if seconds:
            self._cost.observe(step.num_decode_tokens, step.num_prefill_tokens, seconds)

    def remove(self, sequence: Sequence) -> None:
        """Take ``sequence`` out of its queue and free its blocks at once."""
        match sequence.status:
            case SequenceStatus.BLOCKED:
                del self._blocked[sequence.seq_id]
            case SequenceStatus.WAITING | SequenceStatus.PREEMPTED:
                self._waiting.remove(sequence)
            case SequenceStatus.RUNNING:
                self._running.remove(sequence)
            case SequenceStatus.FINISHED:
                raise ValueError(f"Sequence {sequence.seq_id} is finished already.")
        self._waiting.leave(sequence.origin.tenant)
        self._blocks.free(sequence)
        sequence.status = SequenceStatus.FINISHED
        self._may_advance = True

    def schedule(self) -> ScheduledStep:
        """Choose the sequences of the next step, allocate their blocks and count their tokens.

        Returns:
            The step; empty if nothing can run now.
        """
        draft = _StepDraft(self._limits.max_step_tokens)
        self._blocks.trim(self._running)
        self._schedule_decodes(draft)
        draft.prefill_budget = self._cost.max_prefill_tokens(len(draft.decodes))
        self._schedule_chunks(draft)
        # What was just preempted must not take its blocks back from those it made room for.
        if not draft.num_preemptions:
            self._schedule_waiting(draft)
        self._may_advance = not draft.is_empty or draft.num_preemptions > 0
        return draft.finish()

    def check_invariants(self) -> None:
        """Verify the invariants of the class and of its blocks.

        Raises:
            AssertionError: One of them does not hold.
        """
        blocked, waiting = list(self._blocked.values()), list(self._waiting)
        assert all(sequence.status is SequenceStatus.BLOCKED for sequence in blocked)
        queued = (SequenceStatus.WAITING, SequenceStatus.PREEMPTED)
        assert all(sequence.status in queued for sequence in waiting)
        assert all(sequence.status is SequenceStatus.RUNNING for sequence in self._running)
        everyone = [*blocked, *waiting, *self._running]
        ids = [sequence.seq_id for sequence in everyone]
        assert len(ids) == len(set(ids)), "a sequence is in two queues"
        ranks = [rank(sequence) for sequence in self._running]
        assert ranks == sorted(ranks), "the running sequences are not in order"
        for sequence in (*blocked, *waiting):
            tables = sequence.tables.values()
            assert not any(table.blocks for table in tables), "blocks of one that does not run"
        self._blocks.check_invariants(everyone)

    def _schedule_decodes(self, draft: _StepDraft) -> None:
        index = 0
        # Preemption shortens the list from its end, behind the sequences scheduled already.
        while index < len(self._running):
            sequence = self._running[index]
            if not sequence.is_decoding or sequence.will_be_full:
                index += 1
            elif self._blocks.can_grow(sequence, 1):
                draft.decodes.append(self._take(draft, sequence, 1))
                index += 1
            else:
                self._preempt_last(draft)

    def _schedule_chunks(self, draft: _StepDraft) -> None:
        """Go on with the prompts that are computed in part."""
        for sequence in tuple(self._running):
            is_ours = sequence.status is SequenceStatus.RUNNING and not sequence.is_decoding
            if not is_ours or sequence.will_be_full:
                continue
            self._skip_cached(draft, sequence)
            num_tokens = self._count_chunk(draft, sequence, sequence.num_scheduled_tokens)
            if num_tokens and self._make_room(draft, sequence, num_tokens):
                self._add_prefill(draft, sequence, num_tokens)
            elif num_tokens:
                draft.starved = draft.starved or sequence

    def _schedule_waiting(self, draft: _StepDraft) -> None:
        while draft.budget > 0 or draft.is_empty:
            sequence = self._waiting.peek()
            # Who lacks room would never get any if those behind it took all that becomes free.
            if not sequence or (draft.starved and rank(sequence) > rank(draft.starved)):
                return
            prefix = self._find_prefix(sequence)
            num_tokens = self._count_chunk(draft, sequence, prefix.num_tokens)
            if self._limits.chunking.is_early(sequence, prefix.num_tokens, draft.is_empty):
                self._block(sequence)
            elif num_tokens and self._can_start(sequence, prefix):
                self._start(draft, sequence, prefix)
                self._add_prefill(draft, sequence, num_tokens)
            elif not num_tokens or not self._preempt_stalled(draft):
                return

    def _find_prefix(self, sequence: Sequence) -> Prefix:
        """Return the cached beginning of ``sequence`` that may be used."""
        # At least one token is computed: its logits are needed. All, if the prompt is scored.
        most = min(sequence.num_ready_tokens, sequence.num_total_tokens - 1)
        prefix = self._blocks.find_prefix(sequence, 0 if sequence.scores_prompt else most)
        while (aligned := self._align(sequence, prefix)) < prefix.num_tokens:
            prefix = self._blocks.find_prefix(sequence, aligned)
        return prefix

    def _align(self, sequence: Sequence, prefix: Prefix) -> int:
        return self._limits.chunking.align_prefix(sequence, prefix.num_tokens)

    def _skip_cached(self, draft: _StepDraft, sequence: Sequence) -> None:
        """Go on behind what others have computed of the same prompt since the last chunk."""
        if sequence.num_pending_tokens:
            return
        prefix = self._find_prefix(sequence)
        if prefix.num_tokens > sequence.num_scheduled_tokens:
            self._share(draft, sequence, prefix)

    def _start(self, draft: _StepDraft, sequence: Sequence, prefix: Prefix) -> None:
        self._waiting.remove(sequence)
        if not sequence.num_preemptions:
            draft.num_queried_tokens += sequence.num_prompt_tokens
        if prefix.num_tokens:
            self._share(draft, sequence, prefix)
        self._run(sequence)

    def _share(self, draft: _StepDraft, sequence: Sequence, prefix: Prefix) -> None:
        self._blocks.share_prefix(sequence, prefix)
        num_gained = prefix.num_tokens - sequence.num_scheduled_tokens
        sequence.num_scheduled_tokens = prefix.num_tokens
        if not sequence.num_preemptions:
            sequence.num_cached_tokens += num_gained
            draft.num_cached_tokens += num_gained

    def _run(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.RUNNING
        bisect.insort(self._running, sequence, key=rank)

    def _count_chunk(self, draft: _StepDraft, sequence: Sequence, start: int) -> int:
        # The newest token of a preempted sequence may not be known yet; it is decoded, not part
        # of a chunk.
        chunking = self._limits.chunking
        if sequence.num_pending_tokens or chunking.is_early(sequence, start, draft.is_empty):
            return 0
        budget = max(0, min(draft.budget, draft.prefill_budget))
        num_tokens = chunking.count_tokens(sequence, start, budget, draft.is_empty)
        if num_tokens or draft.prefills:
            return num_tokens
        # A piece that cannot be cut makes the step longer; it would otherwise wait for ever.
        num_tokens = chunking.count_tokens(sequence, start, budget, is_first=True)
        limits = self._limits
        never_fits = num_tokens > limits.max_step_tokens - limits.max_running_sequences
        return num_tokens if num_tokens <= draft.budget or never_fits else 0

    def _add_prefill(self, draft: _StepDraft, sequence: Sequence, num_tokens: int) -> None:
        item = self._take(draft, sequence, num_tokens)
        draft.prefills.append(item)
        draft.prefill_budget -= num_tokens
        if item.samples and sequence.forks:
            self._fork(draft, sequence)

    def _take(self, draft: _StepDraft, sequence: Sequence, num_tokens: int) -> ScheduledSequence:
        """Allocate and count the next ``num_tokens`` tokens of a running sequence."""
        draft.block_copies += self._blocks.grow(sequence, num_tokens)
        start = sequence.num_scheduled_tokens
        sequence.num_scheduled_tokens += num_tokens
        samples = sequence.num_scheduled_tokens == sequence.num_total_tokens
        sequence.num_pending_tokens += samples
        draft.budget -= num_tokens
        item = ScheduledSequence(sequence, start, num_tokens, samples, sequence.num_preemptions)
        self._waiting.charge(item)
        return item

    def _fork(self, draft: _StepDraft, parent: Sequence) -> None:
        """Let the forks of ``parent``, whose prompt this step completes, run on its blocks."""
        forks, parent.forks = parent.forks, ()
        for child in forks:
            self._waiting.enter(child.origin.tenant)
            if len(self._running) >= self._limits.max_running_sequences:
                # It begins alone, later; the prefix cache has most of its prompt.
                self._enqueue(child, SequenceStatus.WAITING)
                continue
            self._blocks.fork(parent, child)
            child.num_scheduled_tokens = parent.num_scheduled_tokens
            child.num_cached_tokens = parent.num_cached_tokens
            child.num_pending_tokens = 1
            self._run(child)
            item = ScheduledSequence(child, child.num_scheduled_tokens, 0, forked_from=parent)
            draft.prefills.append(item)

    def _make_room(self, draft: _StepDraft, sequence: Sequence, num_tokens: int) -> bool:
        """Preempt those behind ``sequence`` in rank until it can grow; tell whether it can."""
        while not self._blocks.can_grow(sequence, num_tokens):
            if self._running[-1] is sequence or draft.has(self._running[-1]):
                return False
            self._preempt_last(draft)
        return True

    def _can_start(self, sequence: Sequence, prefix: Prefix) -> bool:
        if len(self._running) >= self._limits.max_running_sequences:
            return False
        # Each running sequence will soon need a block; without this reserve a new prompt would
        # be preempted as soon as it has been computed.
        chunk_tokens = self._most_tokens_at_once(sequence)
        return self._blocks.can_start(sequence, prefix, chunk_tokens, reserve=len(self._running))

    def _most_tokens_at_once(self, sequence: Sequence) -> int:
        return self._limits.chunking.most_tokens(sequence, self._limits.max_step_tokens)

    def _block(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        sequence.status = SequenceStatus.BLOCKED
        self._blocked[sequence.seq_id] = sequence

    def _preempt_stalled(self, draft: _StepDraft) -> bool:
        """Preempt the last sequence that waits for an embedding, if any does; others can run."""
        is_early = self._limits.chunking.is_early
        for sequence in reversed(self._running):
            waits = is_early(sequence, sequence.num_scheduled_tokens, draft.is_empty)
            if waits and not draft.has(sequence):
                self._preempt(draft, sequence)
                # Only the embedding helps it: with its text computed it would stall again.
                self._block(sequence)
                return True
        return False

    def _preempt_last(self, draft: _StepDraft) -> None:
        self._preempt(draft, self._running[-1])

    def _preempt(self, draft: _StepDraft, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._blocks.free(sequence)
        sequence.num_scheduled_tokens = 0
        sequence.num_preemptions += 1
        draft.num_preemptions += 1
        self._enqueue(sequence, SequenceStatus.PREEMPTED)

    def _enqueue(self, sequence: Sequence, status: SequenceStatus) -> None:
        sequence.status = status
        self._waiting.push(sequence)
        self._may_advance = True
