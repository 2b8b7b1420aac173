"""Choose the sequences of each step."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.generator.engine.sequence import Sequence, SequenceStatus

if TYPE_CHECKING:
    from chiasm.generator.engine.block_manager import BlockManager


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one step.

    Attributes:
        max_step_tokens: Token budget; at least ``max_running_sequences``, so that decode fits.
        max_running_sequences: Sequences that hold blocks at once.
    """

    max_step_tokens: int
    max_running_sequences: int

    def __post_init__(self) -> None:
        if not 1 <= self.max_running_sequences <= self.max_step_tokens:
            raise ValueError(
                f"max_running_sequences={self.max_running_sequences} must be between 1 and"
                f" max_step_tokens={self.max_step_tokens}."
            )


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """A sequence in a step: ``num_tokens`` tokens behind the ``start`` computed ones."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def is_decode(self) -> bool:
        """Whether one token is added to a computed context."""
        return self.num_tokens == 1 and self.start > 0


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """The sequences of one step, those that decode first; their blocks are allocated."""

    sequences: tuple[ScheduledSequence, ...]
    num_preemptions: int = 0

    @property
    def num_decode_tokens(self) -> int:
        """Sequences that decode."""
        return sum(scheduled.is_decode for scheduled in self.sequences)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of all others."""
        return sum(scheduled.num_tokens for scheduled in self.sequences if not scheduled.is_decode)


class Scheduler:
    """Owns the queues, in order of arrival.

    A sequence moves through these states; the queue that holds it is in brackets::

        add ──► BLOCKED [_blocked] ──release──► WAITING [_waiting] ──schedule──► RUNNING [_running]
                                               PREEMPTED [_waiting] ◄──out of blocks──┘
        remove: from any of them ──► FINISHED

    Each step takes every running sequence first (decode), then whole prompts from the front of the
    waiting queue while budget and blocks last. When a running sequence cannot grow, the youngest
    gives its blocks up and is computed anew later; the oldest therefore always advances.

    Invariants:
        1. A sequence is in exactly one queue, the one of its status.
        2. Only running sequences own blocks.
        3. ``_waiting`` and ``_running`` are sorted by ``seq_id``.
    """

    def __init__(self, blocks: BlockManager, limits: SchedulerLimits) -> None:
        self._blocks = blocks
        self._limits = limits
        self._blocked: dict[int, Sequence] = {}
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []

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
        """Whether a step would do anything."""
        return bool(self._waiting or self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; it is blocked until ``release`` if it lacks embeddings.

        Raises:
            ValueError: It could outgrow the whole cache; admission must refuse such requests.
        """
        if self._blocks.count_blocks(sequence.max_num_tokens) > self._blocks.num_blocks:
            raise ValueError(f"Sequence {sequence.seq_id} may outgrow the KV cache.")
        self._blocked[sequence.seq_id] = sequence
        if sequence.has_all_embeddings:
            self.release(sequence)

    def release(self, sequence: Sequence) -> None:
        """Let a blocked sequence wait for room: all its embeddings are there."""
        del self._blocked[sequence.seq_id]
        self._enqueue(sequence, SequenceStatus.WAITING)

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
        self._blocks.free(sequence)
        sequence.status = SequenceStatus.FINISHED

    def schedule(self) -> ScheduledStep:
        """Choose the sequences of the next step and allocate their blocks.

        Returns:
            The step; empty if nothing can run now.
        """
        decodes, num_preemptions = self._schedule_decodes()
        prefills: list[ScheduledSequence] = []
        # What was just preempted must not take its blocks back from those it made room for.
        if not num_preemptions:
            prefills = self._schedule_prefills(self._limits.max_step_tokens - len(decodes))
        return ScheduledStep((*decodes, *prefills), num_preemptions)

    def check_invariants(self) -> None:
        """Verify the invariants of the class and of its blocks.

        Raises:
            AssertionError: One of them does not hold.
        """
        expected = {
            SequenceStatus.BLOCKED: list(self._blocked.values()),
            SequenceStatus.RUNNING: self._running,
        }
        for status, sequences in expected.items():
            assert all(sequence.status is status for sequence in sequences), status
        queued = (SequenceStatus.WAITING, SequenceStatus.PREEMPTED)
        assert all(sequence.status in queued for sequence in self._waiting)
        for queue in (self._waiting, self._running):
            ids = [sequence.seq_id for sequence in queue]
            assert ids == sorted(set(ids)), "a queue is not in order of arrival"
        for sequence in (*self._blocked.values(), *self._waiting):
            assert not sequence.block_table, "a sequence that does not run owns blocks"
        self._blocks.check_invariants([*self._blocked.values(), *self._waiting, *self._running])

    def _schedule_decodes(self) -> tuple[list[ScheduledSequence], int]:
        scheduled: list[ScheduledSequence] = []
        num_preemptions = 0
        # Preemption shortens the queue from its end, behind the sequences scheduled already.
        while len(scheduled) < len(self._running):
            sequence = self._running[len(scheduled)]
            if self._blocks.can_grow(sequence, 1):
                self._blocks.grow(sequence, 1)
                scheduled.append(ScheduledSequence(sequence, sequence.num_computed_tokens, 1))
            else:
                self._preempt(self._running.pop())
                num_preemptions += 1
        return scheduled, num_preemptions

    def _schedule_prefills(self, budget: int) -> list[ScheduledSequence]:
        scheduled: list[ScheduledSequence] = []
        while self._waiting and len(self._running) < self._limits.max_running_sequences:
            sequence = self._waiting[0]
            num_tokens = sequence.num_tokens
            # Prompts are computed whole. The first of a step may exceed the budget: it would
            # otherwise wait for ever behind those that decode.
            if (scheduled and num_tokens > budget) or not self._has_room(num_tokens):
                break
            del self._waiting[0]
            self._blocks.grow(sequence, num_tokens)
            sequence.status = SequenceStatus.RUNNING
            bisect.insort(self._running, sequence, key=_arrival)
            scheduled.append(ScheduledSequence(sequence, 0, num_tokens))
            budget -= num_tokens
        return scheduled

    def _has_room(self, num_tokens: int) -> bool:
        # Each running sequence will soon need a block; without this reserve a new prompt would
        # be preempted as soon as it has been computed.
        reserve = len(self._running)
        needed = self._blocks.count_blocks(num_tokens)
        return needed + reserve <= self._blocks.num_free_blocks

    def _preempt(self, sequence: Sequence) -> None:
        self._blocks.free(sequence)
        sequence.num_computed_tokens = 0
        self._enqueue(sequence, SequenceStatus.PREEMPTED)

    def _enqueue(self, sequence: Sequence, status: SequenceStatus) -> None:
        sequence.status = status
        bisect.insort(self._waiting, sequence, key=_arrival)


def _arrival(sequence: Sequence) -> int:
    return sequence.seq_id
