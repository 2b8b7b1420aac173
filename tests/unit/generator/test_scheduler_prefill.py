"""How far prompts get in a step beside streams."""

from __future__ import annotations

from dataclasses import replace

import torch

from chiasm.common.media import MediaSpan
from chiasm.generator.engine.sampling_params import SamplingParams
from chiasm.generator.engine.sequence import Sequence
from tests.fakes.embeddings import make_layout, make_ref
from tests.fakes.generator_engine import make_prompt, make_sequence
from tests.harness.scheduling import chunks_of, compute, make_scheduler


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
