"""Products of bfloat16 by tiles against the same sums in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear, silu

from chiasm.kernels.cpu.elementwise import ACTIVATIONS, GateRule
from chiasm.kernels.cpu.native import CpuKernels, KernelsUnavailableError
from chiasm.kernels.cpu.tiled_linear import TiledKernel, TiledLinear, TiledWeight
from chiasm.kernels.cpu.weight_panels import WeightMemory

if TYPE_CHECKING:
    from pathlib import Path

    from chiasm.kernels.cpu.elementwise import Activation

# Tiles have 16 rows, and two of them are multiplied at once.
ROW_COUNTS = (0, 1, 2, 15, 16, 17, 31, 32, 33, 48, 49, 97)


@pytest.fixture(scope="module")
def kernel(kernel_library: Path) -> TiledKernel:
    try:
        tiled = CpuKernels(kernel_library, "amx").tiled
    except KernelsUnavailableError as error:
        pytest.skip(str(error))
    assert tiled is not None
    return tiled


def _random(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).bfloat16()


def _is_near(product: torch.Tensor, exact: torch.Tensor, num_inputs: int) -> bool:
    """Allow half a unit in the last place, and what sums of float32 lose."""
    bound = exact.abs() * 2**-8 + 1e-6 * num_inputs
    return product.dtype is torch.bfloat16 and bool(((product - exact).abs() <= bound).all())


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    seed=st.integers(0, 1 << 30),
    num_rows=st.sampled_from(ROW_COUNTS),
    num_inputs=st.sampled_from([1, 2, 3, 31, 32, 33, 64, 130]),
    num_outputs=st.sampled_from([1, 15, 16, 17, 32, 33, 63, 64, 65, 130]),
    has_bias=st.booleans(),
)
def test_product_equals_torch(
    kernel: TiledKernel,
    seed: int,
    num_rows: int,
    num_inputs: int,
    num_outputs: int,
    has_bias: bool,
) -> None:
    matrix, rows = _random(seed, num_outputs, num_inputs), _random(seed + 1, num_rows, num_inputs)
    bias = _random(seed + 2, num_outputs) if has_bias else None

    product = kernel.multiply(TiledWeight(matrix, bias, WeightMemory()), rows)

    exact = rows.double() @ matrix.double().T
    assert _is_near(product, exact if bias is None else exact + bias.double(), num_inputs)


@pytest.mark.parametrize("num_rows", [1, 17, 33])
@pytest.mark.parametrize("num_outputs", [1, 17, 33, 64, 100])
@pytest.mark.parametrize("has_bias", [False, True])
def test_addend_is_added_before_the_only_rounding(
    kernel: TiledKernel, num_rows: int, num_outputs: int, has_bias: bool
) -> None:
    matrix, rows = _random(13, num_outputs, 48), _random(14, num_rows, 48)
    addend, bias = _random(15, num_rows, num_outputs), _random(16, num_outputs)
    weight = TiledWeight(matrix, bias if has_bias else None, WeightMemory())

    total = kernel.multiply(weight, rows, addend)

    exact = rows.double() @ matrix.double().T + addend.double() + has_bias * bias.double()
    assert _is_near(total, exact, 48)


def test_addend_that_does_not_fit_the_outputs_is_refused(kernel: TiledKernel) -> None:
    rows, addend = _random(17, 2, 8), _random(18, 2, 6)
    weight, gated = (
        TiledWeight(_random(19, num_outputs, 8), None, WeightMemory(), gate)
        for num_outputs, gate in ((6, None), (12, ACTIVATIONS[0]))
    )

    with pytest.raises(AssertionError, match="every output"):
        kernel.multiply(weight, rows, addend[:1])
    with pytest.raises(AssertionError, match="one behind the other"):
        kernel.multiply(weight, rows, addend.T.contiguous().T)
    with pytest.raises(AssertionError, match="multiply bfloat16"):
        kernel.multiply(weight, rows, addend.float())
    with pytest.raises(AssertionError, match="last function"):
        kernel.multiply(gated, rows, addend)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 15, 16, 17, 33, 48, 80])
@pytest.mark.parametrize("num_rows", [1, 16, 17, 40])
@pytest.mark.parametrize("has_bias", [False, True])
def test_gated_product_is_the_gate_of_the_product_to_the_bit(
    kernel: TiledKernel,
    kernel_library: Path,
    activation: Activation,
    width: int,
    num_rows: int,
    has_bias: bool,
) -> None:
    matrix, rows = _random(10, 2 * width, 48), _random(11, num_rows, 48)
    bias = _random(12, 2 * width) if has_bias else None

    gated = kernel.multiply(TiledWeight(matrix, bias, WeightMemory(), activation), rows)

    product = kernel.multiply(TiledWeight(matrix, bias, WeightMemory()), rows)
    rule = GateRule(activation, width, torch.bfloat16)
    assert torch.equal(gated, CpuKernels(kernel_library, "amx").elementwise.gate(rule, product))


# Wide enough for turns of steps, and for several groups of rows in parts.
@pytest.mark.parametrize("num_inputs", [1100, 8200])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_row_is_the_same_to_the_bit_beside_any_rows_and_with_any_threads(
    kernel: TiledKernel, num_threads: int, num_inputs: int
) -> None:
    matrix = _random(1, 200, num_inputs)
    weight = TiledWeight(matrix, _random(2, 200), WeightMemory())
    rows = _random(3, 203, num_inputs)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        together = kernel.multiply(weight, rows)
        few = [kernel.multiply(weight, some) for some in torch.split(rows, 16)]
        alone = [kernel.multiply(weight, row) for row in torch.split(rows[:40], 1)]
    finally:
        torch.set_num_threads(before)

    exact = rows.double() @ matrix.double().T + _random(2, 200)
    assert _is_near(together, exact, num_inputs)
    assert torch.equal(torch.cat(few), together)
    assert torch.equal(torch.cat(alone), together[:40])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("num_rows", [3, 20])
def test_value_that_is_not_finite_is_seen_in_its_own_row_only(
    kernel: TiledKernel, value: float, num_rows: int
) -> None:
    weight = TiledWeight(_random(4, 66, 70), None, WeightMemory())
    rows = _random(5, num_rows, 70)
    expected = kernel.multiply(weight, rows)
    rows[1, 69] = value

    product = kernel.multiply(weight, rows)

    assert not product[1].isfinite().any()
    assert torch.equal(product[0], expected[0])
    assert torch.equal(product[2:], expected[2:])


def test_torch_and_tiles_take_turns_on_the_same_threads(kernel: TiledKernel) -> None:
    matrix, rows = _random(6, 512, 512), _random(7, 256, 512)
    weight, exact = TiledWeight(matrix, None, WeightMemory()), rows.double() @ matrix.double().T
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(5):
            # oneDNN uses the same registers, and sets them up in another way.
            assert _is_near(rows @ matrix.T, exact, 512)
            assert _is_near(kernel.multiply(weight, rows), exact, 512)
    finally:
        torch.set_num_threads(before)


def test_rows_that_do_not_fit_the_weight_are_refused(kernel: TiledKernel) -> None:
    weight = TiledWeight(_random(8, 3, 8), None, WeightMemory())

    with pytest.raises(AssertionError):
        kernel.multiply(weight, torch.zeros(2, 8))
    with pytest.raises(AssertionError):
        kernel.multiply(weight, torch.zeros(2, 9, dtype=torch.bfloat16))
    with pytest.raises(AssertionError):
        kernel.multiply(weight, torch.zeros(2, 16, dtype=torch.bfloat16)[:, ::2])


def test_other_instruction_sets_have_no_tiles(kernel_library: Path) -> None:
    assert CpuKernels(kernel_library, "plain").tiled is None


def test_weight_takes_two_bytes_each_and_a_number_for_each_bias() -> None:
    matrix = _random(9, 128, 96)

    assert TiledWeight(matrix, None, WeightMemory()).num_bytes == 2 * 128 * 96
    assert TiledWeight(matrix, matrix[:, 0], WeightMemory()).num_bytes == 2 * 128 * 96 + 4 * 128


def test_sum_with_others_is_that_of_plain_layers(kernel: TiledKernel) -> None:
    weight, bias, others = _random(1, 40, 24), _random(2, 40), _random(3, 5, 40)
    rows = _random(4, 5, 48)[:, ::2]
    layer = TiledLinear(weight, bias, kernel=kernel, memory=WeightMemory())

    total = layer.add(rows, others)

    expected = others + linear(rows.float(), weight.float(), bias.float())
    torch.testing.assert_close(total.float(), expected, rtol=2**-8, atol=1e-5)


def test_gated_layer_is_half_as_wide(kernel: TiledKernel) -> None:
    weight, rows = _random(5, 80, 24), _random(6, 5, 24)
    layer = TiledLinear(weight, kernel=kernel, memory=WeightMemory(), gate="silu")

    gated = layer(rows)

    gate, factor = linear(rows.float(), weight.float()).chunk(2, dim=1)
    torch.testing.assert_close(gated.float(), silu(gate) * factor, rtol=0.02, atol=0.02)
    assert (layer.num_inputs, gated.shape) == (24, (5, 40))
    assert layer.num_bytes >= weight.nbytes
