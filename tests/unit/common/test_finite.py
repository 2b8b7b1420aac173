"""Tests of ``chiasm.common.finite``."""

from __future__ import annotations

import pytest
import torch

from chiasm.common.finite import is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 5000, -1])
def test_one_wrong_value_is_found_wherever_it_is(dtype: torch.dtype, value: float, at: int) -> None:
    rows = torch.randn(99, 101).to(dtype)
    assert is_finite(rows)

    rows.view(-1)[at] = value

    assert not is_finite(rows)


def test_largest_numbers_are_finite_and_so_is_nothing() -> None:
    assert is_finite(torch.full((3, 3), torch.finfo(torch.float16).max, dtype=torch.float16))
    assert is_finite(torch.empty(0, 4))
