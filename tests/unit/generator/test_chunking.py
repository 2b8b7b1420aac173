"""Where a prefill is cut."""

from __future__ import annotations

import dataclasses

import torch

from chiasm.common.media import MediaSpan
from chiasm.generator.engine.chunking import Chunking
from chiasm.generator.engine.sampling_params import SamplingParams
from chiasm.generator.engine.sequence import Sequence
from tests.fakes.embeddings import make_layout, make_ref
from tests.fakes.generator_engine import make_prompt, make_sequence

NUM_ROWS = 6


def _with_span(offset: int, both_ways: bool, is_ready: bool = True) -> Sequence:
    """Return a sequence of 24 tokens with a span of 8; the first and the last are no rows."""
    ref = make_ref(num_rows=NUM_ROWS)
    layout = dataclasses.replace(make_layout(ref), attends_both_ways=both_ways)
    prompt = make_prompt(range(1, 25), (MediaSpan(offset, ref, layout, is_ready),))
    sequence = Sequence(1, prompt, SamplingParams(4))
    if is_ready:
        sequence.embeddings[0] = torch.zeros(NUM_ROWS, 1)
    return sequence


def test_chunk_ends_where_the_budget_ends() -> None:
    sequence = make_sequence(1, range(1, 25))

    assert Chunking().count_tokens(sequence, 0, 10, is_first=True) == 10
    assert Chunking().count_tokens(sequence, 20, 10, is_first=True) == 4
    assert Chunking().count_tokens(sequence, 0, 0, is_first=False) == 0


def test_chunk_ends_before_a_span_that_is_not_ready() -> None:
    sequence = _with_span(5, both_ways=False, is_ready=False)

    assert Chunking().count_tokens(sequence, 0, 100, is_first=True) == 5
    assert Chunking().count_tokens(sequence, 5, 100, is_first=True) == 0


def test_causal_span_may_be_cut() -> None:
    assert Chunking().count_tokens(_with_span(5, both_ways=False), 0, 8, is_first=True) == 8


def test_span_that_attends_both_ways_is_never_cut() -> None:
    sequence = _with_span(5, both_ways=True)
    chunking = Chunking()

    assert chunking.count_tokens(sequence, 0, 8, is_first=True) == 6
    assert chunking.count_tokens(sequence, 6, 4, is_first=False) == 0
    assert chunking.count_tokens(sequence, 6, 4, is_first=True) == 6
    assert chunking.count_tokens(sequence, 6, 6, is_first=False) == 6
    assert chunking.count_tokens(sequence, 6, 10, is_first=True) == 10


def test_cached_prefix_does_not_end_within_such_a_span() -> None:
    sequence = _with_span(5, both_ways=True)

    assert Chunking().align_prefix(sequence, 8) == 6
    assert Chunking().align_prefix(sequence, 12) == 12
    assert Chunking().align_prefix(sequence, 16) == 16
    assert Chunking().align_prefix(_with_span(5, both_ways=False), 8) == 8


def test_fixed_cuts_do_not_depend_on_the_budget() -> None:
    sequence = make_sequence(1, range(1, 25))
    chunking = Chunking(fixed_tokens=10)

    assert chunking.count_tokens(sequence, 0, 100, is_first=True) == 10
    assert chunking.count_tokens(sequence, 0, 4, is_first=True) == 10
    assert chunking.count_tokens(sequence, 0, 4, is_first=False) == 0
    assert chunking.count_tokens(sequence, 20, 100, is_first=True) == 4


def test_fixed_cuts_recompute_outputs_one_by_one() -> None:
    sequence = make_sequence(1, range(1, 25))
    sequence.token_ids.extend([7, 8, 9])
    chunking = Chunking(fixed_tokens=10)

    assert chunking.count_tokens(sequence, 20, 100, is_first=True) == 4
    assert chunking.count_tokens(sequence, 24, 100, is_first=True) == 1


def test_fixed_cuts_use_whole_chunks_of_a_cached_prefix() -> None:
    sequence = make_sequence(1, range(1, 25))
    sequence.token_ids.extend(range(10))

    assert Chunking(fixed_tokens=10).align_prefix(sequence, 19) == 10
    assert Chunking(fixed_tokens=10).align_prefix(sequence, 30) == 20
