"""Add rows to rows and scale the sums to a root mean square of one.

Math: ``h' = h + scale * a`` and ``out = h' / sqrt(mean(h' * h') + epsilon) * weight``. The sum is
rounded to the dtype of the rows, the quotient to that of the weight, as torch's operators do.

Reference: ``hidden.add_(addend, alpha=scale)`` and ``services/common/rms_norm.py``.

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _add_rms_norm_kernel(
    hidden_ptr,  # [num_rows, width]; the sum takes its place
    addend_ptr,  # [num_rows, width]
    weight_ptr,  # [width]
    out_ptr,  # [num_rows, width]
    width,
    epsilon,
    scale,
    HAS_ADDEND: tl.constexpr,
    COLUMNS: tl.constexpr,  # width, padded
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    mask = column < width
    offsets = row * width + column
    total = tl.load(hidden_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_ADDEND:
        addend = tl.load(addend_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        rounded = (total + scale * addend).to(hidden_ptr.dtype.element_ty)
        tl.store(hidden_ptr + offsets, rounded, mask=mask)
        total = rounded.to(tl.float32)
    mean_square = tl.sum(total * total, 0) / width
    scaled = total * (1.0 / tl.sqrt(mean_square + epsilon))
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0)
    out = scaled.to(weight.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


def add_rms_norm(
    hidden: torch.Tensor,
    addend: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    scale: float = 1.0,
) -> torch.Tensor:
    """Add to ``hidden``, in place, and norm the sum.

    Args:
        hidden: [num_rows, width], float16/bfloat16/float32, contiguous.
        addend: As ``hidden``; multiplied by ``scale``. ``None`` adds nothing.
        weight: [width], dtype of ``hidden`` or float32, contiguous.
        epsilon: Added to the mean square.
        scale: Factor of the addend.

    Returns:
        The normed rows, as ``hidden``.

    Raises:
        ValueError: The tensors do not fit together.
    """
    width = hidden.shape[-1]
    if weight.shape != (width,):
        raise ValueError(f"The weight is {tuple(weight.shape)}, but rows have {width} values.")
    if addend is not None and (addend.shape != hidden.shape or addend.dtype != hidden.dtype):
        raise ValueError(f"{tuple(addend.shape)} is added to {tuple(hidden.shape)}.")
    if not hidden.is_contiguous() or not (addend is None or addend.is_contiguous()):
        raise ValueError("Rows do not lie one behind the other.")
    out = torch.empty_like(hidden)
    num_rows = hidden.numel() // width
    if not num_rows:
        return out
    columns = triton.next_power_of_2(width)
    _add_rms_norm_kernel[(num_rows,)](
        hidden,
        hidden if addend is None else addend,
        weight,
        out,
        width,
        epsilon,
        scale,
        HAS_ADDEND=addend is not None,
        COLUMNS=columns,
        # Eight values of a thread, or more where the row has too many for that.
        num_warps=min(16, max(1, columns // 256)),
    )
    return out
