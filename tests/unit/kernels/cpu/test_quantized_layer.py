"""Products of 8-bit integers against exact ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn.functional import linear

from chiasm.kernels.cpu.native import CpuKernels
from chiasm.kernels.cpu.quantized_layer import QuantizedLinear, can_quantize

if TYPE_CHECKING:
    from pathlib import Path

# Rounding to 1/127 of the largest value: a third of a step on average, of normal values.
MAX_ERROR = 0.02


@pytest.fixture
def compiled(kernel_library: Path) -> CpuKernels:
    return CpuKernels(kernel_library)


@pytest.fixture(params=["kernels", "oneDNN"])
def kernels(request: pytest.FixtureRequest) -> CpuKernels | None:
    """Return what multiplies; ``None`` is oneDNN."""
    if request.param == "oneDNN":
        return None
    found: CpuKernels = request.getfixturevalue("compiled")
    return found


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows", [1, 33])
@pytest.mark.parametrize("has_bias", [False, True])
def test_product_is_near_the_exact_one(
    kernels: CpuKernels | None, dtype: torch.dtype, num_rows: int, has_bias: bool
) -> None:
    weight = _random(37, 240, dtype=dtype)
    bias = 5 * _random(37, dtype=dtype) if has_bias else None
    rows = _random(num_rows, 240, dtype=dtype)

    product = QuantizedLinear(weight, bias, kernels=kernels)(rows)

    expected = linear(rows.double(), weight.double(), None if bias is None else bias.double())
    assert product.dtype == dtype
    assert float((product.double() - expected).norm() / expected.norm()) <= MAX_ERROR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_join_other_rows(kernels: CpuKernels | None, dtype: torch.dtype) -> None:
    layer = QuantizedLinear(_random(37, 240, dtype=dtype), kernels=kernels)
    rows, others = _random(5, 240, dtype=dtype), _random(5, 37, dtype=dtype)
    product = layer(rows)

    assert torch.equal(layer.add(rows, others), product + others)
    assert torch.equal(layer.multiply(rows, others), product * others)


def test_products_of_integers_are_exact(kernels: CpuKernels | None) -> None:
    weight = torch.arange(-127, 127, dtype=torch.float32).view(2, 127)
    weight[:, 0] = 127
    rows = torch.tensor([[127.0, *range(126)]])

    assert torch.equal(QuantizedLinear(weight, kernels=kernels)(rows), rows @ weight.T)


def test_row_does_not_depend_on_the_others(kernels: CpuKernels | None) -> None:
    layer = QuantizedLinear(_random(64, 48), kernels=kernels)
    rows = torch.cat([_random(5, 48), 1000 * _random(1, 48)])

    alone = torch.cat([layer(rows[index : index + 1]) for index in range(len(rows))])

    assert torch.equal(layer(rows), alone)


def test_outputs_of_any_size_are_as_exact_as_the_others(kernels: CpuKernels | None) -> None:
    weight = _random(3, 64) * torch.tensor([[1e-4], [1.0], [1e4]])
    rows = _random(4, 64) * torch.tensor([[1e-4], [1.0], [1e3], [1e5]])

    product = QuantizedLinear(weight, kernels=kernels)(rows)

    expected = rows @ weight.T
    errors = (product - expected).norm(dim=0) / expected.norm(dim=0)
    assert float(errors.max()) <= 2 * MAX_ERROR


def test_zeros_give_the_bias(kernels: CpuKernels | None) -> None:
    bias, zeros = _random(3), torch.zeros(1, 8)

    for weight in (torch.zeros(3, 8), _random(3, 8)):
        assert torch.equal(QuantizedLinear(weight, bias, kernels=kernels)(zeros)[0], bias)


def test_no_rows_give_no_rows(kernels: CpuKernels | None) -> None:
    assert QuantizedLinear(_random(3, 8), kernels=kernels)(torch.empty(0, 8)).shape == (0, 3)


def test_values_that_are_not_finite_are_seen_in_the_product(kernels: CpuKernels | None) -> None:
    rows = _random(2, 8)
    rows[1, 3] = torch.nan

    product = QuantizedLinear(_random(3, 8), kernels=kernels)(rows)

    assert bool(product[0].isfinite().all())
    assert not bool(product[1].isfinite().any())


def test_rows_that_are_spread_in_memory_are_multiplied(kernels: CpuKernels | None) -> None:
    layer, rows = QuantizedLinear(_random(3, 8), kernels=kernels), _random(2, 16)[:, ::2]

    assert torch.equal(layer(rows), layer(rows.clone(memory_format=torch.contiguous_format)))


def test_weight_of_more_outputs_than_are_quantized_at_once_is_whole(
    kernels: CpuKernels | None,
) -> None:
    weight, rows = _random(9_000, 8), _random(2, 8)

    product = QuantizedLinear(weight, kernels=kernels)(rows)

    expected = rows @ weight.T
    assert float((product - expected).norm() / expected.norm()) <= MAX_ERROR


def test_kernels_and_onednn_differ_by_a_rounding_now_and_then(compiled: CpuKernels) -> None:
    weight, bias, rows = _random(70, 240), _random(70), _random(5, 240)

    ours, theirs = (QuantizedLinear(weight, bias, kernels=k)(rows) for k in (compiled, None))

    # One integer of a row that is rounded the other way is one part in thousands of the sums.
    assert float((ours - theirs).norm() / theirs.norm()) <= 1e-3


def test_memory_is_a_byte_for_each_weight_and_a_scale_for_each_output() -> None:
    layer = QuantizedLinear(_random(32, 64), _random(32))

    assert layer.num_inputs == 64
    assert layer.num_bytes == 32 * 64 + 3 * 4 * 32


def test_memory_with_kernels_is_that_of_whole_panels(compiled: CpuKernels) -> None:
    layer = QuantizedLinear(_random(32, 64), _random(32), kernels=compiled)

    assert layer.num_inputs == 64
    assert layer.num_bytes == 64 * 64 + 3 * 4 * 64


def test_only_cpus_have_such_products(
    compiled: CpuKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert can_quantize(torch.device("cpu"))
    assert not can_quantize(torch.device("meta"), compiled)

    monkeypatch.setattr(torch._C, "_has_mkldnn", False)
    assert not can_quantize(torch.device("cpu"))
    assert can_quantize(torch.device("cpu"), compiled)
