"""Triton's attention of decoding sequences against exact attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chiasm.kernels.cache_kernels import DecodeRule
from tests.fakes.attention_cases import DecodeCase, make_decode_case

# Weights are rounded to the dtype of the values. The interpreter truncates to bfloat16.
TOLERANCES = {
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (2e-2, 2e-2),
}
SETTINGS = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SWEEP = settings(SETTINGS, max_examples=400)
CASES = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 150), min_size=1, max_size=3),
        "num_kv_heads": st.integers(1, 2),
        "group": st.sampled_from([1, 2, 3, 7, 17]),
        "head_dim": st.sampled_from([1, 8, 16, 64, 80, 128, 256]),
        "block_size": st.sampled_from([1, 3, 16]),
        "dtype": st.sampled_from(list(TOLERANCES)),
        "window": st.sampled_from([0, 1, 7, 40, 1000]),
        "softcap": st.sampled_from([0.0, 2.0, 50.0]),
        "num_splits": st.sampled_from([None, 1, 2, 3, 20]),
    }
)


def run(
    case: DecodeCase,
    rule: DecodeRule,
    device: str,
    num_splits: int | None = None,
    rows: slice = slice(None),
) -> torch.Tensor:
    """Attend with small tiles, so that small contexts have several."""
    from chiasm.kernels.paged_decode_attention import DecodeTiles, paged_decode_attention

    case = case.to(device)
    contexts = (case.tables[rows], case.lengths[rows])
    tiles = DecodeTiles(tile=16, min_split=16)
    output = paged_decode_attention(
        case.query[rows], case.cached, contexts, rule, num_splits, tiles
    )
    return output.cpu()


def assert_close(output: torch.Tensor, expected: torch.Tensor) -> None:
    rtol, atol = TOLERANCES[output.dtype]
    torch.testing.assert_close(output, expected, rtol=rtol, atol=atol)


def assert_exact(drawn: dict[str, object], device: str) -> None:
    """Check one drawn case."""
    lengths, dtype = drawn["lengths"], drawn["dtype"]
    num_kv_heads, group, head_dim, block_size, window = (
        int(str(drawn[name]))
        for name in ("num_kv_heads", "group", "head_dim", "block_size", "window")
    )
    assert isinstance(lengths, list)
    assert isinstance(dtype, torch.dtype)
    heads = (num_kv_heads * group, num_kv_heads, head_dim)
    case = make_decode_case(lengths, heads, block_size, dtype)
    rule = DecodeRule(block_size, head_dim**-0.5, window, float(str(drawn["softcap"])))
    num_splits = drawn["num_splits"]
    assert num_splits is None or isinstance(num_splits, int)

    output = run(case, rule, device, num_splits)

    assert output.is_contiguous()
    assert_close(output, case.attend_exactly(rule))


@SETTINGS
@given(drawn=CASES)
def test_paged_decode_is_exact(triton_device: str, drawn: dict[str, object]) -> None:
    assert_exact(drawn, triton_device)


@pytest.mark.slow
@pytest.mark.timeout(600)
@SWEEP
@given(drawn=CASES)
def test_paged_decode_is_exact_in_a_wide_sweep(
    triton_device: str, drawn: dict[str, object]
) -> None:
    assert_exact(drawn, triton_device)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_row_is_the_same_to_the_bit_in_any_batch(triton_device: str, num_splits: int) -> None:
    case = make_decode_case([70, 1, 129, 128, 30])
    rule = DecodeRule(16, 0.125)
    together = run(case, rule, triton_device, num_splits)

    alone = [run(case, rule, triton_device, num_splits, slice(row, row + 1)) for row in range(5)]

    assert torch.equal(torch.cat(alone), together)


def test_a_split_is_as_long_as_its_context_needs(triton_device: str) -> None:
    case = make_decode_case([40, 400])
    rule = DecodeRule(16, 0.125)
    wide = replace(case, tables=torch.nn.functional.pad(case.tables, (0, 100)))

    output = run(wide, rule, triton_device, 20)

    assert torch.equal(output, run(case, rule, triton_device, 20))


@pytest.mark.parametrize("num_splits", [1, 4])
def test_blocks_that_the_window_hides_are_not_read(triton_device: str, num_splits: int) -> None:
    case = make_decode_case([90, 64])
    rule = DecodeRule(16, 0.125, window=20)
    expected = case.attend_exactly(rule)
    case.tables[0, :4] = -1
    case.tables[1, :2] = -1

    assert_close(run(case, rule, triton_device, num_splits), expected)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_row_of_padding_becomes_zero(triton_device: str, num_splits: int) -> None:
    case = make_decode_case([90, 64])
    case.lengths[1] = 0

    output = run(case, DecodeRule(16, 0.125), triton_device, num_splits)

    assert not output[1].any()
    assert output[0].any()


@pytest.mark.parametrize("factor", [1e-3, 100.0, 1e4])
def test_scores_of_any_size_give_finite_outputs(triton_device: str, factor: float) -> None:
    case = make_decode_case([100, 1, 40])
    rule = DecodeRule(16, factor)

    output = run(case, rule, triton_device, 3)

    torch.testing.assert_close(output, case.attend_exactly(rule), rtol=1e-3, atol=1e-3)


def test_no_sequences_give_no_rows(triton_device: str) -> None:
    case = make_decode_case([5])

    assert run(case, DecodeRule(16, 1.0), triton_device, rows=slice(0, 0)).shape == (0, 4, 64)


def test_contexts_are_cut_until_the_device_is_busy() -> None:
    pytest.importorskip("triton")
    from chiasm.kernels.paged_decode_attention import choose_num_splits

    assert choose_num_splits(num_programs=8, num_processors=132) == 33
    assert choose_num_splits(num_programs=2, num_processors=132) == 64
    assert choose_num_splits(num_programs=512, num_processors=132) == 1


def test_tensors_that_do_not_fit_are_refused(triton_device: str) -> None:
    case = make_decode_case([5, 6])
    rule = DecodeRule(16, 1.0)

    with pytest.raises(ValueError, match="float16"):
        run(replace(case, query=case.query.half()), rule, triton_device)
    with pytest.raises(ValueError, match=r"\(2, 3, 64\)"):
        run(replace(case, query=case.query[:, :3]), rule, triton_device)
    with pytest.raises(ValueError, match="values"):
        run(replace(case, values=case.values[1:]), rule, triton_device)
    with pytest.raises(ValueError, match="1 block tables for 2"):
        run(replace(case, tables=case.tables[:1]), rule, triton_device)
