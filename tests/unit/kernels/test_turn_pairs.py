"""Triton's turning of pairs against complex products of torch."""

from __future__ import annotations

import pytest
import torch

from chiasm.encoder.fused.rotary import make_rotation, rotate
from tests.fakes.rounding import DTYPES, assert_close, random_rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 2), (3, 34), (4, 80), (9, 64)])
def test_queries_and_keys_turn_and_values_stay(
    triton_device: str, dtype: torch.dtype, num_heads: int, head_dim: int
) -> None:
    from chiasm.kernels.turn_pairs import turn_pairs

    heads = random_rows(1, 5, 3, num_heads, head_dim, dtype=dtype)
    angles = random_rows(2, 5, head_dim // 2, dtype=torch.float32).repeat(1, 2)
    rotation = make_rotation(angles.cos(), angles.sin())
    expected = heads.clone()
    rotate(expected, rotation)

    turned = heads.to(triton_device)
    turn_pairs(turned.flatten(1, 2), 2 * num_heads, rotation.to(triton_device))

    assert_close(turned, expected, float(expected.abs().max()))
    assert torch.equal(turned[:, 2].cpu(), heads[:, 2])


def test_tensors_that_do_not_fit_are_refused(triton_device: str) -> None:
    from chiasm.kernels.turn_pairs import turn_pairs

    heads = torch.zeros(2, 6, 8, device=triton_device)
    rotation = torch.zeros(2, 4, dtype=torch.complex64, device=triton_device)

    with pytest.raises(ValueError, match="does not turn by"):
        turn_pairs(heads, 4, rotation[:1])
    with pytest.raises(ValueError, match="does not turn by"):
        turn_pairs(heads, 4, rotation.real.contiguous())
    with pytest.raises(ValueError, match="one behind the other"):
        turn_pairs(heads, 7, rotation)
    with pytest.raises(ValueError, match="one behind the other"):
        turn_pairs(heads.transpose(0, 1)[:2], 1, rotation)


def test_without_rows_or_heads_nothing_turns(triton_device: str) -> None:
    from chiasm.kernels.turn_pairs import turn_pairs

    heads = torch.ones(2, 6, 8, device=triton_device)
    rotation = torch.zeros(2, 4, dtype=torch.complex64, device=triton_device)

    turn_pairs(heads[:0], 4, rotation[:0])
    turn_pairs(heads, 0, rotation)

    assert heads.all()
