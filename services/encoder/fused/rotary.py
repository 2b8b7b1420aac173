"""Turn queries and keys by their positions, as products of complex numbers.

Math: ``(a + ib) * (cos + i sin)``, where ``a`` and ``b`` are the values of the two halves of a head
that transformers turns as one pair. ``pair_order`` puts them side by side in the projection's
outputs; scores do not depend on the order of a head's values.
Source: Su et al. 2021, "RoFormer".
"""

from __future__ import annotations

import torch


def pair_order(num_heads: int, head_dim: int) -> torch.Tensor:
    """Return which outputs of a fused query, key and value projection stand where.

    Returns:
        Index of the rows of its weight; values stay. [3 * num_heads * head_dim], int64.
    """
    order = torch.arange(3 * num_heads * head_dim).view(3, num_heads, head_dim)
    halves = order[:2].view(2, num_heads, 2, head_dim // 2)
    return torch.cat([halves.transpose(2, 3).reshape(-1), order[2].reshape(-1)])


def make_rotation(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return one complex number for every row and pair.

    Args:
        cos: Cosines as transformers' rotary modules give them. [num_rows, head_dim], float32.
        sin: Sines, as ``cos``.

    Returns:
        [num_rows, head_dim / 2], complex64, contiguous.
    """
    half = cos.shape[-1] // 2
    return torch.complex(cos[:, :half], sin[:, :half]).contiguous()


def rotate(heads: torch.Tensor, rotation: torch.Tensor) -> None:
    """Turn queries and keys in place; computed in float32.

    Args:
        heads: Queries, keys and values, in ``pair_order``. [num_rows, 3, num_heads, head_dim].
        rotation: See ``make_rotation``.
    """
    turned = heads[:, :2].flatten(1, 2)
    pairs = torch.view_as_complex(turned.to(torch.float32).view(*turned.shape[:2], -1, 2))
    turned.copy_(torch.view_as_real(pairs.mul_(rotation[:, None])).flatten(-2))
