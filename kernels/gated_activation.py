"""Gate of a feed-forward block: multiply the second half of rows by a function of the first.

Math: ``out = f(gate) * up`` with ``silu(x) = x / (1 + exp(-x))`` or ``gelu(x) = 0.5 * x * (1 +
tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))``, computed as ``x / (1 + exp(-2u))`` of what stands in
the tanh. ``f(gate)`` is rounded to the dtype of the rows, as torch's operators do.

Reference: ``silu(gate) * up``, or ``gelu(gate, approximate="tanh") * up``.

Source: Shazeer 2020, "GLU Variants Improve Transformer".
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")

_TILE = 1024


@triton.jit
def _gated_activation_kernel(
    gate_up_ptr,  # [num_rows, 2 * width], gates in the first half of each row
    out_ptr,  # [num_rows, width]
    width,
    IS_GELU: tl.constexpr,
    TILE: tl.constexpr,  # columns of a program
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = column < width
    row_ptr = gate_up_ptr + row * 2 * width
    gate = tl.load(row_ptr + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(row_ptr + width + column, mask=mask, other=0.0).to(tl.float32)
    slope = gate
    if IS_GELU:
        slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    # The exponential is of a negative number, so that nothing overflows.
    power = tl.exp(-tl.abs(slope))
    activated = tl.where(slope < 0.0, gate * power, gate) / (1.0 + power)
    activated = activated.to(out_ptr.dtype.element_ty).to(tl.float32)
    out = (activated * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + column, out, mask=mask)


def gated_activation(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """Gate rows.

    Args:
        gate_up: [num_rows, 2 * width], float16/bfloat16/float32, contiguous.
        activation: One of ``ACTIVATIONS``.

    Returns:
        [num_rows, width], contiguous.

    Raises:
        ValueError: There is no such activation, or rows do not lie one behind the other.
    """
    if activation not in ACTIVATIONS or not gate_up.is_contiguous():
        raise ValueError(f"No kernel gates rows {gate_up.stride(0)} apart by {activation}.")
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_rows, width)
    if num_rows:
        _gated_activation_kernel[(num_rows, triton.cdiv(width, _TILE))](
            gate_up, out, width, IS_GELU=activation == "gelu_pytorch_tanh", TILE=_TILE, num_warps=4
        )
    return out
