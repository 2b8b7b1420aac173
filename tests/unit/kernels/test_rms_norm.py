"""Triton's sum and norm against torch's operators."""

from __future__ import annotations

import pytest
import torch

from chiasm.common.rms_norm import RMSNorm
from tests.fakes.rounding import DTYPE_PAIRS, assert_close, random_rows


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (2, 896), (5, 16)], ids=str)
@pytest.mark.parametrize("scale", [None, 1.0, 0.22])
def test_sum_and_norm_equal_torch(
    triton_device: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    shape: tuple[int, int],
    scale: float | None,
) -> None:
    from chiasm.kernels.rms_norm import add_rms_norm

    dtype, weight_dtype = dtypes
    weight = random_rows(1, shape[1], dtype=weight_dtype).to(triton_device)
    hidden = random_rows(2, *shape, dtype=dtype).to(triton_device)
    addend = None if scale is None else random_rows(3, *shape, dtype=dtype).to(triton_device)
    total = hidden.clone() if addend is None else hidden.add(addend, alpha=scale or 1.0)

    normed = add_rms_norm(hidden, addend, weight, 1e-5, scale or 1.0)

    assert_close(hidden, total)
    assert_close(normed, RMSNorm(weight, 1e-5)(total))


def test_rows_of_zeros_and_of_huge_values_have_finite_norms(triton_device: str) -> None:
    from chiasm.kernels.rms_norm import add_rms_norm

    hidden = torch.stack([torch.zeros(40), torch.full((40,), 1e18)]).to(triton_device)

    normed = add_rms_norm(hidden, None, torch.ones(40, device=triton_device), 1e-6)

    assert_close(normed, torch.tensor([[0.0], [1.0]]).expand(2, 40))


def test_no_rows_give_no_rows(triton_device: str) -> None:
    from chiasm.kernels.rms_norm import add_rms_norm

    none = torch.empty(0, 8, device=triton_device)

    assert add_rms_norm(none, none, torch.ones(8, device=triton_device), 1e-6).shape == (0, 8)


def test_tensors_that_do_not_fit_are_refused(triton_device: str) -> None:
    from chiasm.kernels.rms_norm import add_rms_norm

    rows, weight = torch.zeros(2, 8), torch.ones(8)

    with pytest.raises(ValueError, match="rows have 8"):
        add_rms_norm(rows, None, torch.ones(7), 1e-6)
    with pytest.raises(ValueError, match=r"\(1, 8\) is added to \(2, 8\)"):
        add_rms_norm(rows, rows[:1], weight, 1e-6)
    with pytest.raises(ValueError, match="one behind the other"):
        add_rms_norm(torch.zeros(8, 2).T, None, weight, 1e-6)
