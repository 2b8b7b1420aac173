"""The compiled products of 8-bit integers against the same sums in torch, to the bit."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chiasm.kernels.cpu.elementwise import ACTIVATIONS, GateRule
from chiasm.kernels.cpu.quantized_linear import MAX_INPUTS, QuantizedWeight

if TYPE_CHECKING:
    from chiasm.kernels.cpu.elementwise import Activation
    from chiasm.kernels.cpu.native import CpuKernels

DTYPES = (torch.float32, torch.bfloat16)
# Tiles are of up to 6 rows, or of 16; the kernel cuts more than 96 rows into blocks.
ROW_COUNTS = (0, 1, 2, 3, 4, 5, 6, 7, 11, 13, 16, 17, 25, 32, 33, 97)


class _Case:
    """A weight of random integers, and rows."""

    def __init__(
        self,
        seed: int,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        has_bias: bool = True,
    ) -> None:
        num_rows, num_inputs, num_outputs = shape
        generator = torch.Generator().manual_seed(seed)
        self.integers = torch.randint(
            -127, 128, (num_outputs, num_inputs), generator=generator, dtype=torch.int8
        )
        self.scales = torch.rand(num_outputs, generator=generator)
        self.bias = torch.randn(num_outputs, generator=generator).to(dtype) if has_bias else None
        sizes = torch.logspace(-3, 3, max(1, num_rows))[:num_rows, None]
        self.rows = (sizes * torch.randn(num_rows, num_inputs, generator=generator)).to(dtype)

    def weight(self) -> QuantizedWeight:
        return QuantizedWeight(self.integers, self.scales, self.bias, self.rows.dtype)

    def run(self, kernels: CpuKernels) -> torch.Tensor:
        return kernels.quantized.multiply(self.weight(), self.rows)

    def reference(self) -> torch.Tensor:
        """Round where the kernel rounds; the sums themselves are exact."""
        rows = self.rows.float()
        tops = rows.abs().amax(1, keepdim=True).clamp(min=1e-12)
        integers = (rows * (torch.full_like(tops, 127.0) / tops)).round()
        sums = integers.to(torch.int64) @ self.integers.to(torch.int64).T
        products = sums.float() * self.scales * (tops / 127.0)
        if self.bias is not None:
            products = products + self.bias.float()
        return products.to(self.rows.dtype)


@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    seed=st.integers(0, 1 << 30),
    num_rows=st.sampled_from(ROW_COUNTS),
    num_inputs=st.sampled_from([1, 2, 3, 4, 5, 16, 33, 64, 127, 260]),
    num_outputs=st.sampled_from([1, 3, 16, 33, 63, 64, 65, 130, 192]),
    dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
)
def test_product_equals_torch_to_the_bit(
    kernels: CpuKernels,
    seed: int,
    num_rows: int,
    num_inputs: int,
    num_outputs: int,
    dtype: torch.dtype,
    has_bias: bool,
) -> None:
    case = _Case(seed, (num_rows, num_inputs, num_outputs), dtype, has_bias)

    product = case.run(kernels)

    assert product.dtype is dtype
    assert torch.equal(product, case.reference())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 15, 16, 17, 33, 80])
@pytest.mark.parametrize("num_rows", [1, 8, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_product_is_the_gate_of_the_product_to_the_bit(
    kernels: CpuKernels, activation: Activation, width: int, num_rows: int, dtype: torch.dtype
) -> None:
    case = _Case(8, (num_rows, 70, 2 * width), dtype)
    weight = QuantizedWeight(case.integers, case.scales, case.bias, dtype, gate=activation)

    gated = kernels.quantized.multiply(weight, case.rows)

    rule = GateRule(activation, width, dtype)
    assert torch.equal(gated, kernels.elementwise.gate(rule, case.run(kernels)))


# The second shape is so wide that tiles multiply it in parts.
@pytest.mark.parametrize("shape", [(203, 515, 300), (203, 8200, 70)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_row_is_the_same_to_the_bit_beside_any_rows_and_with_any_threads(
    kernels: CpuKernels, shape: tuple[int, int, int], dtype: torch.dtype, num_threads: int
) -> None:
    case = _Case(1, shape, dtype)
    weight, one = case.weight(), kernels.quantized
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        together = one.multiply(weight, case.rows)
        few = [one.multiply(weight, rows) for rows in torch.split(case.rows, 16)]
        alone = [one.multiply(weight, row) for row in torch.split(case.rows[:40], 1)]
    finally:
        torch.set_num_threads(before)

    assert torch.equal(together, case.reference())
    assert torch.equal(torch.cat(few), together)
    assert torch.equal(torch.cat(alone), together[:40])


@pytest.mark.parametrize("num_inputs", [64, MAX_INPUTS])
def test_largest_sums_equal_torch(kernels: CpuKernels, num_inputs: int) -> None:
    case = _Case(2, (4, num_inputs, 5), torch.float32, has_bias=False)
    case.integers[0], case.integers[1], case.integers[2] = 127, -127, 0
    case.rows[0], case.rows[1] = 1.0, -1.0
    case.rows[2] = torch.where(case.integers[3] < 0, -3.0, 3.0)

    product = case.run(kernels)

    assert torch.equal(product, case.reference())
    assert product[0, 0] == float(127 * 127 * num_inputs) * case.scales[0] * (1 / 127.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_zeros_and_of_next_to_nothing_give_the_bias(
    kernels: CpuKernels, dtype: torch.dtype
) -> None:
    case = _Case(3, (3, 70, 66), dtype)
    case.rows[0], case.rows[1], case.rows[2] = 0.0, -0.0, 1e-38

    product = case.run(kernels)

    assert case.bias is not None
    assert torch.equal(product, case.bias.expand(3, 66))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_size_have_finite_products(kernels: CpuKernels, dtype: torch.dtype) -> None:
    case = _Case(4, (4, 70, 66), dtype, has_bias=False)
    case.rows[:] = case.rows / case.rows.abs().amax(1, keepdim=True)
    case.rows *= torch.tensor([[1e-11], [1e-6], [1e6], [1e30]]).to(dtype)

    product = case.run(kernels)

    assert product.isfinite().all()
    assert torch.equal(product, case.reference())
    assert float(product.abs().amax(1).min()) > 0


@pytest.mark.parametrize("top", [129 / 128, 130 / 128, 139 / 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_of_a_value_and_its_factor_is_rounded_before_it_becomes_an_integer(
    kernels: CpuKernels, dtype: torch.dtype, top: float
) -> None:
    rows = torch.tensor([[top, top / 2]], dtype=dtype)
    exact = Fraction(top / 2) * Fraction(float(torch.tensor(127.0) / top))
    # Less than a tie, which it becomes by being rounded: 64 is the even neighbour of 63.5.
    assert exact < Fraction(127, 2) == Fraction(float(torch.tensor(float(exact))))
    weight = QuantizedWeight(torch.tensor([[0, 1]], dtype=torch.int8), torch.ones(1), None, dtype)

    product = kernels.quantized.multiply(weight, rows)

    scale = torch.tensor(top) / 127
    assert (64 * scale).to(dtype) != (63 * scale).to(dtype)
    assert product.item() == (64 * scale).to(dtype).item()


@pytest.mark.parametrize("num_outputs", [1, 16, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaled_sum_is_rounded_before_the_bias_is_added(
    kernels: CpuKernels, dtype: torch.dtype, num_outputs: int
) -> None:
    scale = torch.ones(()) / 127
    # 127 of these are not 1 but are rounded to it: a contracted sum would leave the difference.
    assert Fraction(float(scale)) * 127 != 1 == float(scale * 127)
    integers = torch.ones(num_outputs, 1, dtype=torch.int8)
    bias = torch.full((num_outputs,), -1.0, dtype=dtype)
    weight = QuantizedWeight(integers, torch.ones(num_outputs), bias, dtype)

    product = kernels.quantized.multiply(weight, torch.ones(1, 1, dtype=dtype))

    assert torch.equal(product, torch.zeros(1, num_outputs, dtype=dtype))


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 50, 69])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_that_is_not_finite_is_seen_in_its_own_row_only(
    kernels: CpuKernels, value: float, place: int, dtype: torch.dtype
) -> None:
    case = _Case(5, (3, 70, 66), dtype)
    expected = case.reference()
    case.rows[1, place] = value

    product = case.run(kernels)

    assert not product[1].isfinite().any()
    assert torch.equal(product[::2], expected[::2])


def test_rows_that_do_not_fit_the_weight_are_refused(kernels: CpuKernels) -> None:
    weight = _Case(6, (1, 8, 3), torch.float32).weight()

    with pytest.raises(AssertionError):
        kernels.quantized.multiply(weight, torch.zeros(2, 8, dtype=torch.bfloat16))
    with pytest.raises(AssertionError):
        kernels.quantized.multiply(weight, torch.zeros(2, 9))
    with pytest.raises(AssertionError):
        kernels.quantized.multiply(weight, torch.zeros(2, 16)[:, ::2])


def test_weight_whose_sums_may_not_fit_is_refused() -> None:
    integers = torch.zeros(1, MAX_INPUTS + 1, dtype=torch.int8)

    with pytest.raises(ValueError, match="65537 inputs are more than 65536"):
        QuantizedWeight(integers, torch.ones(1), None, torch.float32)


def test_weight_takes_a_byte_each_and_three_numbers_for_each_output() -> None:
    case = _Case(7, (1, 192, 128), torch.bfloat16)

    assert case.weight().num_bytes == 128 * 192 + 3 * 4 * 128
