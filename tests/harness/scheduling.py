"""A scheduler whose forwards are made up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.generator.engine.block_group import GroupSize
from chiasm.generator.engine.block_manager import BlockManager
from chiasm.generator.engine.chunking import Chunking
from chiasm.generator.engine.scheduler import Scheduler, SchedulerLimits
from chiasm.generator.engine.sequence import SequenceStatus
from chiasm.generator.engine.step_cost import StepCost

if TYPE_CHECKING:
    from chiasm.generator.engine.scheduled_step import ScheduledStep


def make_scheduler(
    num_blocks: int = 16,
    max_running: int = 4,
    max_step_tokens: int = 16,
    max_step_s: float = 0.0,
    min_early_tokens: int = 1,
) -> Scheduler:
    chunking = Chunking(min_early_tokens=min_early_tokens)
    limits = SchedulerLimits(max_step_tokens, max_running, chunking)
    return Scheduler(BlockManager([GroupSize(num_blocks)], 4), limits, StepCost(max_step_s))


def compute(scheduler: Scheduler, step: ScheduledStep, seconds: float = 1.0) -> None:
    """Do what the engine does after a forward, with token 1."""
    for item in step.sequences:
        if item.sequence.status is SequenceStatus.FINISHED:
            continue
        if item.epoch == item.sequence.num_preemptions:
            scheduler.commit(item.sequence, item.end)
        if item.samples:
            item.sequence.num_pending_tokens -= 1
            item.sequence.token_ids.append(1)
    scheduler.note_computed(step, seconds)


def chunks_of(step: ScheduledStep) -> list[tuple[int, int, int]]:
    return [(item.sequence.seq_id, item.start, item.num_tokens) for item in step.sequences]
