"""Turn queries and keys by their positions.

Math: ``out = x * cos + swap(x) * sin``, where ``swap`` exchanges the halves of the turned part of a
head and ``sin`` is negated for the first half.
Source: Su et al. 2021, "RoFormer", in the half-split layout of GPT-NeoX.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """The angles of the tokens of one forward.

    Attributes:
        cos: Cosines, scaled as the rotary type wants. [num_tokens, 1, rotary_dim], contiguous.
        sin: Sines, as ``cos``, the first half negated.
    """

    cos: torch.Tensor
    sin: torch.Tensor


def make_rotation(cos: torch.Tensor, sin: torch.Tensor) -> Rotation:
    """Prepare what transformers' rotary modules return.

    Args:
        cos: [1, num_tokens, rotary_dim], both halves alike.
        sin: As ``cos``.
    """
    first, second = sin[0].chunk(2, dim=-1)
    return Rotation(cos[0][:, None].contiguous(), torch.cat([-first, second], dim=-1)[:, None])


def has_fixed_angles(rotary: torch.nn.Module) -> bool:
    """Return whether a rotary module of transformers gives a position the same angles always.

    Others look at the largest position of a batch.
    """
    kinds = getattr(rotary, "rope_type", "default")
    by_layer = kinds.values() if isinstance(kinds, dict) else [kinds]
    return not any("dynamic" in kind or kind == "longrope" for kind in by_layer)


def rotate(heads: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Turn ``heads``, [num_tokens, num_heads, head_dim]; what is behind ``rotary_dim`` stays."""
    rotary_dim = rotation.cos.shape[-1]
    turned = heads[..., :rotary_dim]
    swapped = turned.roll(rotary_dim // 2, dims=-1)
    turned = torch.addcmul(turned * rotation.cos, swapped, rotation.sin)
    if rotary_dim == heads.shape[-1]:
        return turned
    return torch.cat([turned, heads[..., rotary_dim:]], dim=-1)
