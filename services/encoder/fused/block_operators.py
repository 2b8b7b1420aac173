"""What a block of a fused tower computes between its matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from chiasm.common.packed_linear import PackedLinear
    from chiasm.encoder.fused.norm import Norm
    from chiasm.encoder.fused.segments import Segments

# Returns the normed rows in new memory. [num_rows, width].
NormRows = Callable[[torch.Tensor], torch.Tensor]


class BlockOperators(Protocol):
    """Computes them; who does is the difference between two of these."""

    def norm(self, norm: Norm) -> NormRows:
        """Return what computes ``norm``."""
        ...

    def activate(self, layer: PackedLinear, rows: torch.Tensor, activation: str) -> torch.Tensor:
        """Return ``activation(layer(rows))`` for any activation that transformers knows."""
        ...

    def rotate(self, heads: torch.Tensor, rotation: torch.Tensor) -> None:
        """Turn queries and keys in place; computed in float32.

        Args:
            heads: Queries, keys and values, in ``pair_order``.
                [num_rows, 3, num_heads, head_dim], contiguous.
            rotation: See ``make_rotation``.
        """
        ...

    def attend(self, heads: torch.Tensor, segments: Segments) -> torch.Tensor:
        """Attend within every segment.

        Args:
            heads: Queries, keys and values. [num_rows, 3, num_heads, head_dim], contiguous.
            segments: Where the rows are cut.

        Returns:
            [num_rows, num_heads * head_dim], contiguous, dtype of ``heads``.
        """
        ...
