"""Triton's attention of chunks of prompts against exact attention."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chiasm.kernels.cache_kernels import PrefillRule
from tests.fakes.attention_cases import Chunk, PrefillCase, make_prefill_case

if TYPE_CHECKING:
    from collections.abc import Sequence

# Weights are rounded to the dtype of the values. The interpreter truncates to bfloat16.
TOLERANCES = {
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (2e-2, 3e-2),
}
SETTINGS = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SWEEP = settings(SETTINGS, max_examples=150)


@dataclass(frozen=True)
class _SmallTiles:
    """Kernels with small tiles, so that small chunks have several."""

    rows: int = 16

    def paged_decode(self, *_: object) -> torch.Tensor:
        raise NotImplementedError

    def paged_prefill(
        self,
        query: torch.Tensor,
        cached: tuple[torch.Tensor, torch.Tensor],
        contexts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        rule: PrefillRule,
        output: torch.Tensor,
    ) -> None:
        from chiasm.kernels.paged_prefill_attention import PrefillTiles, paged_prefill_attention

        tiles = PrefillTiles(self.rows, tile=16, num_warps=4, num_stages=1)
        paged_prefill_attention(query, cached, contexts, rule, output, tiles)


@st.composite
def _chunks(draw: st.DrawFn) -> Chunk:
    end = draw(st.integers(1, 90))
    start = draw(st.integers(max(0, end - 40), end - 1))
    return Chunk(start, end, draw(st.sampled_from([0, 1, 7, 30, 1000])))


@st.composite
def _cases(draw: st.DrawFn) -> tuple[PrefillCase, PrefillRule, int]:
    """Return chunks, some of whose rows see what is behind them, with a rule and rows of tiles."""
    num_kv_heads, group = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3, 7, 17]))
    head_dim = draw(st.sampled_from([1, 8, 16, 64, 80, 128, 256]))
    block_size = draw(st.sampled_from([1, 3, 16]))
    heads = (num_kv_heads * group, num_kv_heads, head_dim)
    chunks = draw(st.lists(_chunks(), min_size=1, max_size=3))
    dtype = draw(st.sampled_from(list(TOLERANCES)))
    case = make_prefill_case(chunks, heads, block_size, dtype)
    for chunk, rows in zip(chunks, case.rows(), strict=True):
        begin, stop = sorted(draw(st.tuples(*[st.integers(chunk.start, chunk.end)] * 2)))
        group_rows = slice(rows.start + begin - chunk.start, rows.start + stop - chunk.start)
        case.seen[group_rows, 1] = stop
    rule = PrefillRule(block_size, head_dim**-0.5, draw(st.sampled_from([0.0, 2.0, 50.0])))
    return case, rule, draw(st.sampled_from([16, 32, 64]))


def run(
    case: PrefillCase,
    rule: PrefillRule,
    device: str,
    chunks: slice = slice(None),
    rows: int = 16,
) -> torch.Tensor:
    return case.to(device).run(_SmallTiles(rows), rule, chunks).cpu()


def assert_close(output: torch.Tensor, expected: torch.Tensor) -> None:
    rtol, atol = TOLERANCES[output.dtype]
    torch.testing.assert_close(output, expected, rtol=rtol, atol=atol)


@SETTINGS
@given(drawn=_cases())
def test_paged_prefill_is_exact(
    triton_device: str, drawn: tuple[PrefillCase, PrefillRule, int]
) -> None:
    case, rule, rows = drawn

    assert_close(run(case, rule, triton_device, rows=rows), case.attend_exactly(rule))


@pytest.mark.slow
@pytest.mark.timeout(600)
@SWEEP
@given(drawn=_cases())
def test_paged_prefill_is_exact_in_a_wide_sweep(
    triton_device: str, drawn: tuple[PrefillCase, PrefillRule, int]
) -> None:
    case, rule, rows = drawn

    assert_close(run(case, rule, triton_device, rows=rows), case.attend_exactly(rule))


def test_tiles_of_the_device_are_exact(triton_device: str) -> None:
    from chiasm.kernels.triton_kernels import TritonKernels

    case = make_prefill_case([Chunk(0, 70), Chunk(200, 230, 100)])
    rule = PrefillRule(16, 0.125)

    assert_close(case.to(triton_device).run(TritonKernels(), rule).cpu(), case.attend_exactly(rule))


def test_rows_see_what_is_behind_them_in_their_range_alone(triton_device: str) -> None:
    case = make_prefill_case([Chunk(0, 60), Chunk(30, 70)])
    case.seen[10:40, 1] = 40
    case.seen[80:, 0] = 61
    case.seen[80:, 1] = 70
    rule = PrefillRule(16, 0.125)

    assert_close(run(case, rule, triton_device), case.attend_exactly(rule))


def test_rows_of_other_chunks_are_left_alone(triton_device: str) -> None:
    case = make_prefill_case([Chunk(0, 20), Chunk(5, 6), Chunk(30, 60, 10), Chunk(0, 16)])
    rule = PrefillRule(16, 0.125)
    together = run(case, rule, triton_device)

    for index, rows in enumerate(case.rows()):
        output = run(case, rule, triton_device, slice(index, index + 1))
        assert torch.equal(output[rows], together[rows])
        output[rows] = float("nan")
        assert output.isnan().all()


@pytest.mark.parametrize("cuts", [(16, 32), (1, 5, 27)])
def test_prompt_gives_the_same_however_it_is_cut(triton_device: str, cuts: Sequence[int]) -> None:
    case = make_prefill_case([Chunk(0, 50, 20)]).to(triton_device)
    rule = PrefillRule(16, 0.125)
    whole = case.run(_SmallTiles(), rule)
    output = torch.empty_like(whole)

    for start, end in itertools.pairwise((0, *cuts, 50)):
        bounds = torch.tensor([[start, end - start]], device=triton_device)
        contexts = (bounds, case.tables, case.seen)
        _SmallTiles().paged_prefill(case.query, case.cached, contexts, rule, output)

    assert_close(output.cpu(), whole.cpu())


def test_many_chunks_of_any_length_find_their_rows(triton_device: str) -> None:
    case = make_prefill_case([Chunk(0, 1 + index % 3) for index in range(20)], (2, 1, 16))
    rule = PrefillRule(16, 0.25)

    assert_close(run(case, rule, triton_device), case.attend_exactly(rule))


@pytest.mark.parametrize("factor", [1e-3, 100.0, 1e4])
def test_scores_of_any_size_give_finite_outputs(triton_device: str, factor: float) -> None:
    case = make_prefill_case([Chunk(0, 40), Chunk(30, 60, 20)])
    rule = PrefillRule(16, factor)

    output = run(case, rule, triton_device)

    torch.testing.assert_close(output, case.attend_exactly(rule), rtol=1e-3, atol=1e-3)


def test_no_chunks_write_nothing(triton_device: str) -> None:
    case = make_prefill_case([Chunk(0, 5)])

    assert run(case, PrefillRule(16, 1.0), triton_device, slice(0, 0)).isnan().all()


def test_tensors_that_do_not_fit_are_refused(triton_device: str) -> None:
    case = make_prefill_case([Chunk(0, 5)])
    rule = PrefillRule(16, 1.0)

    with pytest.raises(ValueError, match="float16"):
        run(replace(case, query=case.query.half()), rule, triton_device)
    with pytest.raises(ValueError, match="4 ranges"):
        run(replace(case, seen=case.seen[:4]), rule, triton_device)
