"""Compiled attention of chunks of prompts against torch."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chiasm.kernels.cache_kernels import PrefillRule
from tests.fakes.attention_cases import Chunk, PrefillCase, make_prefill_case

if TYPE_CHECKING:
    from chiasm.kernels.cpu.native import CpuKernels

# In bfloat16 the weights are rounded too, with its dot products.
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-2, 2e-2)}


def assert_close(output: torch.Tensor, expected: torch.Tensor) -> None:
    rtol, atol = TOLERANCES[output.dtype]
    torch.testing.assert_close(output, expected, rtol=rtol, atol=atol)


@st.composite
def _chunks(draw: st.DrawFn) -> Chunk:
    end = draw(st.integers(1, 300))
    return Chunk(draw(st.integers(0, end - 1)), end, draw(st.sampled_from([0, 1, 7, 64, 1000])))


@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    chunks=st.lists(_chunks(), min_size=1, max_size=3),
    num_kv_heads=st.integers(1, 2),
    group=st.integers(1, 8),
    head_dim=st.sampled_from([1, 3, 16, 33, 64, 72, 80, 96, 128, 256]),
    block_size=st.sampled_from([1, 3, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    softcap=st.sampled_from([0.0, 2.0, 50.0]),
)
def test_paged_prefill_equals_torch(
    kernels: CpuKernels,
    chunks: list[Chunk],
    num_kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    softcap: float,
) -> None:
    heads = (num_kv_heads * group, num_kv_heads, head_dim)
    case = make_prefill_case(chunks, heads, block_size, dtype)
    rule = PrefillRule(block_size, head_dim**-0.5, softcap)

    assert_close(case.run(kernels, rule), case.attend_exactly(rule))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_rows_that_see_what_is_behind_them_equal_torch(
    kernels: CpuKernels, dtype: torch.dtype
) -> None:
    case = make_prefill_case([Chunk(0, 150), Chunk(30, 100)], dtype=dtype)
    case.seen[40:90, 1] = 90
    case.seen[200:, 0] = 61
    rule = PrefillRule(16, 0.125)

    assert_close(case.run(kernels, rule), case.attend_exactly(rule))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("head_dim", [33, 80])
def test_slots_that_lie_apart_equal_torch(
    kernels: CpuKernels, dtype: torch.dtype, head_dim: int
) -> None:
    lengths, num_heads = torch.tensor([200, 64, 31, 1]), 3
    starts = lengths.cumsum(0) - lengths
    generator = torch.Generator().manual_seed(head_dim)
    # As the projection of a tower: every row holds queries, keys and values.
    heads = torch.randn(296, 3, num_heads, head_dim, generator=generator).to(dtype)
    query, keys, values = heads.unbind(1)
    tables = (starts[:, None] + torch.arange(200)).clamp(max=295)
    ends = lengths.repeat_interleave(lengths)
    seen = torch.stack((torch.zeros_like(ends), ends), dim=1)
    bounds = torch.stack((starts, lengths), dim=1)
    case = PrefillCase(query, keys, values, tables, bounds, seen)
    rule = PrefillRule(1, head_dim**-0.5)

    assert_close(case.run(kernels, rule), case.attend_exactly(rule))


# Tiles have 16 rows, of which two are multiplied at once; the context is cut into parts of 256.
@pytest.mark.parametrize("head_dim", [8, 40, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 31, 33])
def test_rows_that_do_not_fill_tiles_equal_torch(
    kernels: CpuKernels, num_rows: int, head_dim: int
) -> None:
    chunks = [Chunk(end - num_rows, end) for end in (num_rows, 255, 256, 257, 256 + num_rows)]
    case = make_prefill_case(chunks, (1, 1, head_dim), dtype=torch.bfloat16)
    rule = PrefillRule(16, head_dim**-0.5)

    assert_close(case.run(kernels, rule), case.attend_exactly(rule))


@pytest.mark.parametrize("first", [0, 31, 32, 255, 256, 300])
@pytest.mark.parametrize("last", [301, 511, 512, 513])
def test_ranges_around_the_edges_of_parts_equal_torch(
    kernels: CpuKernels, first: int, last: int
) -> None:
    case = make_prefill_case([Chunk(0, 513)], (2, 1, 40), dtype=torch.bfloat16)
    case.seen[40:, 0], case.seen[40:, 1] = first, last
    rule = PrefillRule(16, 40**-0.5)

    assert_close(case.run(kernels, rule), case.attend_exactly(rule))


@pytest.mark.parametrize("scale", [-0.125, 0.0])
def test_scores_that_fall_with_the_product_equal_torch(kernels: CpuKernels, scale: float) -> None:
    case = make_prefill_case([Chunk(0, 70), Chunk(200, 300, 20)], dtype=torch.bfloat16)
    rule = PrefillRule(16, scale)

    assert_close(case.run(kernels, rule), case.attend_exactly(rule))


def test_query_that_is_no_number_spoils_its_own_row_alone(kernels: CpuKernels) -> None:
    case = make_prefill_case([Chunk(0, 300)], dtype=torch.bfloat16)
    rule = PrefillRule(16, 0.125)
    expected = case.run(kernels, rule)
    case.query[290, 1] = float("nan")

    output = case.run(kernels, rule)

    assert output[290, 1].isnan().all()
    output[290, 1] = expected[290, 1]
    assert torch.equal(output, expected)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_torch_and_attention_take_turns_on_the_same_threads(
    kernels: CpuKernels, num_threads: int
) -> None:
    case = make_prefill_case([Chunk(0, 300)], dtype=torch.bfloat16)
    rule = PrefillRule(16, 0.125)
    left, right = (torch.randn(256, 256).to(torch.bfloat16) for _ in range(2))
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        product, attended = left @ right, case.run(kernels, rule)
        turns = [(left @ right, case.run(kernels, rule)) for _ in range(5)]
    finally:
        torch.set_num_threads(before)

    torch.testing.assert_close(product.float(), left.float() @ right.float(), rtol=1e-2, atol=0.2)
    assert_close(attended, case.attend_exactly(rule))
    for one, other in turns:
        assert torch.equal(one, product)
        assert torch.equal(other, attended)


def test_slots_of_keys_that_lie_otherwise_than_those_of_values_are_refused(
    kernels: CpuKernels,
) -> None:
    case = make_prefill_case([Chunk(0, 20)])
    apart = case.values.new_zeros(len(case.values), 2, 2, 64)[:, 0]
    turned = case.keys.transpose(0, 1).contiguous().transpose(0, 1)

    with pytest.raises(AssertionError):
        replace(case, values=apart).run(kernels, PrefillRule(16, 1.0))
    with pytest.raises(AssertionError):
        replace(case, keys=turned, values=turned).run(kernels, PrefillRule(16, 1.0))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_row_is_the_same_to_the_bit_in_any_batch_and_with_any_threads(
    kernels: CpuKernels, dtype: torch.dtype, num_threads: int
) -> None:
    chunks = [Chunk(0, 300), Chunk(5, 6), Chunk(130, 290, 40), Chunk(0, 64), Chunk(64, 129)]
    case = make_prefill_case(chunks, dtype=dtype)
    rule = PrefillRule(16, 0.125)
    together = case.run(kernels, rule)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        alone = [case.run(kernels, rule, slice(index, index + 1)) for index in range(len(chunks))]
    finally:
        torch.set_num_threads(before)

    for output, rows in zip(alone, case.rows(), strict=True):
        assert torch.equal(output[rows], together[rows])
        output[rows] = float("nan")
        assert output.isnan().all()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("cuts", [(64, 128), (256, 512), (1, 5, 77, 199, 255, 257, 300)])
@pytest.mark.parametrize("window", [0, 50])
def test_row_is_the_same_to_the_bit_however_a_prompt_is_cut(
    kernels: CpuKernels, dtype: torch.dtype, cuts: tuple[int, ...], window: int
) -> None:
    case = make_prefill_case([Chunk(0, 550, window)], dtype=dtype)
    rule = PrefillRule(16, 0.125)
    whole = case.run(kernels, rule)
    output = torch.empty_like(whole)

    for start, end in itertools.pairwise((0, *cuts, 550)):
        contexts = (torch.tensor([[start, end - start]]), case.tables, case.seen)
        cached = (case.keys, case.values)
        kernels.paged_prefill(case.query, cached, contexts, rule, output)

    assert torch.equal(output, whole)


@pytest.mark.parametrize("factor", [1e-3, 100.0, 1e4])
def test_scores_of_any_size_give_finite_outputs(kernels: CpuKernels, factor: float) -> None:
    case = make_prefill_case([Chunk(0, 100), Chunk(90, 200, 20)])
    rule = PrefillRule(16, factor)

    output = case.run(kernels, rule)

    assert output.isfinite().all()
    torch.testing.assert_close(output, case.attend_exactly(rule), rtol=1e-3, atol=1e-3)


def test_no_chunks_write_nothing(kernels: CpuKernels) -> None:
    case = make_prefill_case([Chunk(0, 5)])

    assert case.run(kernels, PrefillRule(16, 1.0), slice(0, 0)).isnan().all()
