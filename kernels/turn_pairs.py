"""Turn the first heads of rows by angles, each pair of neighbouring values as a complex number.

Math: ``(a + ib) * (cos + i sin)``, in place, in float32, rounded once.

Layout: the values of a pair lie side by side, unlike those of ``rope_store_kv.py``.

Reference: ``rotate`` in ``services/encoder/fused/rotary.py``.

Source: Su et al. 2021, "RoFormer".
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from typing import Any

# Heads of a program.
_HEADS = 8


@triton.jit
def _turn_pairs_kernel(
    heads_ptr,  # [num_rows, num_heads, HEAD_DIM]
    angle_ptr,  # [num_rows, HEAD_DIM / 2, 2]: cosine and sine
    row_stride,
    NUM_TURNED: tl.constexpr,  # heads that turn, the first of each row
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,  # heads of a program
    PAIRS: tl.constexpr,  # HEAD_DIM / 2, padded
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, PAIRS)
    is_pair = pair < HEAD_DIM // 2
    mask = (head < NUM_TURNED)[:, None] & is_pair[None, :]
    angle = row * HEAD_DIM + 2 * pair
    cos = tl.load(angle_ptr + angle, mask=is_pair, other=0.0)[None, :]
    sin = tl.load(angle_ptr + angle + 1, mask=is_pair, other=0.0)[None, :]
    at = heads_ptr + row * row_stride + head[:, None] * HEAD_DIM + 2 * pair[None, :]
    real = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    imaginary = tl.load(at + 1, mask=mask, other=0.0).to(tl.float32)
    dtype = heads_ptr.dtype.element_ty
    tl.store(at, (real * cos - imaginary * sin).to(dtype), mask=mask)
    tl.store(at + 1, (real * sin + imaginary * cos).to(dtype), mask=mask)


def turn_pairs(heads: torch.Tensor, num_turned: int, rotation: torch.Tensor) -> None:
    """Turn the first ``num_turned`` heads of every row, in place.

    Args:
        heads: [num_rows, num_heads, head_dim], float16/bfloat16/float32, contiguous; ``head_dim``
            is even.
        num_turned: Heads that turn.
        rotation: Unit numbers. [num_rows, head_dim / 2], complex64, contiguous.

    Raises:
        ValueError: The tensors do not fit together.
    """
    num_rows, num_heads, head_dim = heads.shape
    if rotation.shape != (num_rows, head_dim // 2) or rotation.dtype is not torch.complex64:
        raise ValueError(f"{tuple(heads.shape)} does not turn by {tuple(rotation.shape)}.")
    if not heads.is_contiguous() or not rotation.is_contiguous() or num_turned > num_heads:
        raise ValueError("Rows do not lie one behind the other.")
    if not num_rows or not num_turned:
        return
    kernel: Any = _turn_pairs_kernel
    kernel[(num_rows, triton.cdiv(num_turned, _HEADS))](
        heads,
        torch.view_as_real(rotation),
        heads.stride(0),
        NUM_TURNED=num_turned,
        HEAD_DIM=head_dim,
        HEADS=_HEADS,
        PAIRS=triton.next_power_of_2(max(head_dim // 2, 1)),
        num_warps=4,
    )
