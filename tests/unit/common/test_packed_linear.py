"""Packed weights against plain matrix products."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn.functional import gelu, linear, silu

from chiasm.common.packed_linear import PackedLinear, can_activate, can_pack

if TYPE_CHECKING:
    from collections.abc import Callable

# One rounding to 8 bits against another.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 0.0}


def _random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 33])
@pytest.mark.parametrize("has_bias", [False, True])
def test_product_equals_the_plain_one(dtype: torch.dtype, num_rows: int, has_bias: bool) -> None:
    weight = _random(37, 24, dtype=dtype)
    bias = _random(37, dtype=dtype) if has_bias else None
    rows = _random(num_rows, 24, dtype=dtype)

    product = PackedLinear(weight, bias)(rows)

    assert product.dtype == dtype
    tolerance = TOLERANCES[dtype]
    expected = linear(rows, weight, bias)
    torch.testing.assert_close(product, expected, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("gelu", gelu),
        ("gelu_pytorch_tanh", partial(gelu, approximate="tanh")),
        ("silu", silu),
    ],
)
def test_what_follows_a_product_equals_the_plain_one(
    dtype: torch.dtype, activation: str, function: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    weight, bias = _random(37, 24, dtype=dtype), _random(37, dtype=dtype)
    rows, others = _random(33, 24, dtype=dtype), _random(33, 37, dtype=dtype)
    before = others.clone()
    layer = PackedLinear(weight, bias)
    product = linear(rows.double(), weight.double(), bias.double())
    tolerance = TOLERANCES[dtype] or 1e-12

    assert can_activate(activation)
    for result, expected in (
        (layer.activate(rows, activation), function(product)),
        (layer.add(rows, others), others.double() + product),
        (layer.multiply(rows, others), others.double() * product),
    ):
        assert result.dtype == dtype
        error = (result.double() - expected).abs().max() / expected.abs().max()
        assert error <= tolerance
    assert torch.equal(others, before)


def test_unknown_functions_are_not_fused() -> None:
    assert not can_activate("quick_gelu")


def test_rows_with_gaps_between_them_are_read_right() -> None:
    weight = _random(8, 16, dtype=torch.float32)
    rows = _random(5, 40, dtype=torch.float32)[:, 3:19]

    torch.testing.assert_close(PackedLinear(weight)(rows), linear(rows, weight))


def test_what_has_no_packed_form_is_kept_as_it_is() -> None:
    weight = _random(8, 16, dtype=torch.float64)

    assert not can_pack(weight)
    assert not can_pack(torch.empty(8, 16, dtype=torch.bfloat16, device="meta"))
    assert not PackedLinear(weight).is_packed


@pytest.mark.skipif(not torch._C._has_mkldnn, reason="this build of torch has no oneDNN")
def test_float32_is_packed_on_a_cpu() -> None:
    layer = PackedLinear(_random(8, 16, dtype=torch.float32), _random(8, dtype=torch.float32))

    assert layer.is_packed
    assert layer.num_inputs == 16
    assert layer.num_bytes == 4 * (8 * 16 + 8)
