"""The norm that a GPU computes is the one that a CPU computes."""

from __future__ import annotations

import pytest
import torch

from chiasm.common.rms_norm import RMSNorm, norm_at_once

WIDTH = 48
# Sums in another order; and one rounding less of bfloat16's 8 bits.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-7}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=["as rows", "float32"])
@pytest.mark.parametrize("shape", [(WIDTH,), (3, WIDTH)], ids=["row", "heads"])
def test_norm_at_once_equals_the_norm(
    dtype: torch.dtype, weight_dtype: torch.dtype | None, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(weight_dtype or dtype)
    rows = torch.randn(5, 3, WIDTH, generator=generator).to(dtype)
    before = rows.clone()

    normed = norm_at_once(rows, weight, 1e-6)

    assert normed.dtype == dtype
    assert torch.equal(rows, before)
    expected = RMSNorm(weight, 1e-6)(rows)
    torch.testing.assert_close(normed, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def test_epsilon_is_added_to_the_mean_square() -> None:
    normed = norm_at_once(torch.full((1, 4), 1e-3), torch.ones(4), 3e-6)

    torch.testing.assert_close(normed, torch.full((1, 4), 0.5))
