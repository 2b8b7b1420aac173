"""What a layer of the fused decoder computes between its matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from chiasm.common.rms_norm import RMSNorm
    from chiasm.generator.model.fused.rotary import Rotation

# Adds, in place, what is not None to the hidden states and returns the norm of the sum; all
# [num_tokens, hidden_size].
AddNorm = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
# Multiplies the second half of rows by a function of the first.
# [num_tokens, 2 * inner_size] to [num_tokens, inner_size].
Gate = Callable[[torch.Tensor], torch.Tensor]
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Place(Protocol):
    """Norms and turns the queries and keys of one layer, and stores its keys and values."""

    def __call__(self, qkv: torch.Tensor, rotation: Rotation, slots: torch.Tensor) -> Heads:
        """Place the heads of new tokens.

        Args:
            qkv: Queries, keys and values. [num_tokens, num_heads * head_dim], contiguous; unusable
                afterwards.
            rotation: Angles of the tokens.
            slots: Slot of every token. [num_tokens], int64.

        Returns:
            Queries, keys and values, each [num_tokens, num_heads, head_dim].
        """
        ...


class LayerOperators(Protocol):
    """Makes the operators of layers; who computes them is the difference between two of these."""

    def add_norm(self, norm: RMSNorm, scale: float) -> AddNorm:
        """Return what adds ``scale`` times something and norms the sum with ``norm``."""
        ...

    def gate(self, width: int) -> Gate:
        """Return the gate of feed-forward blocks; ``width`` is what it returns."""
        ...

    def place(self, layer: int, qk_norm: RMSNorm | None) -> Place:
        """Return what places the heads of ``layer``, whose heads ``qk_norm`` norms."""
        ...
