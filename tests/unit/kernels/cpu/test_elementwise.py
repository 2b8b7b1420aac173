"""The compiled kernels between matrix products against torch's operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import gelu, silu

from chiasm.common.rms_norm import RMSNorm
from chiasm.generator.model.fused.rotary import Rotation, make_rotation, rotate
from chiasm.kernels.cpu.elementwise import GateRule, NormRule, PairRule, RopeRule

if TYPE_CHECKING:
    from chiasm.kernels.cpu.native import CpuKernels

DTYPES = (torch.float32, torch.bfloat16)
# Of rows and of weights; families that round once have float32 weights.
DTYPE_PAIRS = (*zip(DTYPES, DTYPES, strict=True), (torch.bfloat16, torch.float32))
WIDTHS = (1, 3, 8, 16, 33, 64, 80, 130, 896)
# Some roundings of float32.
FLOAT32_TOLERANCE = 2e-6
# One rounding to 8 bits may go the other way where float32 sums differ.
BFLOAT16_TOLERANCE = 2**-7
# What exponentials may overflow for.
ENDS = torch.tensor([-3e38, -1e4, -100.0, -86.0, -0.0, 0.0, 86.0, 100.0, 1e4, 3e38, torch.nan])
# Rows that are computed by several threads; see kParallelElements.
NUM_LARGE = 80

examples = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
rows_and_seeds = (st.integers(0, 5), st.integers(0, 1 << 30))


def _random(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3.0 * torch.randn(shape, generator=generator)).to(dtype)


def _assert_close(output: torch.Tensor, expected: torch.Tensor, atol: float = 1e-30) -> None:
    assert output.dtype == expected.dtype
    if output.dtype is torch.float32:
        tolerance = FLOAT32_TOLERANCE
        torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
        return
    torch.testing.assert_close(output, expected, rtol=BFLOAT16_TOLERANCE, atol=atol)
    assert int((output != expected).sum()) <= max(1, output.numel() // 500)


@examples
@given(
    rows_and_seeds[0],
    rows_and_seeds[1],
    st.sampled_from(WIDTHS),
    st.sampled_from(DTYPE_PAIRS),
    st.sampled_from([None, 1.0, 0.22]),
)
def test_add_rms_norm_equals_torch(
    kernels: CpuKernels,
    num_rows: int,
    seed: int,
    width: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    scale: float | None,
) -> None:
    dtype, weight_dtype = dtypes
    weight = _random(seed, width, dtype=weight_dtype)
    hidden = _random(seed + 1, num_rows, width, dtype=dtype)
    addend = None if scale is None else _random(seed + 2, num_rows, width, dtype=dtype)
    total = hidden.clone() if addend is None else _add(hidden, addend, scale or 1.0)
    expected = RMSNorm(weight, 1e-5)(total)

    rule = NormRule(weight, 1e-5, dtype, scale or 1.0)
    normed = kernels.elementwise.add_rms_norm(rule, hidden, addend)

    _assert_close(hidden, total)
    _assert_close(normed, expected)


def _add(hidden: torch.Tensor, addend: torch.Tensor, scale: float) -> torch.Tensor:
    """Add as torch adds vectors; what is left over of a row, it rounds once more."""
    rounded = float(torch.tensor(scale, dtype=hidden.dtype))
    return torch.add(hidden.float(), addend.float(), alpha=rounded).to(hidden.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_zeros_and_of_huge_values_have_finite_norms(
    kernels: CpuKernels, dtype: torch.dtype
) -> None:
    hidden = torch.stack([torch.zeros(40), torch.full((40,), 1e18)]).to(dtype)
    rule = NormRule(torch.ones(40, dtype=dtype), 1e-6, dtype)

    normed = kernels.elementwise.add_rms_norm(rule, hidden, None)

    torch.testing.assert_close(normed, torch.tensor([[0.0], [1.0]], dtype=dtype).expand(2, 40))


@examples
@given(rows_and_seeds[0], rows_and_seeds[1], st.sampled_from(WIDTHS), st.sampled_from(DTYPES))
def test_gate_of_silu_equals_torch(
    kernels: CpuKernels, num_rows: int, seed: int, width: int, dtype: torch.dtype
) -> None:
    gate_up = _random(seed, num_rows, 2 * width, dtype=dtype)
    gates, ups = gate_up.chunk(2, dim=-1)

    gated = kernels.elementwise.gate(GateRule("silu", width, dtype), gate_up)

    _assert_close(gated, silu(gates).mul_(ups))


@examples
@given(rows_and_seeds[0], rows_and_seeds[1], st.sampled_from(WIDTHS), st.sampled_from(DTYPES))
def test_gate_of_gelu_equals_torch(
    kernels: CpuKernels, num_rows: int, seed: int, width: int, dtype: torch.dtype
) -> None:
    gate_up = _random(seed, num_rows, 2 * width, dtype=dtype)
    # In float64: torch's own float32 loses all digits of what is below -4.
    exact = gelu(gate_up[:, :width].double(), approximate="tanh").to(dtype)

    gated = kernels.elementwise.gate(GateRule("gelu_pytorch_tanh", width, dtype), gate_up)

    rtol = BFLOAT16_TOLERANCE if dtype is torch.bfloat16 else 1e-4
    expected = exact * gate_up[:, width:]
    torch.testing.assert_close(gated, expected, rtol=rtol, atol=FLOAT32_TOLERANCE)


@examples
@given(rows_and_seeds[0], rows_and_seeds[1], st.sampled_from(WIDTHS), st.sampled_from(DTYPES))
def test_quick_gelu_equals_torch(
    kernels: CpuKernels, num_rows: int, seed: int, width: int, dtype: torch.dtype
) -> None:
    rows = _random(seed, num_rows, width, dtype=dtype)
    expected = (rows.double() * torch.sigmoid(1.702 * rows.double())).to(dtype)

    assert kernels.elementwise.quick_gelu(rows) is rows

    _assert_close(rows, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quick_gelu_at_the_ends_of_the_range_equals_torch(
    kernels: CpuKernels, dtype: torch.dtype
) -> None:
    rows = ENDS.to(dtype)[None]
    expected = rows.float() * torch.sigmoid(1.702 * rows.float())

    kernels.elementwise.quick_gelu(rows)

    torch.testing.assert_close(rows.float(), expected, rtol=2**-8, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_at_the_ends_of_the_range_equal_torch(
    kernels: CpuKernels, activation: str, dtype: torch.dtype
) -> None:
    gates = ENDS
    gate_up = torch.cat([gates, torch.ones_like(gates)])[None].to(dtype)
    function = silu if activation == "silu" else lambda rows: gelu(rows, approximate="tanh")

    rule = GateRule("silu" if activation == "silu" else "gelu_pytorch_tanh", len(gates), dtype)
    gated = kernels.elementwise.gate(rule, gate_up)

    expected = function(gate_up[:, : len(gates)])
    torch.testing.assert_close(gated, expected, rtol=1e-6, atol=1e-30, equal_nan=True)


@examples
@given(
    rows_and_seeds[0],
    rows_and_seeds[1],
    st.sampled_from([(1, 1, 2), (3, 1, 6), (4, 2, 34), (2, 2, 64), (6, 3, 80), (2, 1, 128)]),
    st.sampled_from([1.0, 0.5]),
    st.sampled_from(DTYPE_PAIRS),
    st.booleans(),
)
def test_rope_store_equals_torch(
    kernels: CpuKernels,
    num_tokens: int,
    seed: int,
    heads: tuple[int, int, int],
    turned_part: float,
    dtypes: tuple[torch.dtype, torch.dtype],
    has_norm: bool,
) -> None:
    case = _RopeCase(seed, num_tokens, heads, turned_part, dtypes[0])
    weight = _random(seed + 1, heads[0] + heads[1], heads[2], dtype=dtypes[1])
    norm = RMSNorm(weight, 1e-6) if has_norm else None
    expected = case.reference(norm)

    case.run(kernels, RopeRule(heads, dtypes[0], (weight, 1e-6) if has_norm else None))

    placed = case.qkv.view(expected.shape)
    _assert_placed(placed, expected)
    # What is stored is what is turned, and other slots are left alone.
    key, value = placed[:, heads[0] : heads[0] + heads[1]], placed[:, heads[0] + heads[1] :]
    assert torch.equal(case.keys[case.slots], key)
    assert torch.equal(case.values[case.slots], value)
    unused = torch.ones(len(case.keys), dtype=torch.bool)
    unused[case.slots] = False
    assert case.keys[unused].isnan().all()
    assert case.values[unused].isnan().all()


@examples
@given(
    rows_and_seeds[0],
    rows_and_seeds[1],
    st.sampled_from([(1, 1, 2), (3, 2, 6), (6, 4, 34), (12, 8, 64), (6, 4, 80)]),
    st.sampled_from(DTYPES),
)
def test_turn_pairs_equals_torch(
    kernels: CpuKernels,
    num_rows: int,
    seed: int,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
) -> None:
    num_heads, num_turned, head_dim = heads
    rows = _random(seed, num_rows, num_heads * head_dim, dtype=dtype)
    angles = _random(seed + 1, num_rows, head_dim // 2, dtype=torch.float32)
    rotation = torch.polar(torch.ones_like(angles), angles)
    expected = rows.view(num_rows, num_heads, head_dim).clone()
    turned = expected[:, :num_turned]
    pairs = torch.view_as_complex(turned.double().view(*turned.shape[:2], head_dim // 2, 2))
    turned.copy_(torch.view_as_real(pairs * rotation[:, None]).flatten(-2))

    kernels.elementwise.turn_pairs(PairRule(heads, dtype), rows, rotation)

    if dtype is torch.float32:
        torch.testing.assert_close(rows.view(expected.shape), expected, rtol=1e-6, atol=1e-6)
    else:
        # What is left of two products of float32 that are almost the same is their rounding.
        _assert_close(rows.view(expected.shape), expected, atol=1e-6)


class _RopeCase:
    """Heads of new tokens, their angles, and a cache of NaN."""

    def __init__(
        self,
        seed: int,
        num_tokens: int,
        heads: tuple[int, int, int],
        turned_part: float,
        dtype: torch.dtype,
    ) -> None:
        num_q_heads, num_kv_heads, head_dim = heads
        width = (num_q_heads + 2 * num_kv_heads) * head_dim
        self.heads = heads
        self.qkv = _random(seed, num_tokens, width, dtype=dtype)
        rotary_dim = max(2, int(head_dim * turned_part) // 2 * 2)
        angles = _random(seed + 2, 1, num_tokens, rotary_dim // 2, dtype=torch.float32)
        angles = torch.cat([angles, angles], dim=-1)
        self.rotation: Rotation = make_rotation(angles.cos().to(dtype), angles.sin().to(dtype))
        cache = (num_tokens + 3, num_kv_heads, head_dim)
        self.keys, self.values = (torch.full(cache, torch.nan, dtype=dtype) for _ in range(2))
        generator = torch.Generator().manual_seed(seed)
        self.slots = torch.randperm(num_tokens + 3, generator=generator)[:num_tokens]

    def reference(self, norm: RMSNorm | None) -> torch.Tensor:
        """Return all heads as torch places them. [num_tokens, num_heads, head_dim]."""
        num_q_heads, num_kv_heads, head_dim = self.heads
        num_heads = num_q_heads + 2 * num_kv_heads
        placed = self.qkv.view(len(self.qkv), num_heads, head_dim).clone()
        turned = placed[:, : num_q_heads + num_kv_heads]
        turned[:] = rotate(turned if norm is None else norm(turned), self.rotation)
        return placed

    def run(self, kernels: CpuKernels, rule: RopeRule, rows: slice = slice(None)) -> None:
        """Place the heads of ``rows``."""
        tables = (self.rotation.cos[rows], self.rotation.sin[rows])
        cached = (self.keys, self.values)
        kernels.elementwise.rope_store(rule, self.qkv[rows], tables, self.slots[rows], cached)


def _assert_placed(placed: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare; where two products cancel, one rounding of a summand is much of the sum."""
    if placed.dtype is torch.float32:
        torch.testing.assert_close(placed, expected, rtol=1e-5, atol=1e-5)
        return
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(placed, expected, rtol=BFLOAT16_TOLERANCE, atol=largest * 2**-7)
    assert int((placed != expected).sum()) <= max(4, placed.numel() // 250)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bfloat16_heads_without_a_norm_are_turned_to_the_bit_as_by_torch(
    kernels: CpuKernels, dtype: torch.dtype
) -> None:
    case = _RopeCase(3, 50, (6, 2, 80), 1.0, dtype)
    expected = case.reference(None)

    case.run(kernels, RopeRule((6, 2, 80), dtype))

    if dtype is torch.bfloat16:
        assert torch.equal(case.qkv.view(expected.shape), expected)
    else:
        _assert_placed(case.qkv.view(expected.shape), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_row_is_the_same_to_the_bit_beside_any_rows_and_with_any_threads(
    kernels: CpuKernels, dtype: torch.dtype, num_threads: int
) -> None:
    norm = NormRule(_random(1, 515, dtype=dtype), 1e-6, dtype)
    gate = GateRule("silu", 515, dtype)
    hidden = _random(2, NUM_LARGE, 515, dtype=dtype)
    gate_up = _random(3, NUM_LARGE, 1030, dtype=dtype)
    pairs = PairRule((3, 2, 172), dtype)
    rotation = torch.randn(NUM_LARGE, 86, dtype=torch.complex64)
    turned_alone, turned = (_random(6, NUM_LARGE, 516, dtype=dtype) for _ in range(2))
    heads = (8, 2, 64)
    rope = RopeRule(heads, dtype, (_random(4, 10, 64, dtype=dtype), 1e-6))
    together, apart = (_RopeCase(5, NUM_LARGE, heads, 1.0, dtype) for _ in range(2))
    one = kernels.elementwise

    alone = [one.add_rms_norm(norm, row.clone(), None) for row in hidden[:, None]]
    gated_alone = [one.gate(gate, row) for row in gate_up[:, None]]
    for row in range(NUM_LARGE):
        rows = slice(row, row + 1)
        apart.run(kernels, rope, rows)
        one.turn_pairs(pairs, turned_alone[rows], rotation[rows])
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        normed = one.add_rms_norm(norm, hidden, None)
        gated = one.gate(gate, gate_up)
        together.run(kernels, rope)
        one.turn_pairs(pairs, turned, rotation)
    finally:
        torch.set_num_threads(before)

    assert torch.equal(normed, torch.cat(alone))
    assert torch.equal(gated, torch.cat(gated_alone))
    assert torch.equal(turned, turned_alone)
    assert torch.equal(together.qkv, apart.qkv)
    assert torch.equal(together.keys[together.slots], apart.keys[together.slots])


def test_rows_that_do_not_fit_their_rule_are_refused(kernels: CpuKernels) -> None:
    one, rule = kernels.elementwise, GateRule("silu", 8, torch.float32)

    with pytest.raises(AssertionError):
        one.gate(rule, torch.zeros(2, 16, dtype=torch.bfloat16))
    with pytest.raises(AssertionError):
        one.gate(rule, torch.zeros(2, 18))
    with pytest.raises(AssertionError):
        one.gate(rule, torch.zeros(2, 32)[:, ::2])


def test_weight_of_another_type_than_its_rows_is_refused() -> None:
    weight = torch.ones(8, dtype=torch.bfloat16)

    with pytest.raises(ValueError, match=r"float32 do not go with a weight of torch\.bfloat16"):
        NormRule(weight, 1e-6, torch.float32)
    with pytest.raises(ValueError, match="do not go with a weight"):
        RopeRule((1, 1, 4), torch.float32, (weight.view(2, 4), 1e-6))
