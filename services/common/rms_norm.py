"""Scale rows to a root mean square of one.

Math: ``out = x / sqrt(mean(x * x) + epsilon) * weight``, the quotient in float32.
Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
"""

from __future__ import annotations

import torch
from torch.nn.functional import rms_norm


class RMSNorm:
    """A root-mean-square norm over the last dimension.

    Attributes:
        weight: What it multiplies with.
        epsilon: Added to the mean square.
    """

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        """Keep ``weight``; the element type of the weight is the one of the last product.

        Args:
            weight: [..., width], broadcast against the input. float32 for families that round
                once, the model's element type for those that round before the product as well.
            epsilon: Added to the mean square.
        """
        self.weight = weight
        self.epsilon = epsilon

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight."""
        return self.weight.nbytes

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the scaled rows, [..., width], in the dtype of ``rows``, in new memory."""
        if rows.is_cuda:
            return norm_at_once(rows, self.weight, self.epsilon)
        scaled = rows.to(torch.float32, copy=True)
        norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
        mean_square = norm.square_().div_(rows.shape[-1])
        scaled.mul_(mean_square.add_(self.epsilon).rsqrt_())
        return scaled.to(self.weight.dtype).mul_(self.weight).to(rows.dtype)


def norm_at_once(rows: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return what ``RMSNorm`` does, in the few launches that a GPU's kernel of torch makes of it.

    The quotient is rounded once only, with the product, where ``weight`` is a row.
    """
    is_row = weight.dim() == 1
    width = rows.shape[-1:]
    scaled = rms_norm(rows.to(weight.dtype), width, weight if is_row else None, epsilon)
    if not is_row:
        scaled = scaled.mul_(weight)
    return scaled.to(rows.dtype)
