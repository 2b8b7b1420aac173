"""Products of 8-bit integers against exact ones."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from chiasm.generator.model.fused.quantized_linear import QuantizedLinear, can_quantize

# Rounding to 1/127 of the largest value: a third of a step on average, of normal values.
MAX_ERROR = 0.02


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows", [1, 33])
@pytest.mark.parametrize("has_bias", [False, True])
def test_product_is_near_the_exact_one(dtype: torch.dtype, num_rows: int, has_bias: bool) -> None:
    weight = _random(37, 240, dtype=dtype)
    bias = 5 * _random(37, dtype=dtype) if has_bias else None
    rows = _random(num_rows, 240, dtype=dtype)

    product = QuantizedLinear(weight, bias)(rows)

    expected = linear(rows.double(), weight.double(), None if bias is None else bias.double())
    assert product.dtype == dtype
    assert float((product.double() - expected).norm() / expected.norm()) <= MAX_ERROR


def test_products_of_integers_are_exact() -> None:
    weight = torch.arange(-127, 127, dtype=torch.float32).view(2, 127)
    weight[:, 0] = 127
    rows = torch.tensor([[127.0, *range(126)]])

    assert torch.equal(QuantizedLinear(weight)(rows), rows @ weight.T)


def test_row_does_not_depend_on_the_others() -> None:
    layer = QuantizedLinear(_random(64, 48))
    rows = torch.cat([_random(5, 48), 1000 * _random(1, 48)])

    alone = torch.cat([layer(rows[index : index + 1]) for index in range(len(rows))])

    assert torch.equal(layer(rows), alone)


def test_outputs_of_any_size_are_as_exact_as_the_others() -> None:
    weight = _random(3, 64) * torch.tensor([[1e-4], [1.0], [1e4]])
    rows = _random(4, 64) * torch.tensor([[1e-4], [1.0], [1e3], [1e5]])

    product = QuantizedLinear(weight)(rows)

    expected = rows @ weight.T
    errors = (product - expected).norm(dim=0) / expected.norm(dim=0)
    assert float(errors.max()) <= 2 * MAX_ERROR


def test_zeros_give_the_bias() -> None:
    bias = _random(3)

    assert torch.equal(QuantizedLinear(torch.zeros(3, 8), bias)(torch.zeros(1, 8))[0], bias)
    assert torch.equal(QuantizedLinear(_random(3, 8), bias)(torch.zeros(1, 8))[0], bias)


def test_no_rows_give_no_rows() -> None:
    assert QuantizedLinear(_random(3, 8))(torch.empty(0, 8)).shape == (0, 3)


def test_values_that_are_not_finite_are_seen_in_the_product() -> None:
    rows = _random(2, 8)
    rows[1, 3] = torch.nan

    product = QuantizedLinear(_random(3, 8))(rows)

    assert bool(product[0].isfinite().all())
    assert not bool(product[1].isfinite().any())


def test_memory_is_a_byte_for_each_weight_and_a_scale_for_each_output() -> None:
    layer = QuantizedLinear(_random(32, 64), _random(32))

    assert layer.num_inputs == 64
    assert layer.num_bytes == 32 * 64 + 3 * 4 * 32


def test_only_cpus_have_such_products() -> None:
    assert can_quantize(torch.device("cpu"))
    assert not can_quantize(torch.device("meta"))
