"""Triton's gates of feed-forward blocks against torch's operators."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu, silu

from tests.fakes.rounding import DTYPES, assert_close, random_rows

# What exponentials may overflow for.
ENDS = torch.tensor([-3e38, -1e4, -100.0, -86.0, -0.0, 0.0, 86.0, 100.0, 1e4, 3e38, torch.nan])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (2, 1500)], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_gate_equals_torch(
    triton_device: str, dtype: torch.dtype, shape: tuple[int, int], activation: str
) -> None:
    from chiasm.kernels.gated_activation import gated_activation

    num_rows, width = shape
    gate_up = random_rows(1, num_rows, 2 * width, dtype=dtype)
    gates, ups = gate_up.chunk(2, dim=-1)
    # In float64: torch's own float32 loses all digits of a GELU of what is below -4.
    gates = gates.double()
    activated = silu(gates) if activation == "silu" else gelu(gates, approximate="tanh")

    gated = gated_activation(gate_up.to(triton_device), activation)

    assert gated.is_contiguous()
    assert_close(gated, activated.to(dtype) * ups)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_gates_at_the_ends_of_the_range_equal_torch(triton_device: str, activation: str) -> None:
    from chiasm.kernels.gated_activation import gated_activation

    gates = ENDS[2:-2] if activation == "gelu_pytorch_tanh" else ENDS[1:-1]
    gate_up = torch.cat([gates, torch.ones_like(gates)])[None]
    expected = silu(gates) if activation == "silu" else gelu(gates, approximate="tanh")

    gated = gated_activation(gate_up.to(triton_device), activation)

    torch.testing.assert_close(gated.cpu()[0], expected, rtol=1e-5, atol=1e-30)


def test_what_has_no_kernel_is_refused(triton_device: str) -> None:
    from chiasm.kernels.gated_activation import gated_activation

    with pytest.raises(ValueError, match="by relu"):
        gated_activation(torch.zeros(2, 8), "relu")
    with pytest.raises(ValueError, match="rows 1 apart"):
        gated_activation(torch.zeros(8, 2).T, "silu")
