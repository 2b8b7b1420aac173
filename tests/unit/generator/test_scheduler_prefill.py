"""How far prompts get in a step beside streams."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from chiasm.common.media import MediaSpan
from chiasm.generator.engine.sampling_params import SamplingParams
from chiasm.generator.engine.sequence import Origin, Sequence
from tests.fakes.embeddings import make_layout, make_ref
from tests.fakes.generator_engine import make_prompt, make_sequence
from tests.harness.scheduling import chunks_of, compute, make_scheduler

if TYPE_CHECKING:
    from chiasm.generator.engine.scheduler import Scheduler


def test_prompts_beside_a_stream_are_computed_in_chunks_that_fit_the_time() -> None:
    scheduler = make_scheduler(num_blocks=100, max_step_tokens=200, max_step_s=30.0)
    scheduler.add(make_sequence(1, range(1, 101), max_tokens=20))
    # A second for each prompt token, ten for the stream.
    compute(scheduler, scheduler.schedule(), seconds=100.0)
    compute(scheduler, scheduler.schedule(), seconds=10.0)
    for seq_id, num_tokens in ((2, 50), (3, 5)):
        scheduler.add(make_sequence(seq_id, range(200 * seq_id, 200 * seq_id + num_tokens)))

    steps = []
    for _ in range(4):
        step = scheduler.schedule()
        steps.append(chunks_of(step))
        compute(scheduler, step, seconds=10.0 + step.num_prefill_tokens)

    assert [chunks[1:] for chunks in steps] == [
        [(2, 0, 20)],
        [(2, 20, 20)],
        [(2, 40, 10), (3, 0, 5)],
        [(2, 50, 1), (3, 5, 1)],
    ]


def test_a_span_that_cannot_be_cut_is_computed_beside_a_stream_all_the_same() -> None:
    scheduler = make_scheduler(num_blocks=100, max_step_tokens=200, max_step_s=20.0)
    scheduler.add(make_sequence(1, range(1, 101), max_tokens=20))
    compute(scheduler, scheduler.schedule(), seconds=100.0)
    compute(scheduler, scheduler.schedule(), seconds=10.0)
    ref = make_ref(num_rows=40)
    layout = replace(make_layout(ref), attends_both_ways=True)
    span = MediaSpan(2, ref, layout, is_ready=True)
    prompt = make_prompt(range(200, 206 + layout.num_tokens), (span,))
    sequence = Sequence(2, prompt, SamplingParams(4))
    sequence.embeddings[0] = torch.zeros(40, 1)
    scheduler.add(sequence)

    num_scheduled = []
    for _ in range(3):
        step = scheduler.schedule()
        num_scheduled.append(step.num_prefill_tokens)
        compute(scheduler, step, seconds=10.0 + step.num_prefill_tokens)

    assert num_scheduled == [3, 40, 5]


def test_a_span_larger_than_a_step_is_computed_beside_a_stream_too() -> None:
    scheduler = make_scheduler(num_blocks=100, max_running=2, max_step_tokens=16)
    scheduler.add(make_sequence(1, range(1, 5), max_tokens=20))
    compute(scheduler, scheduler.schedule())
    ref = make_ref(num_rows=40)
    layout = replace(make_layout(ref), attends_both_ways=True)
    prompt = make_prompt(range(200, 242), (MediaSpan(0, ref, layout, is_ready=True),))
    sequence = Sequence(2, prompt, SamplingParams(4))
    sequence.embeddings[0] = torch.zeros(40, 1)
    scheduler.add(sequence)

    steps = [scheduler.schedule() for _ in range(3)]

    assert [chunks_of(step)[1:] for step in steps] == [[(2, 0, 1)], [(2, 1, 40)], [(2, 41, 1)]]


def _with_spans(seq_id: int, *offsets: int, num_tokens: int = 20) -> Sequence:
    """Return a sequence with spans of four tokens whose embeddings are not there."""
    refs = [make_ref(num_rows=2, seed=offset) for offset in offsets]
    spans = [
        MediaSpan(offset, ref, make_layout(ref), is_ready=False)
        for offset, ref in zip(offsets, refs, strict=True)
    ]
    prompt = make_prompt(range(1, num_tokens + 1), tuple(spans))
    return Sequence(seq_id, prompt, SamplingParams(4))


def _bring(scheduler: Scheduler, sequence: Sequence, index: int) -> None:
    sequence.embeddings[index] = torch.zeros(2, 1)
    scheduler.release(sequence)


@pytest.mark.parametrize(("offset", "early"), [(5, []), (6, [(1, 0, 6)])])
def test_text_before_a_missing_embedding_is_worth_a_step_if_it_is_long_enough(
    offset: int, early: list[tuple[int, int, int]]
) -> None:
    scheduler = make_scheduler(max_step_tokens=32, min_early_tokens=6)
    sequence = _with_spans(1, offset)
    scheduler.add(sequence)

    assert chunks_of(scheduler.schedule()) == early
    assert chunks_of(scheduler.schedule()) == []
    assert not scheduler.has_work
    _bring(scheduler, sequence, 0)

    start = len(early) * offset
    assert chunks_of(scheduler.schedule()) == [(1, start, 20 - start)]


def test_short_text_before_a_missing_embedding_goes_along_with_a_stream() -> None:
    scheduler = make_scheduler(max_step_tokens=32, min_early_tokens=6)
    scheduler.add(make_sequence(1, [100, 101], max_tokens=20))
    compute(scheduler, scheduler.schedule())
    scheduler.add(_with_spans(2, 5))

    assert chunks_of(scheduler.schedule()) == [(1, 2, 1), (2, 0, 5)]


def test_short_text_between_two_pictures_waits_for_the_second() -> None:
    scheduler = make_scheduler(max_step_tokens=32, min_early_tokens=6)
    sequence = _with_spans(1, 6, 11)
    scheduler.add(sequence)
    compute(scheduler, scheduler.schedule())

    _bring(scheduler, sequence, 0)
    assert chunks_of(scheduler.schedule()) == []
    _bring(scheduler, sequence, 1)

    assert chunks_of(scheduler.schedule()) == [(1, 6, 14)]


def test_sequence_that_waits_with_short_text_gives_its_place_to_one_that_can_run() -> None:
    scheduler = make_scheduler(max_running=1, max_step_tokens=32, min_early_tokens=6)
    sequence = _with_spans(1, 6, 11)
    scheduler.add(sequence)
    compute(scheduler, scheduler.schedule())
    _bring(scheduler, sequence, 0)
    scheduler.add(make_sequence(2, [100, 101]))

    step = scheduler.schedule()

    assert chunks_of(step) == [(2, 0, 2)]
    assert step.num_preemptions == 1


def test_prompt_that_lacks_room_for_its_next_chunk_is_not_passed_for_ever() -> None:
    scheduler = make_scheduler(num_blocks=24, max_running=16, max_step_tokens=64)
    long = _with_spans(1, 4, num_tokens=72)
    scheduler.add(long)
    ids = itertools.count(2)
    others: list[Sequence] = []

    for step in range(50):
        # There are always some that came later and need little.
        while scheduler.num_waiting < 3:
            seq_id = next(ids)
            tokens = range(100 * seq_id, 100 * seq_id + 7)
            others.append(make_sequence(seq_id, tokens, max_tokens=4 + seq_id % 3))
            scheduler.add(others[-1])
        if step == 2:
            _bring(scheduler, long, 0)
        compute(scheduler, scheduler.schedule())
        for one in [one for one in others if one.num_output_tokens >= one.sampling.max_tokens]:
            scheduler.remove(one)
            others.remove(one)
        if long.num_output_tokens:
            break

    # The picture finds 13 of the 17 blocks that are still needed.
    assert step < 10


@pytest.mark.parametrize(("priority", "starts"), [(0, False), (-1, True)])
def test_while_a_running_prompt_lacks_room_only_who_is_before_it_in_rank_starts(
    priority: int, starts: bool
) -> None:
    scheduler = make_scheduler(num_blocks=9, max_step_tokens=64)
    first = make_sequence(1, range(100, 112), max_tokens=8)
    second = _with_spans(2, 4, num_tokens=24)
    for sequence in (first, second):
        scheduler.add(sequence)
    compute(scheduler, scheduler.schedule())
    _bring(scheduler, second, 0)
    origin = Origin(priority=priority)
    scheduler.add(Sequence(3, make_prompt([1, 2]), SamplingParams(4), origin))

    step = scheduler.schedule()

    assert [start for seq_id, start, _ in chunks_of(step) if seq_id == 3] == [0] * starts
